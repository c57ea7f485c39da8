"""RabbitMQ goes away and comes back under a broker at work."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from devstack.rabbitmq import PrivateRabbitMQ
from devstack.testing import NewDatabase
from tests.integration.stack import Stack, eventually, running


@pytest.fixture(scope="module")
async def rabbitmq() -> AsyncIterator[PrivateRabbitMQ]:
    async with PrivateRabbitMQ() as server:
        yield server


@pytest.fixture(scope="module")
async def stack(new_database: NewDatabase, rabbitmq: PrivateRabbitMQ) -> AsyncIterator[Stack]:
    async with new_database() as database_url, running(database_url, rabbitmq.url) as stack:
        await rabbitmq.sync_queue_metadata()
        yield stack


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_everything_reconnects_and_nothing_is_lost(stack: Stack, rabbitmq: PrivateRabbitMQ, how: str) -> None:
    await stack.fill(400)
    answers: Counter[int] = Counter()
    refusals_sec: list[float] = []
    granted: dict[str, str] = {}
    stop = asyncio.Event()

    async def students(worker: int) -> None:
        number = 0
        while not stop.is_set():
            student = f"{worker}-{number}"
            started = time.monotonic()
            response = await stack.allocate(student)
            answers[response.status_code] += 1
            if response.status_code in (200, 201):
                granted[student] = response.json()["sandbox_id"]
                number += 1
            else:
                refusals_sec.append(time.monotonic() - started)
            await asyncio.sleep(0.1)  # the pace of a student, not a wait

    workers = [asyncio.create_task(students(worker)) for worker in range(5)]

    async def somebody_was_served() -> bool:
        return len(granted) >= 10

    async def somebody_was_refused() -> bool:
        return answers[503] > 0

    await eventually(somebody_was_served)
    if how == "kill":
        await rabbitmq.kill()
    else:
        await rabbitmq.stop()
    await eventually(somebody_was_refused)
    await rabbitmq.start()
    back = time.monotonic()
    served = len(granted)

    async def all_are_served_again() -> bool:
        return len(granted) >= served + 10

    await eventually(all_are_served_again, within_sec=10)
    for service in ("ALLOCATOR", "REAPER", "CSP_SYNCER", "GATEWAY"):
        port = stack.environment[f"{service}_PORT"]

        async def ready(port: str = port) -> bool:
            return (await stack.client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200

        await eventually(ready, within_sec=max(0.1, 10 - (time.monotonic() - back)))
    stop.set()
    await asyncio.gather(*workers)

    assert set(answers) <= {200, 201, 503}
    assert statistics.median(refusals_sec) < 1  # the slowest would measure the machine
    rows = await stack.database.fetch("SELECT holder, sandbox_id FROM leases WHERE ended_at IS NULL")
    leases = {row["holder"]: row["sandbox_id"] for row in rows}
    assert {student: leases.get(student) for student in granted} == granted
    await stack.assert_sound()

    student, sandbox_id = next(iter(granted.items()))
    assert (await stack.release(sandbox_id, student)).status_code == 200

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(deleted)
