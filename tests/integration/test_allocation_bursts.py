"""Bursts: many requests at the same moment."""

import asyncio
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from devstack.conditions import wait_until
from tests.integration.stack import ADMIN, Stack


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


async def test_of_300_students_100_get_pool_exhausted(stack: Stack) -> None:
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


@pytest.mark.parametrize("owner", ["token", "policy"])
async def test_of_300_students_exactly_50_get_a_sandbox_under_a_quota(stack: Stack, owner: str) -> None:
    await stack.fill(300)
    headers = {"X-Instruqt-Track-ID": "exam"}
    if owner == "token":
        token = await stack.issue_token(name="exam", role="track", tracks=["exam"], max_active=50)
        headers["Authorization"] = f"Bearer {token}"
    else:
        policy = {"name": "exam", "match": {"track_name": "exam"}, "max_active": 50}
        url = f"{stack.url}/v1/admin/policies"
        applied = await stack.client.put(url, headers=ADMIN, json={"policies": [policy]})
        assert applied.status_code == 200, applied.text
    responses = await asyncio.gather(*(stack.allocate(f"student-{number}", **headers) for number in range(300)))
    assert Counter(response.status_code for response in responses) == {201: 50, 409: 250}
    refused = [response.json()["detail"]["code"] for response in responses if response.status_code == 409]
    assert set(refused) == {"QUOTA_EXCEEDED"}
    assert (await stack.stats())["allocated"] == 50


async def test_concurrent_labs_with_prefixes_get_only_matching_sandboxes(stack: Stack) -> None:
    await stack.control("POST", "accounts", {"count": 30, "name_prefix": "lab-a-"})
    await stack.control("POST", "accounts", {"count": 30, "name_prefix": "lab-a-advanced-"})
    assert (await stack.sync(force="true")).status_code == 200
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


async def test_concurrent_allocations_and_releases_leave_a_consistent_pool(stack: Stack) -> None:
    await stack.fill(120)

    async def allocate_and_release_twice(student: str) -> None:
        lease = await stack.allocate(student)
        assert lease.status_code == 201
        released = await asyncio.gather(*(stack.release(lease.json()["sandbox_id"], student) for _ in range(2)))
        assert {response.status_code for response in released} == {200}

    await asyncio.gather(*(allocate_and_release_twice(f"visitor-{number}") for number in range(60)))
    await asyncio.gather(*(allocate_and_release_twice(f"visitor-{number}") for number in range(60)))
    assert (await stack.stats())["allocated"] == 0


async def test_50_mixed_requests_of_one_student_leave_consistent_leases(stack: Stack) -> None:
    await stack.fill(150)
    granted: list[dict[str, Any]] = []
    new: list[str] = []
    released: set[str] = set()

    async def allocate(**key: str) -> str | None:
        response = await stack.allocate("restless", **key)
        if response.status_code == 409:  # the lease of this key has ended, and the student holds no other
            assert response.json()["detail"]["code"] == "IDEMPOTENCY_KEY_CONFLICT"
            assert key
            return None
        assert response.status_code in (200, 201), response.text
        lease = response.json()
        granted.append(lease)
        if response.status_code == 201:
            new.append(lease["sandbox_id"])
        return str(lease["sandbox_id"])

    async def release(sandbox_id: str) -> None:
        response = await stack.release(sandbox_id, "restless")
        assert response.status_code == 200, response.text
        released.add(sandbox_id)

    async def allocate_and_maybe_release(number: int) -> None:
        key = {"Idempotency_Key": f"key-{number % 4}"} if number % 2 else {}
        sandbox_id = await allocate(**key)
        if sandbox_id is not None and number % 5 < 3:
            await release(sandbox_id)
            if number % 5 == 0:
                await allocate()

    await asyncio.gather(*(allocate_and_maybe_release(number) for number in range(50)))

    leases = await stack.database.fetch("SELECT * FROM leases ORDER BY allocated_at")
    assert {lease["holder"] for lease in leases} == {"restless"}
    assert sorted(new) == sorted(lease["sandbox_id"] for lease in leases)
    allocated_at = {lease["sandbox_id"]: int(lease["allocated_at"].timestamp()) for lease in leases}
    assert all(allocated_at.get(lease["sandbox_id"]) == lease["allocated_at"] for lease in granted)
    for earlier, later in pairwise(leases):
        assert earlier["ended_at"] is not None
        assert earlier["ended_at"] <= later["allocated_at"]
    assert {lease["sandbox_id"] for lease in leases if lease["ended_at"] is not None} == released
    assert len(leases) > 1

    async def all_are_deleted() -> bool:
        return (await stack.stats())["deleted"] == len(released)

    await wait_until(all_are_deleted)
    external_ids = {lease["external_id"] for lease in granted if lease["sandbox_id"] in released}
    assert {call["path"].rsplit("/", 1)[1] for call in await stack.deletions()} == external_ids
