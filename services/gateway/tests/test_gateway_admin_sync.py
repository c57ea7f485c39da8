"""The admin routes about CSP's listing."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from gateway.queries import leaks
from sandbox_broker.contract.commands import Command, DeleteStale, PurgeRecords
from sandbox_broker.contract.replies import Purged, Reply

from .gateway_harness import ADMIN, Gateway, detail, refuse, running


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


async def get(gateway: Gateway, path: str) -> dict[str, Any]:
    response = await gateway.client.get(path, headers=ADMIN)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def listing(database: asyncpg.Connection, ended: str, outcome: dict[str, Any]) -> int:
    """One that was begun at 1728054123 and has ended seven seconds later."""
    listing_id: int = await database.fetchval(
        f"INSERT INTO csp_listings (begun_at, {ended}, outcome) "
        "VALUES (to_timestamp(1728054123.9), to_timestamp(1728054130.9), $1) RETURNING listing_id",
        json.dumps(outcome),
    )
    return listing_id


APPLIED = {"synced": 5, "discovered": 4, "restored": 3, "marked_stale": 2, "reopened": 1, "leaked": 6}
CHANGE = {"count": 30, "examples": [{"sandbox_id": "7", "name": "sandbox-7"}]}
HELD = {"reason": "because", **dict.fromkeys(("stale", "missing", "moved", "discovered", "restored"), CHANGE)}


async def test_before_the_first_sync_there_is_nothing_to_tell(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await database.execute("INSERT INTO csp_listings DEFAULT VALUES")  # has begun
    assert await get(gateway, "/v1/admin/sync") == {"applied": None, "held": None}
    assert await get(gateway, "/v1/admin/leaks") == {"leaks": [], "count": 0, "cursor": None, "listed_at": None}


async def test_a_held_listing_is_shown_until_a_later_one_is_applied(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    times = {"begun_at": 1728054123}
    first = await listing(database, "applied_at", APPLIED)
    applied = {"listing_id": first, **times, "applied_at": 1728054130, **APPLIED}
    assert await get(gateway, "/v1/admin/sync") == {"applied": applied, "held": None}
    second = await listing(database, "held_at", HELD)
    held = {"listing_id": second, **times, "held_at": 1728054130, **HELD}
    assert await get(gateway, "/v1/admin/sync") == {"applied": applied, "held": held}
    third = await listing(database, "applied_at", APPLIED)
    assert await get(gateway, "/v1/admin/sync") == {"applied": {**applied, "listing_id": third}, "held": None}


async def leaky(database: asyncpg.Connection) -> None:
    """1 to 6: known and fine; unknown; deleted long ago; just deleted; missing; on its way out. 7: unreadable."""
    await listing(database, "applied_at", APPLIED)
    await listing(database, "held_at", HELD)
    await database.execute(
        "INSERT INTO csp_accounts (listing_id, sandbox_id, external_id, name) "
        "SELECT min(listing_id), id, 'account-' || id, 'name-' || id FROM csp_listings, unnest($1::text[]) AS id "
        "GROUP BY id",
        ["1", "2", "3", "4"],
    )
    await database.execute(
        "INSERT INTO csp_accounts (listing_id, sandbox_id) SELECT min(listing_id), '7' FROM csp_listings"
    )
    await database.execute(  # staged for the one that is held
        "INSERT INTO csp_accounts (listing_id, sandbox_id, external_id, name) "
        "SELECT max(listing_id), '8', 'account-8', 'name-8' FROM csp_listings"
    )
    for sandbox_id, status, since, missing in (
        ("1", "available", 1728000000, None),
        ("3", "deleted", 1728000000, None),
        ("4", "deleted", 1728054100, None),
        ("5", "allocated", 1728000000, 1728000007),
        ("6", "pending_deletion", 1728000000, 1728000007),
    ):
        await database.execute(
            "INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since, missing_since) "
            "VALUES ($1, 'account-' || $1, 'name-' || $1, $2, to_timestamp($3), to_timestamp($4))",
            sandbox_id,
            status,
            since,
            missing,
        )


def leak(sandbox_id: str, kind: str, since: int | None) -> dict[str, Any]:
    return {
        "sandbox_id": sandbox_id,
        "external_id": f"account-{sandbox_id}",
        "name": f"name-{sandbox_id}",
        "kind": kind,
        "since": since,
    }


LEAKS = [leak("2", "unknown", None), leak("3", "deleted", 1728000000), leak("5", "missing", 1728000007)]


async def test_leaks_are_what_is_in_csp_and_not_here_and_what_is_held_here_and_not_in_csp(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await leaky(database)
    assert await get(gateway, "/v1/admin/leaks") == {
        "leaks": LEAKS,
        "count": 3,
        "cursor": None,
        "listed_at": 1728054123,
    }


async def test_leaks_come_in_pages(gateway: Gateway, database: asyncpg.Connection) -> None:
    await leaky(database)
    first = await get(gateway, "/v1/admin/leaks?limit=2")
    assert (first["leaks"], first["count"]) == (LEAKS[:2], 2)
    second = await get(gateway, f"/v1/admin/leaks?limit=2&cursor={first['cursor']}")
    assert (second["leaks"], second["cursor"]) == (LEAKS[2:], None)


async def test_a_page_of_leaks_looks_at_so_many_accounts_at_most(
    gateway: Gateway, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "LOOK", 1)
    await leaky(database)
    shown, cursor, requests = [], "", 0
    while cursor is not None:
        page = await get(gateway, f"/v1/admin/leaks?cursor={cursor}")
        shown += page["leaks"]
        cursor, requests = page["cursor"], requests + 1
    assert shown == LEAKS
    assert requests > len(LEAKS)


@pytest.mark.parametrize("cursor", ["3", "%00", "x" * 129])
async def test_a_cursor_that_is_none_of_ours_is_400(
    gateway: Gateway, database: asyncpg.Connection, cursor: str
) -> None:
    await leaky(database)
    response = await gateway.client.get(f"/v1/admin/leaks?cursor={cursor}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR")


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", f"cursor={'x' * 2049}"])
async def test_a_page_that_cannot_be_is_400(gateway: Gateway, query: str) -> None:
    response = await gateway.client.get(f"/v1/admin/leaks?{query}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("auto-delete-stale", DeleteStale(stale_for_sec=24 * 3600, limit=500)),
        ("auto-delete-stale?grace_period_hours=0.5", DeleteStale(stale_for_sec=1800, limit=500)),
        ("bulk-delete?status=stale", PurgeRecords(status="stale", limit=500)),
        ("bulk-delete?status=deletion_failed", PurgeRecords(status="deletion_failed", limit=500)),
    ],
)
async def test_a_purge_goes_on_until_nothing_is_left(gateway: Gateway, path: str, command: Command) -> None:
    left = [500, 500, 3]

    async def purge(_: Command) -> Reply:
        return Purged(count=left.pop(0))

    gateway.maintenance.answer = purge
    response = await gateway.client.post(f"/v1/admin/{path}", headers=ADMIN)
    assert response.status_code == 200
    assert {**response.json(), "duration_ms": 0} == {"status": "completed", "deleted": 1003, "duration_ms": 0}
    told = command.model_copy(update={"request_id": response.headers["X-Request-ID"]})
    assert gateway.maintenance.commands == 3 * [told]


@pytest.mark.parametrize(
    "path",
    [
        "bulk-delete",
        "bulk-delete?status=deleted",
        "bulk-delete?status=available",
        "bulk-delete?status=",
        "auto-delete-stale?grace_period_hours=-1",
        "auto-delete-stale?grace_period_hours=nan",
    ],
)
async def test_nothing_else_can_be_forgotten(gateway: Gateway, path: str) -> None:
    response = await gateway.client.post(f"/v1/admin/{path}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")
    assert gateway.maintenance.commands == []


async def test_a_purge_that_is_refused_becomes_its_status(gateway: Gateway) -> None:
    gateway.maintenance.answer = refuse("ALLOCATOR_UNAVAILABLE")
    response = await gateway.client.post("/v1/admin/auto-delete-stale", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
