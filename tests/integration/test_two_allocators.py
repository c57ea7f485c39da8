"""Two allocators at work at once: the single consumer is for order, the database is for safety."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, eventually, running

LAUNCHER = str(Path(__file__).with_name("without_single_consumer.py"))


@pytest.fixture(scope="module")
async def pair(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    """The broker with two allocators that both get commands."""
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(database_url, amqp_url, launcher=(LAUNCHER,)) as stack,
    ):
        await stack.start_service("allocator", name="second allocator")
        yield stack


async def persistently(stack: Stack, student: str) -> httpx.Response:
    """As the script does it: 503 and 504 are asked again."""
    while True:
        response = await stack.allocate(student)
        if response.status_code < 500:
            return response


async def test_both_of_them_consume(pair: Stack) -> None:
    await pair.fill(1)
    consumers = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'allocator.commands' AND datname = $1"
    )
    name = await pair.database.fetchval("SELECT current_database()")

    async def both_have_written() -> bool:
        await asyncio.gather(*(pair.allocate("somebody") for _ in range(20)))
        return int(await pair.database.fetchval(consumers, name)) == 2

    await eventually(both_have_written)


async def test_200_students_get_200_different_sandboxes(pair: Stack) -> None:
    await pair.fill(200)
    responses = await asyncio.gather(*(persistently(pair, f"student-{n}") for n in range(200)))
    assert {response.status_code for response in responses} <= {200, 201}
    assert len({response.json()["sandbox_id"] for response in responses}) == 200
    await pair.assert_sound()


async def test_50_copies_of_one_request_get_one_sandbox(pair: Stack) -> None:
    await pair.fill(50)
    responses = await asyncio.gather(*(persistently(pair, "eager") for _ in range(50)))
    assert len({response.json()["sandbox_id"] for response in responses}) == 1
    assert (await pair.stats())["allocated"] == 1
    await pair.assert_sound()


async def test_of_300_students_200_get_a_sandbox_and_100_are_refused(pair: Stack) -> None:
    await pair.fill(200)
    responses = await asyncio.gather(*(persistently(pair, f"student-{n}") for n in range(300)))
    granted = {response.json()["sandbox_id"] for response in responses if response.status_code in (200, 201)}
    assert len(granted) == 200
    assert sum(response.status_code == 409 for response in responses) == 100
    await pair.assert_sound()
