"""Tests of the admin routes for syncs, leaks and purges."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from gateway.queries import leaks
from sandbox_broker.contract.commands import Command, DeleteStale, PurgeRecords
from sandbox_broker.contract.replies import Purged, Reply
from sandbox_broker.contract.tokens import Sender

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
    body: dict[str, Any] = response.json()
    return body


async def add_listing(database: asyncpg.Connection, ended: str, outcome: dict[str, Any]) -> int:
    """Insert a listing that began at 1728054123 and ended 7 s later. Return its id."""
    listing_id: int = await database.fetchval(
        f"INSERT INTO csp_listings (begun_at, {ended}, outcome) "
        "VALUES (to_timestamp(1728054123.9), to_timestamp(1728054130.9), $1) RETURNING listing_id",
        json.dumps(outcome),
    )
    return listing_id


APPLIED = {"synced": 5, "discovered": 4, "restored": 3, "marked_stale": 2, "reopened": 1, "leaked": 6}
CHANGE = {"count": 30, "examples": [{"sandbox_id": "7", "name": "sandbox-7"}]}
HELD = {"reason": "because", **dict.fromkeys(("stale", "missing", "moved", "discovered", "restored"), CHANGE)}


async def test_sync_state_and_leaks_are_empty_before_the_first_sync(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await database.execute("INSERT INTO csp_listings DEFAULT VALUES")  # a listing in progress
    assert await get(gateway, "/v1/admin/sync") == {"applied": None, "held": None}
    assert await get(gateway, "/v1/admin/leaks") == {"leaks": [], "count": 0, "cursor": None, "listed_at": None}


async def test_held_listing_is_returned_until_a_later_listing_is_applied(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    times = {"begun_at": 1728054123}
    first = await add_listing(database, "applied_at", APPLIED)
    applied = {"listing_id": first, **times, "applied_at": 1728054130, **APPLIED}
    assert await get(gateway, "/v1/admin/sync") == {"applied": applied, "held": None}
    second = await add_listing(database, "held_at", HELD)
    held = {"listing_id": second, **times, "held_at": 1728054130, **HELD}
    assert await get(gateway, "/v1/admin/sync") == {"applied": applied, "held": held}
    third = await add_listing(database, "applied_at", APPLIED)
    assert await get(gateway, "/v1/admin/sync") == {"applied": {**applied, "listing_id": third}, "held": None}


async def add_leaks(database: asyncpg.Connection) -> None:
    """Insert seven accounts or sandboxes.

    1: in the pool. 2: unknown. 3: deleted long ago. 4: just deleted. 5: missing. 6: missing, pending deletion.
    7: an account that could not be parsed.
    """
    await add_listing(database, "applied_at", APPLIED)
    await add_listing(database, "held_at", HELD)
    await database.execute(
        "INSERT INTO csp_accounts (listing_id, sandbox_id, external_id, name) "
        "SELECT min(listing_id), id, 'account-' || id, 'name-' || id FROM csp_listings, unnest($1::text[]) AS id "
        "GROUP BY id",
        ["1", "2", "3", "4"],
    )
    await database.execute(
        "INSERT INTO csp_accounts (listing_id, sandbox_id) SELECT min(listing_id), '7' FROM csp_listings"
    )
    await database.execute(  # an account of the held listing
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


async def test_leaks_are_unknown_deleted_and_missing_sandboxes(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await add_leaks(database)
    assert await get(gateway, "/v1/admin/leaks") == {
        "leaks": LEAKS,
        "count": 3,
        "cursor": None,
        "listed_at": 1728054123,
    }


async def test_leaks_are_paginated(gateway: Gateway, database: asyncpg.Connection) -> None:
    await add_leaks(database)
    first = await get(gateway, "/v1/admin/leaks?limit=2")
    assert (first["leaks"], first["count"]) == (LEAKS[:2], 2)
    second = await get(gateway, f"/v1/admin/leaks?limit=2&cursor={first['cursor']}")
    assert (second["leaks"], second["cursor"]) == (LEAKS[2:], None)


async def test_a_page_of_leaks_looks_at_so_many_accounts_at_most(
    gateway: Gateway, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "MAX_EXAMINED", 1)
    await add_leaks(database)
    shown, cursor, requests = [], "", 0
    while cursor is not None:
        page = await get(gateway, f"/v1/admin/leaks?cursor={cursor}")
        shown += page["leaks"]
        cursor, requests = page["cursor"], requests + 1
    assert shown == LEAKS
    assert requests > len(LEAKS)


@pytest.mark.parametrize("cursor", ["3", "%00", "x" * 129])
async def test_invalid_cursor_returns_400(gateway: Gateway, database: asyncpg.Connection, cursor: str) -> None:
    await add_leaks(database)
    response = await gateway.client.get(f"/v1/admin/leaks?cursor={cursor}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR")


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", f"cursor={'x' * 2049}"])
async def test_invalid_parameter_returns_400(gateway: Gateway, query: str) -> None:
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
async def test_purge_repeats_until_no_records_are_left(gateway: Gateway, path: str, command: Command) -> None:
    counts = [500, 500, 3]

    async def purge(_: Command) -> Reply:
        return Purged(count=counts.pop(0))

    gateway.maintenance.answer = purge
    response = await gateway.client.post(f"/v1/admin/{path}", headers=ADMIN)
    assert response.status_code == 200
    assert {**response.json(), "duration_ms": 0} == {"status": "completed", "deleted": 1003, "duration_ms": 0}
    sender = Sender(actor="$BROKER_ADMIN_TOKEN", address="127.0.0.1")
    expected = command.model_copy(update={"request_id": response.headers["X-Request-ID"], "sender": sender})
    assert gateway.maintenance.commands == 3 * [expected]


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
async def test_purge_with_invalid_parameters_returns_400(gateway: Gateway, path: str) -> None:
    response = await gateway.client.post(f"/v1/admin/{path}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")
    assert gateway.maintenance.commands == []


async def test_refused_purge_returns_the_status_of_its_code(gateway: Gateway) -> None:
    gateway.maintenance.answer = refuse("ALLOCATOR_UNAVAILABLE")
    response = await gateway.client.post("/v1/admin/auto-delete-stale", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
