"""Kill reapers and allocators during deletions. Afterwards, the database and CSP must agree.

KILLS sets the number of kills (100 for a long run), KILLS_SEED repeats a run.
"""

import asyncio
import os
import random
import secrets
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.crash_stack import kill_at, run_crashing_stack
from tests.integration.stack import Stack

KILLS = int(os.environ.get("KILLS", "10"))
SEED = os.environ.get("KILLS_SEED") or secrets.token_hex(4)
POINTS = [
    "reaper: after the claim",
    "reaper: before CSP",
    "reaper: after CSP",
    "reaper: after the record",
    "allocator: before ClaimDeletions",
    "allocator: after ClaimDeletions",
    "allocator: before RecordDeletion",
    "allocator: after RecordDeletion",
    "allocator: before RecordDeletionFailure",
    "allocator: after RecordDeletionFailure",
    "allocator: before the ack",
]


@pytest.fixture(scope="module")
async def crashing(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    settings = {
        "CLEANUP_INTERVAL_SEC": "1",
        "CIRCUIT_BREAKER_THRESHOLD": "100",
        "DELETION_MAX_ATTEMPTS": "30",
    }
    directory = tmp_path_factory.mktemp("crashes")
    async with run_crashing_stack(new_database, new_vhost, directory, settings) as stack:
        yield stack


async def allocate_and_release(stack: Stack, student: str) -> None:
    """Allocate and release a sandbox. Retry each request until it succeeds, because services are killed."""
    sandbox_id = ""

    async def has_lease() -> bool:
        nonlocal sandbox_id
        lease = await stack.allocate(student)
        sandbox_id = lease.json().get("sandbox_id", "")
        return lease.status_code in (200, 201)

    async def is_released() -> bool:
        return (await stack.release(sandbox_id, student)).status_code == 200

    await wait_until(has_lease, within_sec=60)
    await wait_until(is_released, within_sec=60)


@pytest.mark.timeout(60 + 30 * KILLS)
async def test_every_deletion_is_done_and_recorded_despite_kills(crashing: Stack) -> None:
    rng = random.Random(SEED)
    points = [*POINTS, *rng.choices(POINTS, k=KILLS)]
    rng.shuffle(points)
    point_file = Path(crashing.environment["DIE_AT"])
    await crashing.fill(3 * KILLS + 1)
    await crashing.control("PATCH", "behaviour", {"delete_error_rate": 0.3, "delete_latency_sec": 0.05})
    killed = 0
    for number, point in enumerate(points[:KILLS]):
        point_file.write_text(point)
        students = asyncio.gather(*(allocate_and_release(crashing, f"{number}-{student}") for student in range(3)))

        async def is_over(students: asyncio.Future[list[None]] = students) -> bool:
            return students.done() and await crashing.nothing_pending()

        killed += await kill_at(crashing, point, is_over)
        await students
    await crashing.control("PATCH", "behaviour", {"delete_error_rate": 0})
    await wait_until(crashing.nothing_pending, within_sec=120)
    await crashing.assert_sound()
    assert killed > KILLS / 2

    stats = await crashing.stats()
    assert (stats["deleted"], stats["available"], stats["deletion_failed"]) == (3 * KILLS, 1, 0), SEED
    in_csp = {record["id"].rpartition("/")[2] for record in (await crashing.control("GET", "accounts"))["accounts"]}
    rows = await crashing.database.fetch("SELECT external_id, status FROM sandboxes")
    assert {row["external_id"]: row["status"] != "deleted" for row in rows} == {
        row["external_id"]: row["external_id"] in in_csp for row in rows
    }
    calls = defaultdict(list)
    for call in await crashing.deletions():
        calls[call["path"]].append((call["at"], call["at"] + call["duration_ms"] / 1000))
    for times in calls.values():  # deletions of the same sandbox must not overlap
        assert all(end <= begin + 0.01 for (_, end), (begin, _) in pairwise(sorted(times))), SEED


async def test_a_frozen_reaper_does_not_repeat_a_deletion_that_another_took_over(crashing: Stack) -> None:
    await crashing.fill(5)
    point_file = Path(crashing.environment["DIE_AT"])
    await crashing.start_service("reaper", name="second reaper")
    reapers = [crashing.processes[name] for name in ("reaper", "second reaper")]
    try:
        point_file.write_text("reaper: after the claim, frozen")
        await allocate_and_release(crashing, "ada")

        async def is_one_frozen() -> bool:
            return not point_file.exists()

        await wait_until(is_one_frozen)
        await wait_until(crashing.nothing_pending, within_sec=60)
        (deleted,) = await crashing.deletions()
        for reaper in reapers:
            reaper.send(signal.SIGCONT)
        await asyncio.gather(*(allocate_and_release(crashing, f"student-{number}") for number in range(3)))
        await wait_until(crashing.nothing_pending)
        assert [call["path"] for call in await crashing.deletions()].count(deleted["path"]) == 1
    finally:
        for reaper in reapers:
            reaper.send(signal.SIGCONT)
        crashing.processes.pop("second reaper").kill()
