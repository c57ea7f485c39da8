"""Allocator that does not reply in time: a retry after a 504 returns the lease."""

import asyncio
import signal

import httpx

from devstack.conditions import wait_until
from devstack.ports import free_port
from tests.integration.stack import Stack, track_headers

STUDENTS = [f"student-{number}" for number in range(5)]


async def test_a_504_leaves_no_partial_lease_and_a_retry_returns_the_lease(stack: Stack) -> None:
    port = free_port()
    gateway = await stack.start_service(
        "gateway",
        name="gateway with short timeout",
        settings={"GATEWAY_PORT": str(port), "ALLOCATE_TIMEOUT_SEC": "1"},
    )
    allocator = stack.processes["allocator"]

    async def allocate(student: str) -> httpx.Response:
        return await stack.client.post(
            f"http://127.0.0.1:{port}/v1/allocate",
            headers={**track_headers(student), "Idempotency-Key": f"key-of-{student}"},
        )

    try:
        assert (await allocate("first")).status_code == 201
        allocator.send(signal.SIGSTOP)
        late = await asyncio.gather(*(allocate(student) for student in [*STUDENTS, "gives-up"]))
        assert [response.status_code for response in late] == [504] * len(late)
        for response in late:
            detail = response.json()["detail"]
            assert detail["code"] == "ALLOCATION_TIMEOUT"
            assert response.headers["Retry-After"] == str(detail["retry_after"])
        assert await stack.database.fetchval("SELECT count(*) FROM leases") == 1
        allocator.send(signal.SIGCONT)

        leases: dict[str, str] = {}

        async def all_have_leases() -> bool:
            for response, student in zip(
                await asyncio.gather(*(allocate(student) for student in STUDENTS)), STUDENTS, strict=True
            ):
                if response.status_code in (200, 201):
                    assert (
                        leases.setdefault(student, response.json()["sandbox_id"]) == response.json()["sandbox_id"]
                    )
                else:
                    assert response.status_code in (503, 504)
            return len(leases) == len(STUDENTS)

        await wait_until(all_have_leases)
    finally:
        allocator.send(signal.SIGCONT)
        await gateway.stop()
    rows = await stack.database.fetch("SELECT holder, sandbox_id, ended_at FROM leases")
    held = {row["holder"]: row["sandbox_id"] for row in rows}
    assert len(rows) == len(held)
    assert {student: held[student] for student in STUDENTS} == leases
    # The abandoned request may have been executed. A retry of this student would return that lease.
    assert held.keys() - {*STUDENTS, "first"} <= {"gives-up"}
    assert (await stack.stats())["allocated"] == len(rows)
