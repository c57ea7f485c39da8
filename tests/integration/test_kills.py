"""Reapers and allocators are killed in the middle of deletions: afterwards database and CSP agree.

KILLS=100 makes a long run of it, KILLS_SEED repeats one.
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

from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, eventually, running

LAUNCHER = str(Path(__file__).with_name("dying.py"))
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
async def dying(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    told = tmp_path_factory.mktemp("dying") / "point"
    settings = {
        "DIE_AT": str(told),
        "CLEANUP_INTERVAL_SEC": "1",
        "CIRCUIT_BREAKER_THRESHOLD": "100",
        "DELETION_MAX_ATTEMPTS": "30",
    }
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(database_url, amqp_url, launcher=(LAUNCHER,), settings=settings) as stack,
    ):
        yield stack


async def insist(stack: Stack, student: str) -> None:
    """A student who takes a sandbox and gives it back, whatever dies meanwhile."""
    sandbox_id = ""

    async def leased() -> bool:
        nonlocal sandbox_id
        lease = await stack.allocate(student)
        sandbox_id = lease.json().get("sandbox_id", "")
        return lease.status_code in (200, 201)

    async def released() -> bool:
        return (await stack.release(sandbox_id, student)).status_code == 200

    await eventually(leased, within_sec=60)
    await eventually(released, within_sec=60)


@pytest.mark.timeout(60 + 30 * KILLS)
async def test_whoever_dies_wherever_every_deletion_happens_and_is_recorded(dying: Stack) -> None:
    chance = random.Random(SEED)
    points = [*POINTS, *chance.choices(POINTS, k=KILLS)]
    chance.shuffle(points)
    told = Path(dying.environment["DIE_AT"])
    await dying.fill(3 * KILLS + 1)
    await dying.control("PATCH", "behaviour", {"delete_error_rate": 0.3, "delete_latency_sec": 0.05})
    killed = 0
    for number, point in enumerate(points[:KILLS]):
        told.write_text(point)
        students = asyncio.gather(*(insist(dying, f"{number}-{student}") for student in range(3)))
        service = point.partition(":")[0]

        async def dead_or_done(service: str = service, students: asyncio.Future[list[None]] = students) -> bool:
            dead = not dying.processes[service].running
            return dead or (students.done() and await dying.nothing_pending())

        await eventually(dead_or_done, within_sec=60)
        told.unlink(missing_ok=True)
        if not dying.processes[service].running:
            killed += 1
            await dying.start_service(service)
        await students
    await dying.control("PATCH", "behaviour", {"delete_error_rate": 0})
    await eventually(dying.nothing_pending, within_sec=120)
    await dying.assert_sound()
    assert killed > KILLS / 2

    stats = await dying.stats()
    assert (stats["deleted"], stats["available"], stats["deletion_failed"]) == (3 * KILLS, 1, 0), SEED
    in_csp = {record["id"].rpartition("/")[2] for record in (await dying.control("GET", "accounts"))["accounts"]}
    rows = await dying.database.fetch("SELECT external_id, status FROM sandboxes")
    assert {row["external_id"]: row["status"] != "deleted" for row in rows} == {
        row["external_id"]: row["external_id"] in in_csp for row in rows
    }
    calls = defaultdict(list)
    for call in await dying.deletions():
        calls[call["path"]].append((call["at"], call["at"] + call["duration_ms"] / 1000))
    for times in calls.values():  # never two at one sandbox
        assert all(end <= begin + 0.01 for (_, end), (begin, _) in pairwise(sorted(times))), SEED


async def test_a_reaper_that_wakes_up_after_another_has_taken_over_deletes_nothing_more(dying: Stack) -> None:
    await dying.fill(5)
    told = Path(dying.environment["DIE_AT"])
    await dying.start_service("reaper", name="second reaper")
    reapers = [dying.processes[name] for name in ("reaper", "second reaper")]
    try:
        told.write_text("reaper: after the claim, frozen")
        await insist(dying, "ada")

        async def one_is_frozen() -> bool:
            return not told.exists()

        await eventually(one_is_frozen)
        await eventually(dying.nothing_pending, within_sec=60)
        (deleted,) = await dying.deletions()
        for reaper in reapers:
            reaper.send(signal.SIGCONT)
        await asyncio.gather(*(insist(dying, f"student-{number}") for number in range(3)))
        await eventually(dying.nothing_pending)
        assert [call["path"] for call in await dying.deletions()].count(deleted["path"]) == 1
    finally:
        for reaper in reapers:
            reaper.send(signal.SIGCONT)
        dying.processes.pop("second reaper").kill()
