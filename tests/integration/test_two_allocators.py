"""Two allocators at the same time. Only the order depends on the single consumer; the database ensures safety."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, run_stack

LAUNCHER = str(Path(__file__).with_name("parallel_consumers.py"))


@pytest.fixture(scope="module")
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    """Broker with two allocators that both receive commands."""
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, launcher=(LAUNCHER,)) as stack,
    ):
        await stack.start_service("allocator", name="second allocator")
        yield stack


async def allocate_with_retries(stack: Stack, student: str) -> httpx.Response:
    """Retry 503 and 504, as the Instruqt script does."""
    while True:
        response = await stack.allocate(student)
        if response.status_code < 500:
            return response


async def test_both_allocators_consume(stack: Stack) -> None:
    await stack.fill(1)
    consumers = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'allocator.commands' AND datname = $1"
    )
    name = await stack.database.fetchval("SELECT current_database()")

    async def have_both_connected() -> bool:
        await asyncio.gather(*(stack.allocate("ada") for _ in range(20)))
        return int(await stack.database.fetchval(consumers, name)) == 2

    await wait_until(have_both_connected)


async def test_200_students_get_200_different_sandboxes(stack: Stack) -> None:
    await stack.fill(200)
    responses = await asyncio.gather(*(allocate_with_retries(stack, f"student-{n}") for n in range(200)))
    assert {response.status_code for response in responses} <= {200, 201}
    assert len({response.json()["sandbox_id"] for response in responses}) == 200
    await stack.assert_sound()


async def test_50_copies_of_one_request_get_one_sandbox(stack: Stack) -> None:
    await stack.fill(50)
    responses = await asyncio.gather(*(allocate_with_retries(stack, "eager") for _ in range(50)))
    assert len({response.json()["sandbox_id"] for response in responses}) == 1
    assert (await stack.stats())["allocated"] == 1
    await stack.assert_sound()


async def test_of_300_students_200_get_a_sandbox_and_100_get_409(stack: Stack) -> None:
    await stack.fill(200)
    responses = await asyncio.gather(*(allocate_with_retries(stack, f"student-{n}") for n in range(300)))
    granted = {response.json()["sandbox_id"] for response in responses if response.status_code in (200, 201)}
    assert len(granted) == 200
    assert sum(response.status_code == 409 for response in responses) == 100
    await stack.assert_sound()
