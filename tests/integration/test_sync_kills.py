"""Kill csp-syncers and allocators during syncs.

After a kill, the listing is applied completely or not at all. After the next sync, the pool matches CSP. KILLS sets
the number of kills (100 for a long run), KILLS_SEED repeats a run.
"""

import asyncio
import os
import random
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.crash_stack import run_crashing_stack
from tests.integration.stack import Stack

KILLS = int(os.environ.get("KILLS", "10"))
SEED = os.environ.get("KILLS_SEED") or secrets.token_hex(4)
COMMANDS = ("BeginListing", "StageListing", "ApplyListing", "RefreshSandboxes")
POINTS = [
    *(
        f"{service}: {when} {command}"
        for service in ("csp_syncer", "allocator")
        for when in ("before", "after")
        for command in COMMANDS
    ),
    "allocator: during ApplyListing",
    "allocator: between ApplyListing and its flags",
    "allocator: before the ack",
]
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
async def crashing(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    directory = tmp_path_factory.mktemp("crashes")
    async with run_crashing_stack(new_database, new_vhost, directory, {"ADMIN_WAIT_SEC": "5"}) as stack:
        yield stack


def change_listing(records: Records, lost: Records, rng: random.Random) -> None:
    """Remove, restore, rename and add a few records, and swap two account ids."""
    rng.shuffle(records)
    restored, removed = lost[: rng.randrange(4)], records[: rng.randrange(4)]
    lost[:] = [record for record in lost if record not in restored] + removed
    records[:] = [record for record in records if record not in removed] + restored
    for record in rng.sample(records, 5):
        record["name"] = f"renamed-{rng.randrange(10**6)}"
    first, second = rng.sample(records, 2)
    first["id"], second["id"] = second["id"], first["id"]
    newest = max(int(record["csp_id"]) for record in (*records, *lost))
    account = f"identity/accounts/{uuid.UUID(int=rng.getrandbits(128))}"
    records.append({**records[0], "csp_id": newest + 1, "id": account, "name": f"new-{newest + 1}"})


async def read_statuses(stack: Stack) -> dict[str, str]:
    rows = await stack.database.fetch("SELECT sandbox_id, status FROM sandboxes")
    return {row["sandbox_id"]: row["status"] for row in rows}


def statuses_after_sync(before: dict[str, str], records: Records) -> dict[str, str]:
    listed = {str(record["csp_id"]) for record in records}
    return {
        sandbox_id: "available" if sandbox_id in listed else "stale" for sandbox_id in sorted({*before, *listed})
    }


@pytest.mark.timeout(60 + 30 * KILLS)
async def test_a_killed_sync_is_applied_completely_or_not_at_all(crashing: Stack) -> None:
    rng = random.Random(SEED)
    points = [*POINTS, *rng.choices(POINTS, k=KILLS)]
    rng.shuffle(points)
    point_file = Path(crashing.environment["DIE_AT"])
    await crashing.fill(40)
    records: Records = [
        record
        for record in (await crashing.control("GET", "accounts"))["accounts"]
        if (record["account_type"], record["state"]) == ("sandbox", "active")
    ]
    lost: Records = []
    for point in points[:KILLS]:
        change_listing(records, lost, rng)
        await crashing.control("PUT", "accounts", {"accounts": records})
        before = dict(sorted((await read_statuses(crashing)).items()))
        expected = statuses_after_sync(before, records)
        point_file.write_text(point)
        service = point.partition(":")[0]
        request = asyncio.create_task(crashing.sync(force="true"))

        async def is_dead(service: str = service) -> bool:
            return not crashing.processes[service].running

        await wait_until(is_dead, within_sec=60)
        assert dict(sorted((await read_statuses(crashing)).items())) in (before, expected), (SEED, point)
        await crashing.forget_allocators()
        await crashing.start_service(service)
        await asyncio.wait([request])

        async def sync_succeeds() -> bool:
            try:
                return (await crashing.sync(force="true")).status_code == 200
            except httpx.HTTPError:
                return False

        await wait_until(sync_succeeds, within_sec=60)
        rows = await crashing.database.fetch("SELECT * FROM sandboxes WHERE status = 'available'")
        assert {row["sandbox_id"]: (row["name"], row["external_id"]) for row in rows} == {
            str(record["csp_id"]): (record["name"], record["id"].rpartition("/")[2]) for record in records
        }, (SEED, point)
        assert dict(sorted((await read_statuses(crashing)).items())) == expected, (SEED, point)
    await crashing.assert_sound()


async def test_a_long_sync_returns_202_and_continues_as_a_job(crashing: Stack) -> None:
    await crashing.fill(50)
    await crashing.control("PATCH", "behaviour", {"listing_latency_sec": 6})
    accepted = await crashing.sync()
    assert accepted.status_code == 202
    path = accepted.headers["Location"].removeprefix("/v1/admin/")

    async def is_completed() -> bool:
        return bool((await crashing.admin("GET", path)).json()["state"] == "completed")

    await wait_until(is_completed)
    job = (await crashing.admin("GET", path)).json()
    assert job["progress"]["staged"] == job["result"]["synced"] == 50
