"""Replay of a real CSP incident of 15 minutes, accelerated, and accounts that CSP never deletes."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, run_stack

POLLING_REAPER = str(Path(__file__).with_name("polling_reaper.py"))
SPEED = 120
CLASSES_END_AT_SEC = (0, 250, 400, 650, 850, 1000)
"""The last class ends after the last failure of the script has begun."""
CLASS_SIZE = 30
UNDELETABLE, DELETABLE = 60, 20
STUDENTS = len(CLASSES_END_AT_SEC) * CLASS_SIZE
FAILURES = 56
"""Number of calls to which the script responds with 500."""
BATCH_SIZE, BATCH_DELAY_SEC = 10, 2 / SPEED


@pytest.fixture
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    """Broker with two active reapers. All durations are shortened by the factor SPEED."""
    settings = {
        "CLEANUP_INTERVAL_SEC": str(300 / SPEED),
        "CLEANUP_BATCH_DELAY_SEC": str(BATCH_DELAY_SEC),
        "DELETION_BACKOFF_BASE_SEC": str(30 / SPEED),
        "DELETION_BACKOFF_MAX_SEC": str(3600 / SPEED),
        "CIRCUIT_BREAKER_TIMEOUT_SEC": str(60 / SPEED),
    }
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=settings) as stack,
    ):
        await stack.start_service("reaper", name="second reaper", launcher=(POLLING_REAPER,))
        yield stack


def max_concurrent_calls(calls: list[dict[str, Any]]) -> int:
    changes = [(call["at"], 1) for call in calls] + [(end_time(call), -1) for call in calls]
    running, maximum = 0, 0
    for _, change in sorted(changes):
        running += change
        maximum = max(maximum, running)
    return maximum


def largest_batch(calls: list[dict[str, Any]]) -> int:
    """Return the largest number of calls without a batch delay between them."""
    largest, size, last_end = 0, 0, 0.0
    for call in calls:
        size = 1 if call["at"] >= last_end + 0.9 * BATCH_DELAY_SEC else size + 1
        largest, last_end = max(largest, size), max(last_end, end_time(call))
    return largest


def end_time(call: dict[str, Any]) -> float:
    return float(call["at"] + call["duration_ms"] / 1000)


async def allocate_and_release(stack: Stack, student: str) -> None:
    lease = (await stack.allocate(student)).json()
    assert (await stack.release(lease["sandbox_id"], student)).status_code == 200


@pytest.mark.timeout(400)
async def test_every_account_is_deleted_without_intervention(stack: Stack) -> None:
    await stack.fill(STUDENTS)
    await stack.control("PUT", "script", {"name": "bad-day", "speed": SPEED})
    for number, at_sec in enumerate(CLASSES_END_AT_SEC):

        async def has_class_ended(at_sec: float = at_sec) -> bool:
            return bool((await stack.control("GET", "script"))["elapsed_sec"] >= at_sec)

        await wait_until(has_class_ended)
        await asyncio.gather(*(allocate_and_release(stack, f"{number}-{student}") for student in range(CLASS_SIZE)))

    script = await stack.control("GET", "script")
    assert script["steps_done"] == script["steps"]
    await wait_until(stack.nothing_pending, within_sec=240)
    calls = sorted(await stack.deletions(), key=lambda call: float(call["at"]))
    stats = await stack.stats()
    assert (stats["deleted"], stats["deletion_failed"]) == (STUDENTS, 0)
    accounts = (await stack.control("GET", "accounts"))["accounts"]
    assert not [a for a in accounts if (a["account_type"], a["state"]) == ("sandbox", "active")]
    assert sum(call["status"] == 500 for call in calls) == FAILURES
    assert max_concurrent_calls(calls) <= 2
    assert largest_batch(calls) <= BATCH_SIZE
    await stack.assert_sound()


@pytest.mark.timeout(200)
async def test_undeletable_accounts_do_not_delay_the_deletion_of_others(stack: Stack) -> None:
    await stack.fill(UNDELETABLE + 2 * DELETABLE)
    await stack.control("PATCH", "behaviour", {"delete_latency_sec": 0.1})
    leases = [(await stack.allocate(f"student-{number}")).json() for number in range(UNDELETABLE + 2 * DELETABLE)]
    alone, undeletable, others = leases[:DELETABLE], leases[DELETABLE:-DELETABLE], leases[-DELETABLE:]
    await stack.control("PATCH", "behaviour", {"undeletable": [lease["external_id"] for lease in undeletable]})

    async def release(released: list[dict[str, Any]]) -> float:
        for lease in released:
            student = f"student-{leases.index(lease)}"
            assert (await stack.release(lease["sandbox_id"], student)).status_code == 200
        return time.time()

    async def delete(released: list[dict[str, Any]]) -> float:
        """Release the sandboxes. Return the time until CSP has deleted the last of them."""
        released_at, ids = await release(released), [lease["sandbox_id"] for lease in released]

        async def are_deleted() -> bool:
            count = "SELECT count(*) FROM sandboxes WHERE sandbox_id = ANY($1) AND status = 'deleted'"
            return bool(await stack.database.fetchval(count, ids) == len(ids))

        await wait_until(are_deleted)
        return time.time() - released_at

    alone_sec = await delete(alone)
    blocked_since = await release(undeletable)
    others_sec = await delete(others)
    calls = [call for call in await stack.deletions() if call["at"] > blocked_since]
    last_success = max(end_time(call) for call in calls if call["status"] == 204)
    failures = [call for call in calls if call["status"] == 500 and call["at"] < last_success]
    assert len(failures) < DELETABLE, f"alone {alone_sec:.1f} s, behind failing ones {others_sec:.1f} s"
