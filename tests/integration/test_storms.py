"""Many students at the same moment."""

import asyncio

from tests.integration.stack import Stack


async def test_200_students_at_once_get_200_different_sandboxes(stack: Stack) -> None:
    await stack.fill(200)
    responses = await asyncio.gather(*(stack.allocate(f"student-{number}") for number in range(200)))
    assert {response.status_code for response in responses} == {201}
    assert len({response.json()["sandbox_id"] for response in responses}) == 200
    stats = await stack.stats()
    assert (stats["allocated"], stats["available"]) == (200, 0)


async def test_50_copies_of_one_request_get_one_sandbox(stack: Stack) -> None:
    responses = await asyncio.gather(*(stack.allocate("eager") for _ in range(50)))
    assert sorted(response.status_code for response in responses) == [200] * 49 + [201]
    assert len({response.text for response in responses}) == 1
    assert (await stack.stats())["allocated"] == 1


async def test_of_300_students_100_are_told_that_the_pool_is_empty(stack: Stack) -> None:
    await stack.fill(200)
    responses = await asyncio.gather(*(stack.allocate(f"student-{number}") for number in range(300)))
    granted = [response for response in responses if response.status_code == 201]
    refused = [response for response in responses if response.status_code == 409]
    assert (len(granted), len(refused)) == (200, 100)
    assert len({response.json()["sandbox_id"] for response in granted}) == 200
    for response in refused:
        detail = response.json()["detail"]
        assert detail["code"] == "POOL_EXHAUSTED"
        assert detail["message"].startswith("No available sandboxes in pool")
        assert detail["retry_after"] == 30
        assert response.headers["retry-after"] == "30"
        assert detail["request_id"] == response.headers["x-request-id"]


async def test_labs_with_prefixes_of_their_own_share_the_pool_without_taking_from_each_other(stack: Stack) -> None:
    await stack.control("POST", "accounts", {"count": 30, "name_prefix": "lab-a-"})
    await stack.control("POST", "accounts", {"count": 30, "name_prefix": "lab-a-advanced-"})
    assert (await stack.sync()).status_code == 200
    responses = await asyncio.gather(
        *(stack.allocate(f"advanced-{n}", X_Sandbox_Name_Prefix="lab-a-advanced-") for n in range(30)),
        *(stack.allocate(f"basic-{n}", X_Sandbox_Name_Prefix="lab-a-") for n in range(30)),
        *(stack.allocate(f"any-{n}") for n in range(50)),
    )
    assert {response.status_code for response in responses} == {201}
    names = [response.json()["name"] for response in responses]
    assert len(set(names)) == 110
    assert all(name.startswith("lab-a-advanced-") for name in names[:30])
    assert all(name.startswith("lab-a-") for name in names[30:60])


async def test_students_who_come_and_go_at_once_leave_a_sound_pool(stack: Stack) -> None:
    await stack.fill(120)

    async def visit(student: str) -> None:
        lease = await stack.allocate(student)
        assert lease.status_code == 201
        released = await asyncio.gather(*(stack.release(lease.json()["sandbox_id"], student) for _ in range(2)))
        assert {response.status_code for response in released} == {200}

    await asyncio.gather(*(visit(f"visitor-{number}") for number in range(60)))
    await asyncio.gather(*(visit(f"visitor-{number}") for number in range(60)))
    assert (await stack.stats())["allocated"] == 0
