"""Two brokers with one database, because of a wrong virtual host in AMQP_URL."""

import asyncio

import pytest

from devstack.conditions import wait_until
from devstack.testing import NewVhost
from tests.integration.ctl import wait_for_status
from tests.integration.stack import Stack


async def test_the_newcomer_stops_and_the_first_broker_serves_all_students(
    stack: Stack, new_vhost: NewVhost
) -> None:
    statuses = []

    async def allocate_repeatedly() -> None:
        for number in range(1000):
            statuses.append((await stack.allocate(f"student-{number % 40}")).status_code)
            await asyncio.sleep(0.02)

    async with new_vhost() as other_amqp_url:
        students = asyncio.create_task(allocate_repeatedly())
        newcomer, _ = await stack.launch("allocator", name="newcomer", settings={"AMQP_URL": other_amqp_url})
        try:

            async def has_stopped() -> bool:
                return not newcomer.running

            await wait_until(has_stopped, within_sec=60)
        finally:
            students.cancel()
            await newcomer.stop()
            stack.processes.pop("newcomer")
    assert any("another broker uses the same database" in line for line in newcomer.tail)
    assert set(statuses) <= {200, 201}

    async def is_reported() -> bool:
        return (await stack.admin("GET", "status")).json()["other_broker_at"] is not None

    await wait_until(is_reported)
    await wait_for_status(stack, lambda status: "Another broker used the same database" in status.out)
    metrics = (await stack.client.get(f"http://127.0.0.1:{stack.environment['ALLOCATOR_PORT']}/metrics")).text
    assert "broker_other_broker 1.0" in metrics
    await stack.forget_other_broker()


@pytest.mark.parametrize("signal", ["stop", "kill"])
async def test_a_restarted_allocator_of_the_same_broker_serves(stack: Stack, signal: str) -> None:
    second = await stack.start_service("allocator", name="second allocator")
    try:
        first = stack.processes.pop("allocator")
        if signal == "kill":
            first.kill()
        else:
            await first.stop()

        async def is_served() -> bool:
            return (await stack.allocate("ada")).status_code in (200, 201)

        await wait_until(is_served)
        restarted = await stack.start_service("allocator")
        await second.stop()
        await wait_until(is_served)
        assert restarted.running
    finally:
        await second.stop()
        stack.processes.pop("second allocator")
