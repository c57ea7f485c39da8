"""Tests of the circuit breaker in a clean-up run."""

import time
from collections.abc import AsyncIterator

import pytest

from devstack.conditions import wait_until
from devstack.testing import empty_queues
from sandbox_broker.contract.commands import ClaimDeletions, RecordDeletionFailure

from .reaper_harness import Allocator, Csp, announce, reaping, sample, simulated_csp


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=12) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, amqp_url: str) -> AsyncIterator[Allocator]:
    await empty_queues(amqp_url)
    allocator = Allocator(csp)
    async with allocator.consuming(amqp_url):
        yield allocator


@pytest.mark.parametrize("status", [500, "bomb", "flood"])
async def test_an_open_breaker_claims_no_deletions(
    csp: Csp, allocator: Allocator, amqp_url: str, status: int | str
) -> None:
    await csp.behave(delete_error_rate=1, delete_error_status=status)
    await allocator.add_due()
    async with reaping(amqp_url, csp, cleanup_concurrency=1, cleanup_interval_sec=0.1):
        await wait_until(lambda: len(allocator.all(RecordDeletionFailure)) == 5)
        await wait_until(lambda: sample("broker_circuit_state") == 2)
        claims = len(allocator.all(ClaimDeletions))
        assert claims == 5
        await csp.behave(delete_error_rate=0)
        for _ in range(20):
            await announce(amqp_url)
        assert len(allocator.all(ClaimDeletions)) == claims
    assert len(allocator.due) == 12
    assert sorted(due.attempts for due in allocator.due.values()) == [0] * 7 + [1] * 5


async def test_a_half_open_breaker_allows_one_deletion(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(delete_error_rate=1, delete_latency_sec=0.3)
    await allocator.add_due()
    quick = {"circuit_breaker_timeout_sec": 1, "deletion_backoff_base_sec": 0.1, "deletion_max_attempts": 99}
    async with reaping(amqp_url, csp, cleanup_concurrency=4, **quick):
        await wait_until(lambda: sample("broker_circuit_state") == 2)
        await wait_until(lambda: sample("broker_circuit_state") == 1)
        before = len(allocator.all(RecordDeletionFailure))
        await wait_until(lambda: sample("broker_circuit_state") == 2)
        await wait_until(lambda: len(allocator.all(RecordDeletionFailure)) > before)
        assert len(allocator.all(RecordDeletionFailure)) == len(await csp.deletions()) == before + 1
        # CSP works again: the next allowed deletion closes the breaker, and the others follow.
        await csp.behave(delete_error_rate=0, delete_latency_sec=0)
        await wait_until(lambda: not allocator.due)
        assert sample("broker_circuit_state") == 0


@pytest.mark.parametrize("undeletable_first", [True, False])
@pytest.mark.parametrize("concurrency", [1, 2, 8])
async def test_undeletable_accounts_do_not_delay_the_deletion_of_others(
    csp: Csp, allocator: Allocator, amqp_url: str, concurrency: int, undeletable_first: bool
) -> None:
    accounts = await csp.accounts()
    ids = list(accounts) if undeletable_first else list(accounts)[::-1]
    undeletable, deletable = ids[:9], ids[9:]
    await csp.behave(undeletable=[accounts[sandbox_id] for sandbox_id in undeletable])
    await allocator.add_due()
    quick = {"circuit_breaker_timeout_sec": 0.2, "deletion_backoff_base_sec": 0.1}
    async with reaping(amqp_url, csp, cleanup_concurrency=concurrency, **quick):
        await wait_until(lambda: not allocator.due.keys() & set(deletable))
        statuses = [call["status"] for call in await csp.deletions()]
        failures_before = statuses[: len(statuses) - statuses[::-1].index(204)].count(500)
    # The calls in flight at the first failure, and one call of the circuit breaker.
    assert failures_before <= concurrency + 1


async def test_a_half_open_breaker_tries_deletions_that_never_failed_first(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    accounts = await csp.accounts()
    *failed, late = accounts
    await csp.behave(undeletable=[accounts[sandbox_id] for sandbox_id in failed])
    for sandbox_id in failed:
        allocator.add(sandbox_id, accounts[sandbox_id])
    quick = {"circuit_breaker_timeout_sec": 1, "deletion_backoff_base_sec": 0.01, "deletion_max_attempts": 99}
    async with reaping(amqp_url, csp, cleanup_concurrency=1, **quick):
        await wait_until(lambda: all(due.attempts for due in allocator.due.values()))
        await wait_until(lambda: sample("broker_circuit_state") == 2)
        allocator.add(late, accounts[late])
        added_at = time.monotonic()
        await wait_until(lambda: late not in allocator.due)
        # The call before it may have been claimed just before `late` was added.
        paths = [call["path"] for call in await csp.deletions() if call["begun"] > added_at]
        assert any(path.endswith(accounts[late]) for path in paths[:2])
