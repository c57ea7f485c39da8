"""Restart and kill of RabbitMQ under load."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from devstack.conditions import wait_until
from devstack.rabbitmq import PrivateRabbitMQ
from devstack.testing import NewDatabase
from tests.integration.stack import Stack, run_stack


@pytest.fixture(scope="module")
async def rabbitmq() -> AsyncIterator[PrivateRabbitMQ]:
    async with PrivateRabbitMQ() as server:
        yield server


@pytest.fixture(scope="module")
async def stack(new_database: NewDatabase, rabbitmq: PrivateRabbitMQ) -> AsyncIterator[Stack]:
    async with new_database() as database_url, run_stack(database_url, rabbitmq.url) as stack:
        yield stack


@pytest.mark.parametrize("action", ["restart", "kill"])
async def test_all_services_reconnect_and_no_lease_is_lost(
    stack: Stack, rabbitmq: PrivateRabbitMQ, action: str
) -> None:
    await stack.fill(400)
    if action == "kill":
        await rabbitmq.sync_queue_metadata()  # here, because a node writes the names again after each start
    statuses: Counter[int] = Counter()
    refusals_sec: list[float] = []
    leased: dict[str, str] = {}
    stop = asyncio.Event()

    async def run_students(worker: int) -> None:
        number = 0
        while not stop.is_set():
            student = f"{worker}-{number}"
            started = time.monotonic()
            response = await stack.allocate(student)
            statuses[response.status_code] += 1
            if response.status_code in (200, 201):
                leased[student] = response.json()["sandbox_id"]
                number += 1
            else:
                refusals_sec.append(time.monotonic() - started)
            await asyncio.sleep(0.1)  # pace of the load, not a wait for a condition

    workers = [asyncio.create_task(run_students(worker)) for worker in range(5)]

    async def are_some_served() -> bool:
        return len(leased) >= 10

    async def is_one_refused() -> bool:
        return statuses[503] > 0

    await wait_until(are_some_served)
    if action == "kill":
        await rabbitmq.kill()
    else:
        await rabbitmq.stop()
    await wait_until(is_one_refused)
    await rabbitmq.start()
    restarted_at = time.monotonic()
    leases_before = len(leased)

    async def are_students_served_again() -> bool:
        return len(leased) >= leases_before + 10

    await wait_until(are_students_served_again, within_sec=10)
    for service in ("ALLOCATOR", "REAPER", "CSP_SYNCER", "PROVISIONER", "GATEWAY"):
        port = stack.environment[f"{service}_PORT"]

        async def is_ready(port: str = port) -> bool:
            return (await stack.client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200

        await wait_until(is_ready, within_sec=max(0.1, 10 - (time.monotonic() - restarted_at)))
    stop.set()
    await asyncio.gather(*workers)

    assert set(statuses) <= {200, 201, 503}
    assert statistics.median(refusals_sec) < 1  # the median, because the maximum depends on the load of the machine
    rows = await stack.database.fetch("SELECT holder, sandbox_id FROM leases WHERE ended_at IS NULL")
    leases = {row["holder"]: row["sandbox_id"] for row in rows}
    assert {student: leases.get(student) for student in leased} == leased
    await stack.assert_sound()

    student, sandbox_id = next(iter(leased.items()))
    assert (await stack.release(sandbox_id, student)).status_code == 200

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
