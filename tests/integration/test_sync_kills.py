"""Csp-syncers and allocators are killed in the middle of syncs: the pool is as before or as after, and then as CSP.

KILLS=100 makes a long run of it, KILLS_SEED repeats one.
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

from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, eventually, running

LAUNCHER = str(Path(__file__).with_name("dying.py"))
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
    "allocator: amid ApplyListing",
    "allocator: between ApplyListing and its flags",
    "allocator: before the ack",
]
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
async def dying(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    settings = {"DIE_AT": str(tmp_path_factory.mktemp("dying") / "point"), "ADMIN_WAIT_SEC": "5"}
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(database_url, amqp_url, launcher=(LAUNCHER,), settings=settings) as stack,
    ):
        yield stack


def changed(records: Records, lost: Records, chance: random.Random) -> None:
    """What may happen to a listing, a little of each."""
    chance.shuffle(records)
    back, gone = lost[: chance.randrange(4)], records[: chance.randrange(4)]
    lost[:] = [record for record in lost if record not in back] + gone
    records[:] = [record for record in records if record not in gone] + back
    for record in chance.sample(records, 5):
        record["name"] = f"renamed-{chance.randrange(10**6)}"
    one, other = chance.sample(records, 2)
    one["id"], other["id"] = other["id"], one["id"]
    newest = max(int(record["csp_id"]) for record in (*records, *lost))
    account = f"identity/accounts/{uuid.UUID(int=chance.getrandbits(128))}"
    records.append({**records[0], "csp_id": newest + 1, "id": account, "name": f"new-{newest + 1}"})


async def states(stack: Stack) -> dict[str, str]:
    rows = await stack.database.fetch("SELECT sandbox_id, status FROM sandboxes")
    return {row["sandbox_id"]: row["status"] for row in rows}


def after(before: dict[str, str], records: Records) -> dict[str, str]:
    listed = {str(record["csp_id"]) for record in records}
    return {
        sandbox_id: "available" if sandbox_id in listed else "stale" for sandbox_id in sorted({*before, *listed})
    }


@pytest.mark.timeout(60 + 30 * KILLS)
async def test_whoever_dies_wherever_the_pool_is_as_before_or_as_after_and_ends_like_csp(dying: Stack) -> None:
    chance = random.Random(SEED)
    points = [*POINTS, *chance.choices(POINTS, k=KILLS)]
    chance.shuffle(points)
    told = Path(dying.environment["DIE_AT"])
    await dying.fill(40)
    records: Records = [
        record
        for record in (await dying.control("GET", "accounts"))["accounts"]
        if (record["account_type"], record["state"]) == ("sandbox", "active")
    ]
    lost: Records = []
    for point in points[:KILLS]:
        changed(records, lost, chance)
        await dying.control("PUT", "accounts", {"accounts": records})
        before = dict(sorted((await states(dying)).items()))
        expected = after(before, records)
        told.write_text(point)
        service = point.partition(":")[0]
        asked = asyncio.create_task(dying.sync(force="true"))

        async def dead(service: str = service) -> bool:
            return not dying.processes[service].running

        await eventually(dead, within_sec=60)
        assert dict(sorted((await states(dying)).items())) in (before, expected), (SEED, point)
        await dying.start_service(service)
        await asyncio.wait([asked])

        async def synced() -> bool:
            try:
                return (await dying.sync(force="true")).status_code == 200
            except httpx.HTTPError:
                return False

        await eventually(synced, within_sec=60)
        rows = await dying.database.fetch("SELECT * FROM sandboxes WHERE status = 'available'")
        assert {row["sandbox_id"]: (row["name"], row["external_id"]) for row in rows} == {
            str(record["csp_id"]): (record["name"], record["id"].rpartition("/")[2]) for record in records
        }, (SEED, point)
        assert dict(sorted((await states(dying)).items())) == expected, (SEED, point)
    await dying.assert_sound()


async def test_a_sync_that_takes_longer_than_one_waits_is_a_job_to_ask_after(dying: Stack) -> None:
    await dying.fill(50)
    await dying.control("PATCH", "behaviour", {"listing_latency_sec": 6})
    begun = await dying.sync()
    assert begun.status_code == 202
    path = begun.headers["Location"].removeprefix("/v1/admin/")

    async def completed() -> bool:
        return bool((await dying.admin("GET", path)).json()["state"] == "completed")

    await eventually(completed)
    job = (await dying.admin("GET", path)).json()
    assert job["progress"]["staged"] == job["result"]["synced"] == 50
