"""Tests of cleanup.py and deletion.py with RabbitMQ, the CSP simulator and a stand-in for the allocator."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from devstack.conditions import wait_until
from devstack.testing import empty_queues
from reaper import cleanup, deletion, main
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import ClaimDeletions, EndCleanup, RecordDeletion, RecordDeletionFailure

from .reaper_harness import (
    Allocator,
    Csp,
    announce,
    is_empty,
    make_external_id,
    publish_burst,
    reaping,
    sample,
    simulated_csp,
)


@pytest.fixture
async def queues(amqp_url: str) -> str:
    """Empty queues. Deleting them, as clean_queues does, takes longer than most tests."""
    await empty_queues(amqp_url)
    return amqp_url


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=7) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, queues: str) -> AsyncIterator[Allocator]:
    allocator = Allocator(csp)
    async with allocator.consuming(queues):
        yield allocator


async def test_a_due_sandbox_is_deleted_in_csp_and_then_recorded(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    expected = set(allocator.due)
    before = sample("broker_cleanup_deleted_total")
    async with reaping(amqp_url, csp):
        await wait_until(lambda: not allocator.due)
    assert await csp.accounts() == {}
    assert {command.sandbox_id for command in allocator.all(RecordDeletion)} == expected
    assert allocator.gone_from_csp_when_recorded == [True] * 7
    assert [call["status"] for call in await csp.deletions()] == [204] * 7
    assert sample("broker_cleanup_deleted_total") == before + 7


async def test_a_sandbox_missing_from_csp_is_recorded_as_deleted_without_a_call(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    allocator.add("7", str(uuid.uuid4()))
    allocator.due["7"] = allocator.due["7"].model_copy(update={"missing": True})
    async with reaping(amqp_url, csp):
        await wait_until(lambda: not allocator.due)
    assert await csp.deletions() == []


@pytest.mark.parametrize("concurrency", [1, 2, 4])
async def test_concurrent_deletions_are_limited(
    csp: Csp, allocator: Allocator, amqp_url: str, concurrency: int
) -> None:
    await allocator.add_due()
    await csp.behave(delete_latency_sec=0.1)
    async with reaping(amqp_url, csp, cleanup_concurrency=concurrency):
        await wait_until(lambda: not allocator.due)
    calls = await csp.deletions()
    assert len(calls) == 7
    begins = [(call["at"], 1) for call in calls]
    ends = [(call["at"] + call["duration_ms"] / 1000, -1) for call in calls]
    running, most = 0, 0
    for _, change in sorted(begins + ends):
        running += change
        most = max(most, running)
    assert most == concurrency


async def test_pauses_between_deletions_and_batches(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await allocator.add_due()
    async with reaping(
        amqp_url,
        csp,
        cleanup_concurrency=1,
        cleanup_batch_size=3,
        cleanup_batch_delay_sec=0.3,
        cleanup_per_sandbox_delay_sec=0.1,
    ):
        await wait_until(lambda: not allocator.due)
    starts = [call["at"] for call in await csp.deletions()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert all(pause >= 0.095 for pause in pauses)
    assert all(pauses[number] >= 0.39 for number in (2, 5))  # between two batches


@pytest.mark.parametrize("delays", [(7, 0), (2, 9)])
async def test_a_claim_outlasts_the_slowest_deletion_and_its_pause(
    csp: Csp, allocator: Allocator, amqp_url: str, delays: tuple[float, float]
) -> None:
    async with reaping(amqp_url, csp, cleanup_batch_delay_sec=delays[0], cleanup_per_sandbox_delay_sec=delays[1]):
        await wait_until(lambda: allocator.all(ClaimDeletions))
    slowest = 3 * main.REQUEST_TIMEOUT_SEC + deletion.CSP_TIMEOUT_SEC + max(delays)
    assert allocator.all(ClaimDeletions)[0].claim_sec > slowest


async def test_an_account_that_is_already_gone_counts_as_deleted(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add("7", make_external_id())
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(RecordDeletion))
    assert [call["status"] for call in await csp.deletions()] == [404]


@pytest.mark.parametrize(
    ("behaviour", "named"),
    [
        ({"delete_error_status": 500}, "500"),
        ({"delete_error_status": 500, "delete_error_html": True}, "500"),
        ({"delete_error_status": 200, "delete_error_html": True}, "200"),
        ({"delete_error_status": 503}, "503"),
        ({"delete_error_status": 400}, "400"),
        ({"delete_error_status": "bomb"}, "CSP answered DELETE with more than 1048576 bytes"),
        ({"delete_error_status": "flood"}, "CSP answered DELETE with more than 1048576 bytes"),
        ({"delete_error_status": 429, "retry_after_sec": 45}, "429"),
    ],
)
async def test_a_failure_is_reported_with_a_delay(
    csp: Csp, allocator: Allocator, amqp_url: str, behaviour: dict[str, object], named: str
) -> None:
    await csp.behave(delete_error_rate=1, **behaviour)
    allocator.add("7", next(iter((await csp.accounts()).values())))
    before = sample("broker_cleanup_failed_total")
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(RecordDeletionFailure))
    (failure,) = allocator.all(RecordDeletionFailure)
    assert (failure.sandbox_id, failure.attempts) == ("7", 0)
    assert named in failure.error
    assert failure.retry_in_sec is not None
    if "retry_after_sec" in behaviour:
        assert failure.retry_in_sec == 45
    else:
        assert 30 <= failure.retry_in_sec <= 37.5
    assert sample("broker_cleanup_failed_total") == before + 1
    assert allocator.all(RecordDeletion) == []


async def test_a_hanging_csp_is_a_failure(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "CSP_TIMEOUT_SEC", 0.2)
    await csp.behave(delete_latency_sec=0.5)
    allocator.add("7", next(iter((await csp.accounts()).values())))
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(RecordDeletionFailure))
    assert "no answer" in allocator.all(RecordDeletionFailure)[0].error


async def test_failures_are_retried_with_growing_delays_until_they_succeed(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(fail_next_deletes=3)
    allocator.add("7", next(iter((await csp.accounts()).values())))
    async with reaping(amqp_url, csp, deletion_backoff_base_sec=0.05):
        await wait_until(lambda: allocator.all(RecordDeletion))
    failures = allocator.all(RecordDeletionFailure)
    assert [failure.attempts for failure in failures] == [0, 1, 2]
    delays = [failure.retry_in_sec or 0 for failure in failures]
    assert delays[0] >= 0.05
    assert delays[1] >= 0.1
    assert delays[2] >= 0.2
    starts = [call["at"] for call in await csp.deletions()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert all(pause >= delay for pause, delay in zip(pauses, delays, strict=True))


async def test_the_last_attempt_is_recorded_without_a_retry(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(delete_error_rate=1)
    allocator.add("7", next(iter((await csp.accounts()).values())), attempts=7)
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(RecordDeletionFailure) or allocator.invalid)
    assert allocator.invalid == []
    (failure,) = allocator.all(RecordDeletionFailure)
    assert (failure.attempts, failure.retry_in_sec) == (7, None)


async def test_an_invalid_external_id_fails_without_a_retry(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add("7", "../../etc")
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(RecordDeletionFailure) or allocator.invalid)
    assert [failure.retry_in_sec for failure in allocator.all(RecordDeletionFailure)] == [None]
    assert await csp.deletions() == []


async def test_a_refused_token_pauses_deletions_until_one_call_is_accepted(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    await allocator.add_due()
    with capture_logs() as logs:
        async with reaping(amqp_url, csp, circuit_breaker_timeout_sec=1):
            await wait_until(lambda: sample("broker_csp_unauthorized") == 1)
            assert "cleanup.unauthorized" in [line["event"] for line in logs if line["log_level"] == "error"]

            async def begin_times() -> list[float]:
                """Return the times of the calls, the concurrent first ones as one."""
                begun = [call["begun"] for call in await csp.deletions()]
                concurrent = sum(at - begun[0] < 0.5 for at in begun)
                assert concurrent <= 2  # CLEANUP_CONCURRENCY
                return begun[concurrent - 1 :]

            async def two_more_calls() -> bool:
                return len(await begin_times()) > 2

            for _ in range(5):  # wake-ups have no effect meanwhile
                await announce(amqp_url)
            allocator.end_claims()
            await wait_until(two_more_calls)
            # One call after each pause, however late this test looks.
            assert min(later - earlier for earlier, later in pairwise(await begin_times())) > 0.9
            await csp.behave(reject_tokens=False)
            allocator.end_claims()
            await wait_until(lambda: not allocator.due)
            assert sample("broker_csp_unauthorized") == 0
    assert allocator.all(RecordDeletionFailure) == []  # no attempt was counted
    assert "simulator-token" not in str(logs)


def take_over(allocator: Allocator) -> None:
    allocator.leader = (uuid.uuid4(), time.monotonic() + 3600)


def delete_all(allocator: Allocator) -> None:
    allocator.due.clear()
    allocator.end_claims()


def postpone_rest(allocator: Allocator) -> None:
    allocator.due_at = dict.fromkeys(allocator.due, time.monotonic() + 3600)
    allocator.leader = (None, 0)


@pytest.mark.parametrize("another_run", [take_over, delete_all, postpone_rest])
async def test_the_unauthorized_metric_resets_when_another_run_took_over(
    csp: Csp, allocator: Allocator, amqp_url: str, another_run: Callable[[Allocator], None]
) -> None:
    await csp.behave(reject_tokens=True)
    await allocator.add_due()
    async with reaping(amqp_url, csp, circuit_breaker_timeout_sec=1):
        await wait_until(lambda: sample("broker_csp_unauthorized") == 1)
        another_run(allocator)
        await wait_until(lambda: sample("broker_csp_unauthorized") == 0)


async def test_the_unauthorized_metric_stays_while_the_refused_deletion_waits(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    await allocator.add_due()
    async with reaping(amqp_url, csp, cleanup_concurrency=1, circuit_breaker_timeout_sec=1):
        await wait_until(lambda: sample("broker_csp_unauthorized") == 1)
        allocator.due_at = dict.fromkeys(allocator.due, time.monotonic() + 60)  # as long as a claim lasts
        claims = len(allocator.all(ClaimDeletions))

        def ran_again() -> bool:
            return len(allocator.all(ClaimDeletions)) > claims and isinstance(allocator.received[-1][1], EndCleanup)

        await wait_until(ran_again)
        assert sample("broker_csp_unauthorized") == 1
        await csp.behave(reject_tokens=False)
        allocator.end_claims()
        await announce(amqp_url)
        await wait_until(lambda: not allocator.due)
        assert sample("broker_csp_unauthorized") == 0


async def test_an_unrecordable_deletion_does_not_block_the_others(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    poison = next(iter(allocator.due))
    allocator.refuses = lambda command: isinstance(command, RecordDeletion) and command.sandbox_id == poison
    async with reaping(amqp_url, csp, cleanup_concurrency=1, cleanup_batch_size=2):
        await wait_until(lambda: set(allocator.due) == {poison})
        # When the claim ends, the next attempt finds the account gone in CSP and records it.
        allocator.refuses = lambda _: False
        allocator.end_claims()
        await announce(amqp_url)
        await wait_until(lambda: not allocator.due)
    assert (await csp.deletions())[-1]["status"] == 404


async def test_an_event_starts_a_run(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(ClaimDeletions))  # the first tick, without work
        await allocator.add_due()
        await announce(amqp_url)
        await wait_until(lambda: not allocator.due)


async def test_a_tick_finds_a_deletion_without_an_event(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with reaping(amqp_url, csp, cleanup_interval_sec=0.2):
        await wait_until(lambda: allocator.all(ClaimDeletions))
        await allocator.add_due()
        await wait_until(lambda: not allocator.due)


async def test_a_burst_of_ticks_causes_one_run(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await publish_burst(amqp_url, topology.TICKS, topology.CLEANUP_TICKS.name, 1000)
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(EndCleanup))
        await publish_burst(amqp_url, topology.TICKS, topology.CLEANUP_TICKS.name, 1000)
        await wait_until(partial(is_empty, amqp_url, topology.CLEANUP_TICKS))
        assert len({command.run_id for command in allocator.all(ClaimDeletions)}) == 1


async def test_a_burst_of_events_deletes_each_sandbox_once(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await allocator.add_due()
    async with reaping(amqp_url, csp):
        await publish_burst(amqp_url, topology.EVENTS, "sandbox.deletion_requested", 1000)
        await wait_until(lambda: not allocator.due)
    assert [call["status"] for call in await csp.deletions()] == [204] * 7


async def test_two_reapers_together_keep_the_throttles_of_one(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    await csp.behave(delete_latency_sec=0.05)
    throttles = {
        "cleanup_concurrency": 1,
        "cleanup_batch_size": 3,
        "cleanup_batch_delay_sec": 0.3,
        "cleanup_per_sandbox_delay_sec": 0.1,
        "cleanup_interval_sec": 0.2,  # RabbitMQ gives ticks to one reaper, events to any
    }
    async with reaping(amqp_url, csp, **throttles), reaping(amqp_url, csp, **throttles):
        for _ in range(10):
            await announce(amqp_url)
        await wait_until(lambda: not allocator.due)
    calls = await csp.deletions()
    assert [call["status"] for call in calls] == [204] * 7  # each once
    pauses = [later["at"] - earlier["at"] - earlier["duration_ms"] / 1000 for earlier, later in pairwise(calls)]
    assert all(pause >= 0.095 for pause in pauses)
    assert all(pauses[number] >= 0.39 for number in (2, 5))


async def test_a_reaper_takes_over_when_the_claim_of_a_dead_one_ends(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    ends_at = time.monotonic() + 0.5
    allocator.leader = (uuid.uuid4(), ends_at)
    async with reaping(amqp_url, csp):
        await wait_until(lambda: not allocator.due)
    assert all(call["begun"] >= ends_at for call in await csp.deletions())


async def test_deletions_continue_after_the_allocator_was_away(
    csp: Csp, queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "REQUEST_TIMEOUT_SEC", 0.2)
    monkeypatch.setattr(cleanup, "NO_REPLY_PAUSE_SEC", 0.1)
    allocator = Allocator(csp)
    await allocator.add_due()
    with capture_logs() as logs:
        async with reaping(queues, csp):
            await wait_until(lambda: "cleanup.postponed" in [line["event"] for line in logs])
            assert await csp.deletions() == []
            async with allocator.consuming(queues):
                await wait_until(lambda: not allocator.due)


async def test_a_run_that_could_not_end_continues_as_the_leader(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "NO_REPLY_PAUSE_SEC", 0.1)
    allocator.refuses = lambda command: isinstance(command, EndCleanup)
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(EndCleanup))
        allocator.refuses = lambda _: False
        await allocator.add_due()
        await announce(amqp_url)
        await wait_until(lambda: not allocator.due)


async def test_another_reaper_finishes_the_run_of_a_dead_one(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await allocator.add_due()
    await csp.behave(delete_latency_sec=0.1)
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(RecordDeletion))
    assert allocator.due
    allocator.end_run()
    await csp.behave(delete_latency_sec=0)
    async with reaping(amqp_url, csp):
        await wait_until(lambda: not allocator.due)
    assert await csp.accounts() == {}


async def test_a_stop_leaves_no_task_behind(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    before = asyncio.all_tasks()
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(ClaimDeletions))
    await wait_until(lambda: not {task for task in asyncio.all_tasks() - before if "reap" in repr(task)})
