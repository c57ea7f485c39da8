"""Tests of refill.py and syncs.py with RabbitMQ, the CSP simulator and a stand-in for the allocator."""

import time
import uuid
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from devstack.conditions import wait_until
from devstack.testing import empty_queues
from provisioner import refill, throttle
from sandbox_broker.contract.commands import (
    ClaimCreations,
    Command,
    EndCreations,
    RecordCreationFailure,
    SyncPool,
)
from sandbox_broker.contract.replies import Reply

from .provisioner_harness import REFUSED, Allocator, Csp, announce, provisioning, sample, simulated_csp


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "MIN_PAUSE_SEC", 0.05)
    monkeypatch.setattr(refill, "NO_REPLY_PAUSE_SEC", 0.05)


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp() as csp:
        yield csp


@pytest.fixture
async def allocator(amqp_url: str) -> AsyncIterator[Allocator]:
    await empty_queues(amqp_url)
    allocator = Allocator()
    async with allocator.consuming(amqp_url):
        yield allocator


@pytest.mark.parametrize("concurrency", [1, 2, 4])
async def test_concurrent_creations_are_limited(
    csp: Csp, allocator: Allocator, amqp_url: str, concurrency: int
) -> None:
    allocator.add(8)
    await csp.behave(create_latency_sec=0.2)
    async with provisioning(amqp_url, csp, create_concurrency=concurrency):
        await wait_until(lambda: not allocator.due)
    calls = await csp.calls("POST")
    changes = sorted([(call["begun"], 1) for call in calls] + [(call["ended"], -1) for call in calls])
    running, most = 0, 0
    for _, change in changes:
        running += change
        most = max(most, running)
    assert (len(calls), most) == (8, concurrency)


async def test_starts_within_a_minute_are_limited(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "WINDOW_SEC", 1.5)
    allocator.add(7)
    async with provisioning(amqp_url, csp, create_per_minute=3, create_concurrency=8):
        await wait_until(lambda: not allocator.due)
    starts = [call["begun"] for call in await csp.calls("POST")]
    assert all(later - earlier >= 1.4 for earlier, later in zip(starts, starts[3:], strict=False))


@pytest.mark.parametrize("event", ["pool.exhausted", "allocator.newest_lease"])
async def test_an_event_wakes_the_refill(csp: Csp, allocator: Allocator, amqp_url: str, event: str) -> None:
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.all(EndCreations))
        allocator.add(2)
        await announce(amqp_url, event)
        await wait_until(lambda: len(allocator.created) == 2)


async def test_a_tick_wakes_the_refill(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with provisioning(amqp_url, csp, stock_interval_sec=0.2):
        await wait_until(lambda: allocator.all(EndCreations))
        allocator.add()
        await wait_until(lambda: allocator.created)


async def test_a_burst_of_events_causes_few_claims(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.all(EndCreations))
        monkeypatch.setattr(refill, "MIN_PAUSE_SEC", 3600)
        before = len(allocator.all(ClaimCreations))
        await announce(amqp_url, size=300)
        await wait_until(lambda: len(allocator.all(ClaimCreations)) > before)
        assert len(allocator.all(ClaimCreations)) == before + 1


async def test_the_run_ends_when_its_last_minute_is_over(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "WINDOW_SEC", 1.0)
    allocator.add()
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.all(EndCreations))
        (call,) = await csp.calls("POST")
        ended_at = next(at for at, command in allocator.received if isinstance(command, EndCreations))
    assert ended_at - call["begun"] >= 0.9
    assert allocator.leader[0] is None


async def test_another_run_takes_over_when_the_leader_lease_has_ended(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add()
    allocator.leader = (uuid.uuid4(), time.monotonic() + 3600)
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.all(ClaimCreations))
        assert allocator.created == {}
        allocator.leader = (allocator.leader[0], time.monotonic())
        await announce(amqp_url)
        await wait_until(lambda: allocator.created)


async def test_a_claim_outlasts_the_slowest_attempt(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with provisioning(amqp_url, csp, create_timeout_sec=123):
        await wait_until(lambda: allocator.all(ClaimCreations))
    assert allocator.all(ClaimCreations)[0].claim_sec > 3 * 10 + 30 + 123


async def test_an_open_circuit_breaker_claims_no_creations(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(create_error_rate=1, create_error_status=503)
    allocator.add(12)
    async with provisioning(amqp_url, csp, create_concurrency=1, circuit_breaker_timeout_sec=3600):
        await wait_until(lambda: len(allocator.all(RecordCreationFailure)) == 5)
        await wait_until(lambda: sample("broker_stock_circuit_state") == 2)
        await announce(amqp_url, size=20)
        assert len(allocator.all(ClaimCreations)) == 5


async def test_a_half_open_circuit_breaker_closes_with_a_success(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(create_error_rate=1, create_error_status=503)
    allocator.add(12)
    async with provisioning(amqp_url, csp, create_concurrency=1, circuit_breaker_timeout_sec=0.5):
        await wait_until(lambda: len(allocator.all(RecordCreationFailure)) >= 5)
        await csp.behave(create_error_rate=0)
        await wait_until(lambda: not allocator.due)
        assert sample("broker_stock_circuit_state") == 0


async def test_an_outage_of_csp_causes_no_storm_of_calls(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(create_error_rate=1, create_error_status=503)
    allocator.add(50)
    async with provisioning(
        amqp_url, csp, circuit_breaker_timeout_sec=0.5, create_backoff_base_sec=0.01, create_backoff_max_sec=0.02
    ):
        await wait_until(lambda: len(allocator.all(RecordCreationFailure)) >= 10)
    calls = await csp.calls("POST")
    # Five until the breaker opens and one more in flight; then one for each half-open time.
    for earlier, later in pairwise(calls[6:]):
        assert later["begun"] - earlier["ended"] >= 0.4


async def test_without_an_allocator_the_refill_tries_again(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    refused: list[Command] = []

    def refuse_thrice(command: Command) -> bool:
        refused.append(command)
        return len(refused) <= 3

    allocator.refuses = refuse_thrice
    allocator.add()
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.created)
    assert len({command.run_id for command in allocator.all(ClaimCreations)[:4]}) == 1


async def test_a_claim_without_a_reply_is_repeated(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim lasts for minutes, longer than this test."""
    answer = allocator.answer

    async def lose_first_reply(command: Command) -> Reply:
        reply = await answer(command)
        return REFUSED if allocator.all(ClaimCreations) == [command] else reply

    monkeypatch.setattr(allocator, "answer", lose_first_reply)
    allocator.add(2)
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: len(allocator.created) == 2)
    assert sorted(await csp.names()) == ["lab-1", "lab-2"]


# Syncs


async def test_syncs_are_requested_until_the_created_account_is_imported(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add()
    async with provisioning(amqp_url, csp, create_sync_sec=0.1):
        await wait_until(lambda: len(allocator.all(SyncPool)) >= 3)
        allocator.created.clear()  # imported
        claims = len(allocator.all(ClaimCreations))
        await announce(amqp_url)
        await wait_until(lambda: len(allocator.all(ClaimCreations)) > claims)
        requested, claims = len(allocator.all(SyncPool)), len(allocator.all(ClaimCreations))
        await announce(amqp_url)
        await wait_until(lambda: len(allocator.all(ClaimCreations)) > claims)
        assert len(allocator.all(SyncPool)) <= requested + 1


async def test_syncs_for_an_account_that_never_appears_slow_down(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.created["lab-1"] = "of an earlier run"
    allocator.awaited_sec = 40_000
    async with provisioning(amqp_url, csp, create_sync_sec=0.05):
        await wait_until(lambda: allocator.all(SyncPool))
        claims = len(allocator.all(ClaimCreations))
        await announce(amqp_url)
        await wait_until(lambda: len(allocator.all(ClaimCreations)) > claims)
        assert len(allocator.all(SyncPool)) == 1


async def test_only_the_leader_requests_syncs(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.created["lab-1"] = "of another run"
    allocator.leader = (uuid.uuid4(), time.monotonic() + 3600)
    async with provisioning(amqp_url, csp, create_sync_sec=0.05):
        await wait_until(lambda: allocator.all(ClaimCreations))
        await announce(amqp_url)
        await wait_until(lambda: len(allocator.all(ClaimCreations)) > 1)
    assert allocator.all(SyncPool) == []


# Switches


async def test_without_stock_enabled_nothing_is_claimed(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add()
    with capture_logs() as logs:
        async with provisioning(amqp_url, csp, stock_enabled=False, stock_interval_sec=0.1):
            await announce(amqp_url)
            await wait_until(lambda: any(line["event"] == "stock.disabled" for line in logs))
    assert allocator.received == []


async def test_a_dry_run_logs_the_missing_accounts_once_for_each_change(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add(2)
    with capture_logs() as logs:
        async with provisioning(amqp_url, csp, stock_dry_run=True, stock_interval_sec=0.1):
            await wait_until(lambda: len(allocator.all(ClaimCreations)) >= 3)
            allocator.add()
            claims = len(allocator.all(ClaimCreations))
            await wait_until(lambda: len(allocator.all(ClaimCreations)) >= claims + 2)
    logged = [line["names"] for line in logs if line["event"] == "stock.dry_run"]
    assert logged == [("lab-1", "lab-2"), ("lab-1", "lab-2", "lab-3")]
    assert all(command.dry_run for command in allocator.all(ClaimCreations))
    assert await csp.calls("POST") == []
