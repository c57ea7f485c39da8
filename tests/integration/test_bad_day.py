"""A quarter of an hour of failures in CSP, as it once was, played fast: nothing is left behind."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, eventually, running

WAKEFUL = str(Path(__file__).with_name("wakeful.py"))
SPEED = 120
CLASSES_END_AT_SEC = (0, 250, 400, 650, 850, 1000)
"""The last when all has begun that goes wrong on that day."""
CLASS = 30
STUDENTS = len(CLASSES_END_AT_SEC) * CLASS
FAILURES = 56
"""Calls that the script has answered with 500."""
BATCH_SIZE, BATCH_DELAY_SEC = 10, 2 / SPEED


@pytest.fixture
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    """With two reapers that both want to work, and every duration as much shorter as the day is."""
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
        running(database_url, amqp_url, settings=settings) as stack,
    ):
        await stack.start_service("reaper", name="second reaper", launcher=(WAKEFUL,))
        yield stack


def most_at_once(calls: list[dict[str, Any]]) -> int:
    changes = [(call["at"], 1) for call in calls] + [(end(call), -1) for call in calls]
    running, most = 0, 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def largest_batch(calls: list[dict[str, Any]]) -> int:
    """The most calls that began without a pause before the next."""
    largest, size, over = 0, 0, 0.0
    for call in calls:
        size = 1 if call["at"] >= over + 0.9 * BATCH_DELAY_SEC else size + 1
        largest, over = max(largest, size), max(over, end(call))
    return largest


def end(call: dict[str, Any]) -> float:
    return float(call["at"] + call["duration_ms"] / 1000)


async def come_and_go(stack: Stack, student: str) -> None:
    lease = (await stack.allocate(student)).json()
    assert (await stack.release(lease["sandbox_id"], student)).status_code == 200


@pytest.mark.timeout(400)
async def test_no_account_is_left_behind_and_nobody_has_to_look(stack: Stack) -> None:
    await stack.fill(STUDENTS)
    await stack.control("PUT", "script", {"name": "bad-day", "speed": SPEED})
    for number, at_sec in enumerate(CLASSES_END_AT_SEC):

        async def it_is_time(at_sec: float = at_sec) -> bool:
            return bool((await stack.control("GET", "script"))["elapsed_sec"] >= at_sec)

        await eventually(it_is_time)
        await asyncio.gather(*(come_and_go(stack, f"{number}-{student}") for student in range(CLASS)))

    script = await stack.control("GET", "script")
    assert script["steps_done"] == script["steps"]
    await eventually(stack.nothing_pending, within_sec=240)
    calls = sorted(await stack.deletions(), key=lambda call: float(call["at"]))
    stats = await stack.stats()
    assert (stats["deleted"], stats["deletion_failed"]) == (STUDENTS, 0)
    accounts = (await stack.control("GET", "accounts"))["accounts"]
    assert not [a for a in accounts if (a["account_type"], a["state"]) == ("sandbox", "active")]
    assert sum(call["status"] == 500 for call in calls) == FAILURES
    assert most_at_once(calls) <= 2
    assert largest_batch(calls) <= BATCH_SIZE
    await stack.assert_sound()
