"""Tests of expiry.py."""

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from devstack.conditions import wait_until
from devstack.testing import empty_queues
from reaper import main
from reaper.expiry import BATCH_SIZE
from sandbox_broker.contract.commands import ExpireLeases

from .reaper_harness import Allocator, Csp, reaping, simulated_csp


@pytest.fixture
async def queues(amqp_url: str) -> str:
    """Empty queues. Deleting them, as clean_queues does, takes longer than most tests."""
    await empty_queues(amqp_url)
    return amqp_url


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=0) as csp:
        yield csp


async def test_expiry_runs_until_no_lease_is_overdue(csp: Csp, queues: str) -> None:
    allocator = Allocator(csp, overdue_leases=2 * BATCH_SIZE + 1)
    async with allocator.consuming(queues), reaping(queues, csp, auto_expiry_interval_sec=1):
        await wait_until(lambda: len(allocator.all(ExpireLeases)) == 3)
        await wait_until(lambda: len(allocator.all(ExpireLeases)) == 4)  # by the next tick
    assert allocator.overdue_leases == 0
    assert {(command.limit, command.grace_sec) for command in allocator.all(ExpireLeases)} == {(BATCH_SIZE, 1800)}


async def test_expiry_continues_at_the_next_tick_after_the_allocator_was_away(
    csp: Csp, queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "REQUEST_TIMEOUT_SEC", 0.2)
    allocator = Allocator(csp, overdue_leases=5)
    with capture_logs() as logs:
        async with reaping(queues, csp, auto_expiry_interval_sec=0.1):
            await wait_until(lambda: "expiry.postponed" in [line["event"] for line in logs])
            async with allocator.consuming(queues):
                await wait_until(lambda: allocator.overdue_leases == 0)


async def test_expiry_continues_after_a_refusal(csp: Csp, queues: str) -> None:
    allocator = Allocator(csp, overdue_leases=5, refuses=lambda _: True)
    async with allocator.consuming(queues), reaping(queues, csp, auto_expiry_interval_sec=0.1):
        await wait_until(lambda: len(allocator.all(ExpireLeases)) >= 2)
        allocator.refuses = lambda _: False
        await wait_until(lambda: allocator.overdue_leases == 0)
