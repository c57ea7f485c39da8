"""Deletions: from what is due to what CSP did, and what the allocator is told of it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from reaper import asking, cleanup, deletion, main
from sandbox_broker import topology
from sandbox_broker.messages import ClaimDeletions, EndCleanup, RecordDeletion, RecordDeletionFailure

from .reaper_harness import (
    Allocator,
    Csp,
    announce,
    any_external_id,
    emptied,
    reaping,
    sample,
    simulated_csp,
    storm,
    until,
    waiting,
)


@pytest.fixture
async def queues(amqp_url: str) -> str:
    """All empty; deleting them, as clean_queues does, would take longer than most tests."""
    await emptied(amqp_url)
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


async def test_what_is_due_is_deleted_in_csp_and_only_then_recorded(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    expected = set(allocator.due)
    before = sample("broker_cleanup_deleted_total")
    async with reaping(amqp_url, csp):
        await until(lambda: not allocator.due)
    assert await csp.accounts() == {}
    assert {command.sandbox_id for command in allocator.all(RecordDeletion)} == expected
    assert allocator.gone_from_csp_when_recorded == [True] * 7
    assert [call["status"] for call in await csp.deletions()] == [204] * 7
    assert sample("broker_cleanup_deleted_total") == before + 7


async def test_what_csp_no_longer_lists_is_recorded_as_deleted_without_asking_csp(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    allocator.add("7", str(uuid.uuid4()))
    allocator.due["7"] = allocator.due["7"].model_copy(update={"missing": True})
    async with reaping(amqp_url, csp):
        await until(lambda: not allocator.due)
    assert await csp.deletions() == []


@pytest.mark.parametrize("concurrency", [1, 2, 4])
async def test_no_more_deletions_run_at_once_than_allowed(
    csp: Csp, allocator: Allocator, amqp_url: str, concurrency: int
) -> None:
    await allocator.add_due()
    await csp.behave(delete_latency_sec=0.1)
    async with reaping(amqp_url, csp, cleanup_concurrency=concurrency):
        await until(lambda: not allocator.due)
    calls = await csp.deletions()
    assert len(calls) == 7
    begins = [(call["at"], 1) for call in calls]
    ends = [(call["at"] + call["duration_ms"] / 1000, -1) for call in calls]
    running, most = 0, 0
    for _, change in sorted(begins + ends):
        running += change
        most = max(most, running)
    assert most == concurrency


async def test_batches_and_delays_are_kept(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await allocator.add_due()
    async with reaping(
        amqp_url,
        csp,
        cleanup_concurrency=1,
        cleanup_batch_size=3,
        cleanup_batch_delay_sec=0.3,
        cleanup_per_sandbox_delay_sec=0.1,
    ):
        await until(lambda: not allocator.due)
    starts = [call["at"] for call in await csp.deletions()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert all(pause >= 0.095 for pause in pauses)
    assert all(pauses[number] >= 0.39 for number in (2, 5))  # between two batches


@pytest.mark.parametrize("delays", [(7, 0), (2, 9)])
async def test_a_claim_outlasts_the_slowest_deletion_and_the_pause_after_it(
    csp: Csp, allocator: Allocator, amqp_url: str, delays: tuple[float, float]
) -> None:
    async with reaping(amqp_url, csp, cleanup_batch_delay_sec=delays[0], cleanup_per_sandbox_delay_sec=delays[1]):
        await until(lambda: allocator.all(ClaimDeletions))
    slowest = 3 * asking.REQUEST_TIMEOUT_SEC + deletion.CSP_TIMEOUT_SEC + max(delays)
    assert allocator.all(ClaimDeletions)[0].claim_sec > slowest


async def test_an_account_that_is_gone_already_counts_as_deleted(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add("7", any_external_id())
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(RecordDeletion))
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
        await until(lambda: allocator.all(RecordDeletionFailure))
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


async def test_csp_that_hangs_is_a_failure(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "CSP_TIMEOUT_SEC", 0.2)
    await csp.behave(delete_latency_sec=0.5)
    allocator.add("7", next(iter((await csp.accounts()).values())))
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(RecordDeletionFailure))
    assert "no answer" in allocator.all(RecordDeletionFailure)[0].error


async def test_failures_are_tried_again_by_themselves_later_and_later_until_they_succeed(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(fail_next_deletes=3)
    allocator.add("7", next(iter((await csp.accounts()).values())))
    async with reaping(amqp_url, csp, deletion_backoff_base_sec=0.05):
        await until(lambda: allocator.all(RecordDeletion))
    failures = allocator.all(RecordDeletionFailure)
    assert [failure.attempts for failure in failures] == [0, 1, 2]
    delays = [failure.retry_in_sec or 0 for failure in failures]
    assert delays[0] >= 0.05
    assert delays[1] >= 0.1
    assert delays[2] >= 0.2
    starts = [call["at"] for call in await csp.deletions()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert all(pause >= delay for pause, delay in zip(pauses, delays, strict=True))


async def test_the_last_attempt_asks_for_no_other(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(delete_error_rate=1)
    allocator.add("7", next(iter((await csp.accounts()).values())), attempts=7)
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(RecordDeletionFailure) or allocator.invalid)
    assert allocator.invalid == []
    (failure,) = allocator.all(RecordDeletionFailure)
    assert (failure.attempts, failure.retry_in_sec) == (7, None)


async def test_an_external_id_that_is_none_is_given_up_at_once(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add("7", "../../etc")
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(RecordDeletionFailure) or allocator.invalid)
    assert [failure.retry_in_sec for failure in allocator.all(RecordDeletionFailure)] == [None]
    assert await csp.deletions() == []


async def test_a_refused_token_stops_all_deletions_until_one_probe_finds_it_accepted(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    await allocator.add_due()
    with capture_logs() as logs:
        async with reaping(amqp_url, csp, circuit_breaker_timeout_sec=1):
            await until(lambda: sample("broker_csp_unauthorized") == 1)
            refused = await csp.deletions()
            assert len(refused) <= 2  # as many as run at once
            assert "cleanup.unauthorized" in [line["event"] for line in logs if line["log_level"] == "error"]
            for _ in range(5):  # whatever wakes it meanwhile
                await announce(amqp_url)
            allocator.claims_end()
            await until(lambda: sample("broker_circuit_state") == 1)
            assert len(await csp.deletions()) <= len(refused) + 1
            await csp.behave(reject_tokens=False)
            allocator.claims_end()
            await until(lambda: not allocator.due)
            assert sample("broker_csp_unauthorized") == 0
    assert allocator.all(RecordDeletionFailure) == []  # no attempt was used up
    assert "simulator-token" not in str(logs)


def takes_over(allocator: Allocator) -> None:
    allocator.on_duty = (uuid.uuid4(), time.monotonic() + 3600)


def deletes_all(allocator: Allocator) -> None:
    allocator.due.clear()
    allocator.claims_end()


def leaves_some_for_later(allocator: Allocator) -> None:
    allocator.due_at = dict.fromkeys(allocator.due, time.monotonic() + 3600)
    allocator.on_duty = (None, 0)


@pytest.mark.parametrize("another_run", [takes_over, deletes_all, leaves_some_for_later])
async def test_a_refused_token_is_no_longer_told_by_a_reaper_whose_work_another_has_taken(
    csp: Csp, allocator: Allocator, amqp_url: str, another_run: Callable[[Allocator], None]
) -> None:
    await csp.behave(reject_tokens=True)
    await allocator.add_due()
    async with reaping(amqp_url, csp, circuit_breaker_timeout_sec=1):
        await until(lambda: sample("broker_csp_unauthorized") == 1)
        another_run(allocator)
        await until(lambda: sample("broker_csp_unauthorized") == 0)


async def test_a_refused_token_is_told_as_long_as_what_was_refused_waits(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    await allocator.add_due()
    async with reaping(amqp_url, csp, cleanup_concurrency=1, circuit_breaker_timeout_sec=1):
        await until(lambda: sample("broker_csp_unauthorized") == 1)
        allocator.due_at = dict.fromkeys(allocator.due, time.monotonic() + 60)  # as long as a claim lasts
        claims = len(allocator.all(ClaimDeletions))

        def looked_again() -> bool:
            return len(allocator.all(ClaimDeletions)) > claims and isinstance(allocator.heard[-1][1], EndCleanup)

        await until(looked_again)
        assert sample("broker_csp_unauthorized") == 1
        await csp.behave(reject_tokens=False)
        allocator.claims_end()
        await announce(amqp_url)
        await until(lambda: not allocator.due)
        assert sample("broker_csp_unauthorized") == 0


async def test_one_deletion_that_cannot_be_recorded_does_not_hold_up_the_others(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    poison = next(iter(allocator.due))
    allocator.refuses = lambda command: isinstance(command, RecordDeletion) and command.sandbox_id == poison
    async with reaping(amqp_url, csp, cleanup_concurrency=1, cleanup_batch_size=2):
        await until(lambda: set(allocator.due) == {poison})
        # Nothing is lost: when its claim ends it is found gone in CSP, and recorded.
        allocator.refuses = lambda _: False
        allocator.claims_end()
        await announce(amqp_url)
        await until(lambda: not allocator.due)
    assert (await csp.deletions())[-1]["status"] == 404


async def test_an_event_wakes_it_at_once(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(ClaimDeletions))  # the first tick, with nothing to do
        await allocator.add_due()
        await announce(amqp_url)
        await until(lambda: not allocator.due)


async def test_a_tick_finds_what_no_event_announced(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with reaping(amqp_url, csp, cleanup_interval_sec=0.2):
        await until(lambda: allocator.all(ClaimDeletions))
        await allocator.add_due()
        await until(lambda: not allocator.due)


async def test_a_storm_of_ticks_costs_one_run(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await storm(amqp_url, topology.TICKS, topology.CLEANUP_TICKS.name, 1000)
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(EndCleanup))
        await storm(amqp_url, topology.TICKS, topology.CLEANUP_TICKS.name, 1000)
        async with asyncio.timeout(20):
            while await waiting(amqp_url, topology.CLEANUP_TICKS):  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(0.01)
        assert len({command.run_id for command in allocator.all(ClaimDeletions)}) == 1


async def test_a_storm_of_events_deletes_nothing_twice(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await allocator.add_due()
    async with reaping(amqp_url, csp):
        await storm(amqp_url, topology.EVENTS, "sandbox.deletion_requested", 1000)
        await until(lambda: not allocator.due)
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
        "cleanup_interval_sec": 0.2,  # ticks go to one of them, events to any
    }
    async with reaping(amqp_url, csp, **throttles), reaping(amqp_url, csp, **throttles):
        for _ in range(10):
            await announce(amqp_url)
        await until(lambda: not allocator.due)
    calls = await csp.deletions()
    assert [call["status"] for call in calls] == [204] * 7  # none twice
    pauses = [later["at"] - earlier["at"] - earlier["duration_ms"] / 1000 for earlier, later in pairwise(calls)]
    assert all(pause >= 0.095 for pause in pauses)
    assert all(pauses[number] >= 0.39 for number in (2, 5))


async def test_a_reaper_beside_one_that_died_on_duty_begins_when_its_claim_ends(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    allocator.on_duty = (uuid.uuid4(), time.monotonic() + 0.5)
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(ClaimDeletions))
        assert await csp.deletions() == []
        await until(lambda: not allocator.due)


async def test_an_allocator_that_does_not_answer_loses_nothing(
    csp: Csp, queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "REQUEST_TIMEOUT_SEC", 0.2)
    monkeypatch.setattr(cleanup, "NO_ANSWER_PAUSE_SEC", 0.1)
    allocator = Allocator(csp)
    await allocator.add_due()
    with capture_logs() as logs:
        async with reaping(queues, csp):
            await until(lambda: "cleanup.postponed" in [line["event"] for line in logs])
            assert await csp.deletions() == []
            async with allocator.consuming(queues):
                await until(lambda: not allocator.due)


async def test_a_run_that_could_not_end_goes_on_and_does_not_wait_for_its_own_duty(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "NO_ANSWER_PAUSE_SEC", 0.1)
    allocator.refuses = lambda command: isinstance(command, EndCleanup)
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(EndCleanup))
        allocator.refuses = lambda _: False
        await allocator.add_due()
        await announce(amqp_url)
        await until(lambda: not allocator.due)


async def test_a_reaper_that_dies_in_the_middle_leaves_the_rest_to_the_next(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await allocator.add_due()
    await csp.behave(delete_latency_sec=0.1)
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(RecordDeletion))
    assert allocator.due
    allocator.run_dies()
    await csp.behave(delete_latency_sec=0)
    async with reaping(amqp_url, csp):
        await until(lambda: not allocator.due)
    assert await csp.accounts() == {}


async def test_a_reaper_that_stops_leaves_no_task_behind(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    before = asyncio.all_tasks()
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(ClaimDeletions))
    await until(lambda: not {task for task in asyncio.all_tasks() - before if "reap" in repr(task)})
