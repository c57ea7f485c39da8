"""Tests of cursors.py with forged cursors and with cursors of an earlier version of the gateway."""

import base64
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from gateway.queries import cursors, dead_letters
from gateway.queries.allocation_pages import AllocationFilter
from gateway.queries.sandbox_pages import SandboxFilter

from .gateway_harness import ADMIN, Gateway, detail, running

TIME = datetime(2025, 3, 27, 16, 53, 47, 605459, tzinfo=UTC)
DEAD_LETTER = uuid.UUID("af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3")


@dataclass(frozen=True)
class Listing:
    path: str
    name: object
    """Second part of the checksum, after the key."""
    types: tuple[type, ...]
    parameters: tuple[tuple[str, str | int], ...] = ()

    def __repr__(self) -> str:
        return "&".join([self.path, *(f"{name}={value}" for name, value in self.parameters)])


def sandboxes(*types: type, **filters: str) -> Listing:
    return Listing("sandboxes", SandboxFilter(**filters), types, tuple(filters.items()))  # type: ignore[arg-type]


def allocations(**filters: str | int) -> Listing:
    filter_ = AllocationFilter(**filters)  # type: ignore[arg-type]
    return Listing("allocations", filter_, (datetime, int), tuple(filters.items()))


LISTINGS = [
    sandboxes(str),
    *(sandboxes(datetime, str, status=s) for s in ("available", "pending_deletion", "stale", "deleted")),
    sandboxes(datetime, int, status="allocated"),
    sandboxes(str, str, name_prefix="lab-"),
    sandboxes(datetime, int, track_name="dns"),
    sandboxes(datetime, int, holder="student-1"),
    sandboxes(datetime, int, holder="student-1", name_prefix="lab-", status="deleted"),
    allocations(),
    allocations(holder="student-1", track_name="dns"),
    allocations(since=1_000, until=2_000_000_000),
    Listing("stats", "track_name", (str,), (("by", "track_name"),)),
    Listing("stats", "name_prefix", (str,), (("by", "name_prefix"),)),
    Listing("leaks", "leaks", (str,)),
    Listing("dead-letters", dead_letters.LISTING, (datetime, uuid.UUID)),
]


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        yield gateway


@pytest.fixture
async def gateway(shared_gateway: Gateway, clean_database: str) -> Gateway:
    """Gateway with rows in every listing, so that each query compares its keys with the key of the cursor."""
    connection = await asyncpg.connect(clean_database)
    await connection.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status, track_name) "
        "SELECT number || status, 'account-' || number || status, 'lab-' || number, status, 'dns' "
        "FROM generate_series(1, 2) number, unnest(ARRAY['available', 'allocated', 'pending_deletion', "
        "'deletion_failed', 'stale', 'deleted']) status; "
        "INSERT INTO leases (sandbox_id, holder, track_name, expires_at, ended_at, end_reason) "
        "SELECT sandbox_id, CASE status WHEN 'allocated' THEN sandbox_id ELSE 'student-1' END, 'dns', now(), "
        "CASE status WHEN 'deleted' THEN now() END, CASE status WHEN 'deleted' THEN 'student' END "
        "FROM sandboxes WHERE status IN ('allocated', 'deleted'); "
        "INSERT INTO csp_listings (applied_at) VALUES (now()); "
        "INSERT INTO csp_accounts (listing_id, sandbox_id, external_id, name) "
        "SELECT listing_id, number, number, number FROM csp_listings, unnest(ARRAY['x', 'y']) number; "
        "INSERT INTO dead_letters SELECT gen_random_uuid(), now(), 'csp-syncer.commands', 'why', '{}', NULL, NULL, "
        "NULL, '' FROM generate_series(1, 2)"
    )
    await connection.close()
    return shared_gateway


def forge(body: bytes, listing: Listing) -> str:
    """Return a cursor with a valid checksum. A change of the format would invalidate cursors in use."""
    checksum = hashlib.blake2b(repr((listing.name,)).encode() + body, digest_size=8).digest()
    return base64.urlsafe_b64encode(checksum + body).decode().rstrip("=")


async def get_page(gateway: Gateway, listing: Listing, cursor: str, **parameters: Any) -> httpx.Response:
    parameters = {**dict(listing.parameters), **parameters, "cursor": cursor}
    return await gateway.client.get(f"/v1/admin/{listing.path}", params=parameters, headers=ADMIN)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))  # lone surrogates too
    | st.datetimes(timezones=st.none() | st.timezones()).map(datetime.isoformat)
    | st.uuids().map(str),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)
BODIES = JSON_VALUES.map(lambda value: json.dumps(value).encode()) | st.binary()
KEYS = st.lists(JSON_VALUES, max_size=3).map(lambda key: json.dumps(key).encode())


@pytest.mark.parametrize("listing", LISTINGS, ids=repr)
@given(body=KEYS | BODIES)
@example(b"[" * 1000)
@example(b"[" + b"9" * 1000 + b"]")
@example(b'["\\u0000"]')
@example(b'["\\ud800", "\\ud800"]')
@example(b'["0001-01-01T00:00:00+14:00", 1]')
@example(b'["9999-12-31T23:59:59.999999-14:00", 1]')
@example(b'["9999-12-31T23:59:59.999999+00:00", "\xef\xbf\xbf"]')
@example(b'["0001-01-01T00:00:00+00:00", 9223372036854775807]')
@example(b'["2025-03-27T16:53:47+00:00", 9223372036854775808]')
@example(b'["2025-03-27T16:53:47+00:00", -9223372036854775809]')
@example(b'["2025-03-27T16:53:47+00:00", true]')
@example(b'["2025-03-27T16:53:47", 1]')
@example(b'["2025-03-27T16:53:47+00:00", "no uuid"]')
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_forged_cursor_returns_a_page_or_400(gateway: Gateway, listing: Listing, body: bytes) -> None:
    cursor = forge(body, listing)
    response = await get_page(gateway, listing, cursor)
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        too_long = len(cursor) > cursors.MAX_LENGTH
        assert detail(response)["code"] == ("INVALID_REQUEST" if too_long else "INVALID_CURSOR")


KEY_PARTS: dict[type, object] = {str: "lab-1", int: 7, datetime: TIME.isoformat(), uuid.UUID: str(DEAD_LETTER)}


@pytest.mark.parametrize("listing", LISTINGS, ids=repr)
async def test_key_of_wrong_types_or_length_returns_400(gateway: Gateway, listing: Listing) -> None:
    good = [KEY_PARTS[type_] for type_ in listing.types]
    assert (await get_page(gateway, listing, forge(json.dumps(good).encode(), listing))).status_code == 200
    others = [part for type_, part in KEY_PARTS.items() if type_ is not str] + [None, True, 1.5, [], {}]
    wrong = [[], good[:-1], [*good, good[-1]]]
    for index, type_ in enumerate(listing.types):
        for other in others:
            if other != KEY_PARTS[type_] and not (type_ is str and isinstance(other, str)):
                wrong.append([*good[:index], other, *good[index + 1 :]])
    for key in wrong:
        response = await get_page(gateway, listing, forge(json.dumps(key).encode(), listing))
        assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR"), key


@pytest.mark.parametrize(
    ("listing", "key"),
    [
        (sandboxes(str, str, name_prefix="lab-2"), ["lab-1", ""]),
        (sandboxes(str, str, name_prefix="lab-2"), ["", ""]),
        (allocations(until=1_000), [TIME.isoformat(), 7]),
        (allocations(until=1_000), ["1970-01-01T00:16:40+00:00", 7]),
    ],
    ids=repr,
)
async def test_forged_cursor_does_not_reach_rows_that_its_filters_exclude(
    gateway: Gateway, listing: Listing, key: list[object]
) -> None:
    response = await get_page(gateway, listing, forge(json.dumps(key).encode(), listing))
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR")


async def test_cursor_of_the_previous_version_is_valid(gateway: Gateway) -> None:
    pool = sandboxes(str)
    before = (await get_page(gateway, pool, "")).json()["sandboxes"]
    after_first = forge(json.dumps([before[0]["sandbox_id"]]).encode(), pool)
    assert (await get_page(gateway, pool, after_first)).json()["sandboxes"] == before[1:]
    key = json.dumps(["2999-01-01T00:00:00+00:00", str(DEAD_LETTER)], separators=(",", ":"))
    letters = Listing("dead-letters", "dead_letters", (datetime, uuid.UUID))
    assert (await get_page(gateway, letters, forge(key.encode(), letters))).json()["count"] == 2


@pytest.mark.parametrize("zone", [UTC, None])
def test_decode_returns_the_encoded_key(zone: Any) -> None:
    time = TIME.astimezone(zone) + timedelta(days=1)
    key: list[Any] = [time, DEAD_LETTER, "ü\U0001f600", 2**63 - 1]
    assert cursors.decode(cursors.encode(key, "x", 1), (datetime, uuid.UUID, str, int), "x", 1) == key
