"""An allocator that does not answer in time: what is told to ask again gets its sandbox by asking again."""

import asyncio
import signal

import httpx

from devstack.ports import free_port
from tests.integration.stack import Stack, eventually, track

STUDENTS = [f"student-{number}" for number in range(5)]


async def test_a_504_leaves_nothing_half_done_and_asking_again_gets_the_lease(stack: Stack) -> None:
    port = free_port()
    gateway = await stack.start_service(
        "gateway", name="hasty gateway", settings={"GATEWAY_PORT": str(port), "ALLOCATE_TIMEOUT_SEC": "1"}
    )
    allocator = stack.processes["allocator"]

    async def ask(student: str) -> httpx.Response:
        return await stack.client.post(
            f"http://127.0.0.1:{port}/v1/allocate",
            headers={**track(student), "Idempotency-Key": f"key-of-{student}"},
        )

    try:
        assert (await ask("first")).status_code == 201
        allocator.send(signal.SIGSTOP)
        late = await asyncio.gather(*(ask(student) for student in [*STUDENTS, "who-gives-up"]))
        assert [answer.status_code for answer in late] == [504] * len(late)
        for answer in late:
            detail = answer.json()["detail"]
            assert detail["code"] == "ALLOCATION_TIMEOUT"
            assert answer.headers["Retry-After"] == str(detail["retry_after"])
        assert await stack.database.fetchval("SELECT count(*) FROM leases") == 1
        allocator.send(signal.SIGCONT)

        leases: dict[str, str] = {}

        async def all_have_one() -> bool:
            for answer, student in zip(
                await asyncio.gather(*(ask(student) for student in STUDENTS)), STUDENTS, strict=True
            ):
                if answer.status_code in (200, 201):
                    assert leases.setdefault(student, answer.json()["sandbox_id"]) == answer.json()["sandbox_id"]
                else:
                    assert answer.status_code in (503, 504)
            return len(leases) == len(STUDENTS)

        await eventually(all_have_one)
    finally:
        allocator.send(signal.SIGCONT)
        await gateway.stop()
    rows = await stack.database.fetch("SELECT holder, sandbox_id, ended_at FROM leases")
    held = {row["holder"]: row["sandbox_id"] for row in rows}
    assert len(rows) == len(held)
    assert {student: held[student] for student in STUDENTS} == leases
    # Whoever gave up may have got one, which would be theirs if they came again.
    assert held.keys() - {*STUDENTS, "first"} <= {"who-gives-up"}
    assert (await stack.stats())["allocated"] == len(rows)
