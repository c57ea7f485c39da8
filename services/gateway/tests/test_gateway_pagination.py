"""Tests of the paginated admin listings: contents, completeness of all pages, and invalid parameters."""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest

from gateway.queries import pagination

from .gateway_harness import ADMIN, TRACK, Gateway, detail, running


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        yield gateway


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


@pytest.fixture
def gateway(shared_gateway: Gateway, database: asyncpg.Connection) -> Gateway:
    return shared_gateway


async def add(
    database: asyncpg.Connection,
    sandbox_id: str,
    status: str = "available",
    *,
    name: str = "",
    holder: str | None = None,
    track: str | None = None,
    at: int = 1_728_054_123,
) -> None:
    """Insert a sandbox, and its lease if there is a holder."""
    await database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status, track_name) VALUES ($1, $2, $3, $4, $5)",
        sandbox_id,
        f"account-{sandbox_id}",
        name or f"sandbox-{sandbox_id}",
        status,
        track,
    )
    if holder is not None:
        ended = status != "allocated"
        await database.execute(
            "INSERT INTO leases (sandbox_id, holder, track_name, allocated_at, expires_at, ended_at, end_reason) "
            "VALUES ($1, $2, $3, to_timestamp($4), to_timestamp($4 + 14400), to_timestamp($5), $6)",
            sandbox_id,
            holder,
            track,
            at,
            at + 600 if ended else None,
            "student" if ended else None,
        )


async def get(gateway: Gateway, path: str, **parameters: Any) -> httpx.Response:
    return await gateway.client.get(f"/v1/admin/{path}", params=parameters, headers=ADMIN)


async def page(gateway: Gateway, path: str, **parameters: Any) -> dict[str, Any]:
    response = await get(gateway, path, **parameters)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def all_pages(gateway: Gateway, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """Return the rows of all pages."""
    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        body = await page(gateway, path, cursor=cursor, **parameters)
        key = next(name for name in ("groups", "sandboxes", "allocations") if name in body)
        assert len(body[key]) <= parameters.get("limit", 50)
        assert body.get("count", len(body[key])) == len(body[key])
        rows += body[key]
        if body["cursor"] is None:
            return rows
        cursor = body["cursor"]


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["sandbox_id"] for row in rows]


async def add_mixed_pool(database: asyncpg.Connection) -> None:
    """Insert 12 sandboxes of each status, with two name prefixes and alternating tracks and students."""
    statuses = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")
    used = ("allocated", "pending_deletion", "deletion_failed", "deleted")
    for number, (status, copy) in enumerate(itertools.product(statuses, range(12))):
        await add(
            database,
            f"{number:03}",
            status,
            name=f"{'lab' if number % 2 else 'sandbox'}-{number}",
            holder=f"student-{number if status == 'allocated' else number % 5}" if status in used else None,
            track=("dns", "dhcp", None)[number % 3] if status in used else None,
            at=1_728_054_000 + copy * 60,
        )


FILTERS: list[dict[str, str]] = [
    dict(combination)
    for length in range(5)
    for combination in itertools.combinations(
        (("status", "deleted"), ("name_prefix", "lab-"), ("track_name", "dns"), ("holder", "student-3")), length
    )
] + [
    {"status": "stale", "name_prefix": "lab-"},
    {"status": "available"},
    {"status": "allocated", "track_name": "dns"},
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda filters: "+".join(filters) or "none")
@pytest.mark.parametrize("limit", [1, 7, 500])
async def test_pages_contain_each_matching_sandbox_once(
    gateway: Gateway, database: asyncpg.Connection, filters: dict[str, str], limit: int
) -> None:
    await add_mixed_pool(database)
    rows = await all_pages(gateway, "sandboxes", limit=limit, **filters)
    expected = await database.fetch(
        "SELECT s.sandbox_id FROM sandboxes s LEFT JOIN leases l USING (sandbox_id) "
        "WHERE ($1::text IS NULL OR s.status = $1) AND ($2::text IS NULL OR starts_with(s.name, $2)) "
        "AND ($3::text IS NULL OR l.track_name = $3) AND ($4::text IS NULL OR l.holder = $4)",
        *(filters.get(name) for name in ("status", "name_prefix", "track_name", "holder")),
    )
    assert sorted(ids(rows)) == sorted(row["sandbox_id"] for row in expected)
    assert len(expected) > 0


@pytest.mark.parametrize("limit", [1, 3, 500])
async def test_page_that_reaches_the_row_limit_is_short_and_has_a_cursor(
    gateway: Gateway, database: asyncpg.Connection, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagination, "MAX_EXAMINED", 5)
    await add_mixed_pool(database)
    first = await page(gateway, "sandboxes", name_prefix="lab-", status="deleted", limit=limit)
    assert first["cursor"] is not None
    rows = await all_pages(gateway, "sandboxes", name_prefix="lab-", status="deleted", limit=limit)
    assert len(ids(rows)) == len(set(ids(rows))) == 6


async def test_name_prefix_has_no_wildcards(gateway: Gateway, database: asyncpg.Connection) -> None:
    for number, name in enumerate(("a%b", "a_b", "axb", "A%b", "a\\b", "a*b", "a'b")):
        await add(database, str(number), name=name)
    for prefix, expected in (("a%", ["0"]), ("a_", ["1"]), ("a\\", ["4"]), ("a*", ["5"]), ("a'", ["6"]), ("%", [])):
        for filters in ({}, {"status": "available"}):
            assert ids(await all_pages(gateway, "sandboxes", name_prefix=prefix, **filters)) == expected


@pytest.mark.parametrize("character", ["x", '"', "\\", "ü", "\U0001f600"])
async def test_pages_of_the_longest_names_have_valid_cursors(
    gateway: Gateway, database: asyncpg.Connection, character: str
) -> None:
    longest = f"s{character * 254}"
    for number in range(3):
        await add(database, str(10**18 + number), name=longest)
    await add(database, "1", name=f"{longest[:-1]}\U0001f601")
    assert len(await all_pages(gateway, "sandboxes", name_prefix="s", limit=1)) == 4
    assert sum(group["total"] for group in await all_pages(gateway, "stats", by="name_prefix", limit=1)) == 4


async def test_empty_filter_matches_all(gateway: Gateway, database: asyncpg.Connection) -> None:
    await add(database, "7")
    assert ids(await all_pages(gateway, "sandboxes", name_prefix="", track_name="", holder="")) == ["7"]


async def test_rows_added_or_deleted_between_pages_do_not_affect_other_rows(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    for number in range(10, 20):
        await add(database, str(number))
    first = await page(gateway, "sandboxes", limit=4)
    await database.execute("DELETE FROM sandboxes WHERE sandbox_id IN ('13', '15')")
    await add(database, "09")
    rest = await page(gateway, "sandboxes", limit=50, cursor=first["cursor"])
    assert ids(first["sandboxes"] + rest["sandboxes"]) == ["10", "11", "12", "13", "14", "16", "17", "18", "19"]


@pytest.mark.parametrize("limit", [1, 500])
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"mode": "standby"}, ["0", "3"]),
        ({"mode": "active"}, ["1", "4"]),
        ({"mode": "standby", "status": "allocated"}, ["0", "3"]),
        ({"mode": "standby", "status": "deleted"}, []),
        ({"mode": "standby", "holder": "student-0"}, ["0"]),
        ({"mode": "active", "track_name": "dns"}, ["4"]),
        ({"mode": "standby", "name_prefix": "sandbox-3"}, ["3"]),
    ],
    ids="+".join,
)
async def test_pages_of_a_mode_contain_active_leases_only(
    gateway: Gateway, database: asyncpg.Connection, filters: dict[str, Any], expected: list[str], limit: int
) -> None:
    for number in range(6):
        status = "allocated" if number % 3 < 2 else "deleted"
        track = "dns" if number > 2 else "dhcp"
        await add(database, str(number), status, holder=f"student-{number}", track=track, at=1_000 + number)
    await database.execute("UPDATE leases SET mode = 'standby' WHERE sandbox_id IN ('0', '2', '3')")
    assert ids(await all_pages(gateway, "sandboxes", limit=limit, **filters)) == expected


async def test_sandbox_row_includes_its_lease(gateway: Gateway, database: asyncpg.Connection) -> None:
    await add(database, "7", "allocated", holder="student-1", track="dns")
    (row,) = (await page(gateway, "sandboxes"))["sandboxes"]
    assert row.pop("status_since") > 1_728_054_123
    assert row == {
        "sandbox_id": "7",
        "name": "sandbox-7",
        "external_id": "account-7",
        "sfdc_account_id": None,
        "status": "allocated",
        "missing_since": None,
        "holder": "student-1",
        "track_name": "dns",
        "allocated_at": 1_728_054_123,
        "expires_at": 1_728_068_523,
        "deletion_requested_at": None,
        "deletion_attempts": 0,
        "deletion_error": None,
    }


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"holder": "student-1"},
        {"track_name": "dns"},
        {"holder": "student-1", "track_name": "dns"},
        {"since": 1_005, "until": 1_015},
        {"holder": "student-1", "since": 1_005},
        {"track_name": "dns", "until": 1_015},
        {"since": 5_000},
        {"held_at": 1_010},
        {"track_name": "dns", "held_at": 1_012},
    ],
    ids=lambda filters: "+".join(filters) or "none",
)
@pytest.mark.parametrize("limit", [1, 3, 500])
async def test_pages_contain_each_matching_lease_once_newest_first(
    gateway: Gateway, database: asyncpg.Connection, filters: dict[str, Any], limit: int
) -> None:
    for number in range(20):
        holder, track = f"student-{number % 2}", ("dns", None, "dhcp")[number % 3]
        at = 1_000 + number // 2 * 2  # two leases with the same time
        await add(database, str(number), "deleted", holder=holder, track=track, at=at)
    rows = await all_pages(gateway, "allocations", limit=limit, **filters)
    expected = await database.fetch(
        "SELECT lease_id FROM leases WHERE ($1::text IS NULL OR holder = $1) "
        "AND ($2::text IS NULL OR track_name = $2) AND allocated_at >= to_timestamp($3) "
        "AND allocated_at < to_timestamp($4) AND ($5::float IS NULL OR allocated_at <= to_timestamp($5) "
        "AND (ended_at IS NULL OR ended_at > to_timestamp($5))) ORDER BY allocated_at DESC, lease_id DESC",
        filters.get("holder"),
        filters.get("track_name"),
        filters.get("since", 0),
        filters.get("until", 10_000),
        filters.get("held_at"),
    )
    assert [row["lease_id"] for row in rows] == [row["lease_id"] for row in expected]


async def test_lease_row_includes_duration_and_end_after_the_purge_of_its_sandbox(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await add(database, "7", "deleted", holder="student-1", track="dns")
    await database.execute("DELETE FROM sandboxes")
    (row,) = (await page(gateway, "allocations"))["allocations"]
    assert row.pop("lease_id") > 0
    assert row == {
        "sandbox_id": "7",
        "name": None,
        "external_id": None,
        "holder": "student-1",
        "track_name": "dns",
        "allocated_at": 1_728_054_123,
        "expires_at": 1_728_068_523,
        "ended_at": 1_728_054_723,
        "duration_sec": 600,
        "end_reason": "student",
        "end_note": None,
        "mode": "active",
        "claimed_at": None,
        "first_holder": None,
        "extended_sec": 0,
        "policy": None,
        "max_extension_sec": None,
        "replaces": None,
        "replaced_by": None,
    }
    assert await all_pages(gateway, "sandboxes", holder="student-1") == []


async def test_duration_of_an_active_lease_ends_now(gateway: Gateway, database: asyncpg.Connection) -> None:
    await add(database, "7", "allocated", holder="student-1")
    (row,) = (await page(gateway, "allocations"))["allocations"]
    assert (row["ended_at"], row["end_reason"]) == (None, None)
    assert row["duration_sec"] > 30_000_000


@pytest.mark.parametrize("by", ["track_name", "name_prefix"])
@pytest.mark.parametrize("limit", [1, 2, 500])
@pytest.mark.parametrize("summed", ["none", "all", "some"])
async def test_group_statistics_match_the_sandboxes(
    gateway: Gateway, database: asyncpg.Connection, by: str, limit: int, summed: str
) -> None:
    await add_mixed_pool(database)
    if summed != "none":
        await database.execute(
            "INSERT INTO pool_counts SELECT 'pool', '', status, sum(number) FROM pool_changes GROUP BY status; "
            "INSERT INTO pool_counts SELECT 'name_prefix', stem, status, sum(number) FROM pool_changes "
            "GROUP BY stem, status; "
            "INSERT INTO pool_counts SELECT 'track_name', track_name, status, sum(number) FROM pool_changes "
            "WHERE track_name IS NOT NULL GROUP BY track_name, status; "
            "TRUNCATE pool_changes"
        )
    if summed == "some":
        await database.execute("UPDATE sandboxes SET status = 'deleted' WHERE status = 'pending_deletion'")
        await add(database, "999", "allocated", name="new-1", holder="student-new", track="new")
    groups = await all_pages(gateway, "stats", by=by, limit=limit)
    value = "track_name" if by == "track_name" else "rtrim(name, '0123456789')"
    expected = await database.fetch(
        f"SELECT {value} COLLATE \"C\" AS value, count(*) AS total, count(*) FILTER (WHERE status = 'deleted') AS deleted "  # noqa: E501
        f"FROM sandboxes WHERE {value} IS NOT NULL GROUP BY 1 ORDER BY 1"
    )
    assert [(group["value"], group["total"], group["deleted"]) for group in groups] == [
        tuple(row) for row in expected
    ]
    body = await page(gateway, "stats", by=by)
    assert body["by"] == by
    assert body["total"] == await database.fetchval("SELECT count(*) FROM sandboxes")
    assert "groups" not in await page(gateway, "stats")


@pytest.mark.parametrize("path", ["sandboxes", "allocations", "stats?by=track_name"])
async def test_empty_pool_returns_an_empty_last_page(gateway: Gateway, path: str) -> None:
    response = await gateway.client.get(f"/v1/admin/{path}", headers=ADMIN)
    body = response.json()
    assert body["cursor"] is None
    assert body.get("sandboxes", body.get("allocations", body.get("groups"))) == []


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("sandboxes", {"status": "available"}),
        ("sandboxes", {"name_prefix": "s"}),
        ("allocations", {}),
        ("stats", {"by": "name_prefix"}),
    ],
)
async def test_cursor_of_another_listing_or_other_filters_returns_400(
    gateway: Gateway, database: asyncpg.Connection, path: str, other: dict[str, str]
) -> None:
    for number in range(3):
        await add(database, str(number))
    cursor = (await page(gateway, "sandboxes", limit=1))["cursor"]
    response = await get(gateway, path, cursor=cursor, **other)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR")


async def test_invalid_cursor_returns_400(gateway: Gateway, database: asyncpg.Connection) -> None:
    for number in range(3):
        await add(database, str(number))
    cursor: str = (await page(gateway, "sandboxes", limit=1))["cursor"]
    swapped = [cursor[:index] + ("A" if cursor[index] != "A" else "B") + cursor[index + 1 :] for index in range(12)]
    for forged in ("x", "2", "%", "ä", "==", " ", cursor[:-4], cursor + "AAAA", cursor.swapcase(), *swapped):
        response = await get(gateway, "sandboxes", cursor=forged)
        assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR"), forged


@pytest.mark.parametrize(
    ("path", "parameters", "field"),
    [
        ("sandboxes", {"limit": 0}, "limit"),
        ("sandboxes", {"limit": 501}, "limit"),
        ("sandboxes", {"limit": "many"}, "limit"),
        ("sandboxes", {"status": "lost"}, "status"),
        ("sandboxes", {"name_prefix": "a\0"}, "name_prefix"),
        ("sandboxes", {"holder": "ä"}, "holder"),
        ("sandboxes", {"track_name": "x" * 129}, "track_name"),
        ("sandboxes", {"cursor": "x" * 2049}, "cursor"),
        ("allocations", {"since": -1}, "since"),
        ("allocations", {"until": 10**15}, "until"),
        ("allocations", {"since": "yesterday"}, "since"),
        ("stats", {"by": "colour"}, "by"),
    ],
)
async def test_error_names_the_invalid_parameter(
    gateway: Gateway, path: str, parameters: dict[str, Any], field: str
) -> None:
    response = await get(gateway, path, **parameters)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")
    assert [problem["field"] for problem in detail(response)["fields"]] == [field]


@pytest.mark.parametrize("path", ["sandboxes", "sandboxes/7", "allocations", "stats?by=track_name"])
async def test_track_token_returns_403(gateway: Gateway, path: str) -> None:
    response = await gateway.client.get(f"/v1/admin/{path}", headers=TRACK)
    assert (response.status_code, detail(response)["code"]) == (403, "FORBIDDEN")


async def test_history_includes_published_and_unpublished_events(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await add(database, "7", "pending_deletion", holder="student-1", track="dns")
    await database.execute(
        "UPDATE leases SET end_reason = 'admin', end_note = 'broken'; "
        "INSERT INTO history VALUES "
        "('7', -2, 'sandbox.discovered', to_timestamp(1000), '{\"name\": \"sandbox-7\"}'), "
        '(\'7\', -1, \'sandbox.allocated\', to_timestamp(1001), \'{"holder": "student-1", "track_name": "dns"}\'), '
        "('8', -3, 'sandbox.discovered', to_timestamp(1000), '{}'); "
        "INSERT INTO outbox (type, subject, occurred_at, data) VALUES "
        "('sandbox.deletion_requested', '7', to_timestamp(1002), "
        '\'{"holder": "student-1", "track_name": "dns", "reason": "admin"}\')'
    )
    details = await page(gateway, "sandboxes/7")
    assert (details["status"], details["holder"], details["end_reason"], details["end_note"]) == (
        "pending_deletion",
        "student-1",
        "admin",
        "broken",
    )
    assert [(entry["at"], entry["status"], entry["by"], entry["reason"]) for entry in details["history"]] == [
        (1000, "available", "csp", None),
        (1001, "allocated", "student", None),
        (1002, "pending_deletion", "administrator", "admin"),
    ]
    assert details["history"][1]["holder"] == "student-1"


@pytest.mark.parametrize("sandbox_id", ["7", "%00", "a%2Fb", "x" * 300])
async def test_unknown_sandbox_returns_404(gateway: Gateway, sandbox_id: str) -> None:
    response = await get(gateway, f"sandboxes/{sandbox_id}")
    assert response.status_code == 404
    assert detail(response)["code"] in ("SANDBOX_NOT_FOUND", "NOT_FOUND")


@pytest.mark.parametrize(
    ("held_at", "expected"),
    [
        (999, set()),
        (1000, {"ended", "active"}),
        (1599, {"ended", "active"}),
        (1600, {"active"}),
        (253_402_300_799, {"active", "later"}),  # the latest time that is accepted
    ],
)
async def test_leases_that_were_active_at_a_time(
    gateway: Gateway, database: asyncpg.Connection, held_at: int, expected: set[str]
) -> None:
    await add(database, "1", "deleted", holder="ended", at=1000)
    await add(database, "2", "allocated", holder="active", at=1000)
    await add(database, "3", "allocated", holder="later", at=5000)
    body = await page(gateway, "allocations", held_at=held_at)
    assert {allocation["holder"] for allocation in body["allocations"]} == expected
