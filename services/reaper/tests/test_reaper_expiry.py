"""Overdue leases."""

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from reaper import asking
from reaper.handlers import EXPIRY_PIECE
from sandbox_broker.messages import ExpireLeases

from .reaper_harness import Allocator, Csp, emptied, reaping, simulated_csp, until


@pytest.fixture
async def queues(amqp_url: str) -> str:
    """All empty; deleting them, as clean_queues does, would take longer than most tests."""
    await emptied(amqp_url)
    return amqp_url


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=0) as csp:
        yield csp


async def test_it_asks_until_nothing_is_overdue(csp: Csp, queues: str) -> None:
    allocator = Allocator(csp, overdue_leases=2 * EXPIRY_PIECE + 1)
    async with allocator.consuming(queues), reaping(queues, csp, auto_expiry_interval_sec=1):
        await until(lambda: len(allocator.all(ExpireLeases)) == 3)
        await until(lambda: len(allocator.all(ExpireLeases)) == 4)  # with the next tick
    assert allocator.overdue_leases == 0
    assert {(command.limit, command.grace_sec) for command in allocator.all(ExpireLeases)} == {(EXPIRY_PIECE, 1800)}


async def test_it_goes_on_with_the_next_tick_when_the_allocator_was_away(
    csp: Csp, queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "REQUEST_TIMEOUT_SEC", 0.2)
    allocator = Allocator(csp, overdue_leases=5)
    with capture_logs() as logs:
        async with reaping(queues, csp, auto_expiry_interval_sec=0.1):
            await until(lambda: "expiry.postponed" in [line["event"] for line in logs])
            async with allocator.consuming(queues):
                await until(lambda: allocator.overdue_leases == 0)


async def test_a_refusal_is_not_the_end(csp: Csp, queues: str) -> None:
    allocator = Allocator(csp, overdue_leases=5, refuses=lambda _: True)
    async with allocator.consuming(queues), reaping(queues, csp, auto_expiry_interval_sec=0.1):
        await until(lambda: len(allocator.all(ExpireLeases)) >= 2)
        allocator.refuses = lambda _: False
        await until(lambda: allocator.overdue_leases == 0)
