"""Tests of the admin routes for dead letters."""

import base64
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from sandbox_broker.contract.commands import DropDeadLetter, ReplayDeadLetter
from sandbox_broker.contract.tokens import Sender

from .gateway_harness import ADMIN, Gateway, detail, refuse, running

PATH = "/v1/admin/dead-letters"
UNKNOWN = uuid.UUID(int=7)
ADMINISTRATOR = Sender(actor="$BROKER_ADMIN_TOKEN", address="127.0.0.1")
ROUTES = [("POST", f"{PATH}/{UNKNOWN}/replay"), ("DELETE", f"{PATH}/{UNKNOWN}")]


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, admin_wait_sec=5) as gateway:
        yield gateway


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


@pytest.fixture
def gateway(shared_gateway: Gateway, database: asyncpg.Connection) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


async def add(database: asyncpg.Connection, body: bytes = b"{}", *, at: int = 1_728_054_123) -> uuid.UUID:
    dead_letter_id: uuid.UUID = await database.fetchval(
        "INSERT INTO dead_letters VALUES (gen_random_uuid(), to_timestamp($1), 'csp-syncer.commands', 'why', "
        "'{SyncPool}', 'message', 'correlation', 'application/json', $2) RETURNING dead_letter_id",
        at,
        body,
    )
    return dead_letter_id


async def get(gateway: Gateway, path: str = "", **parameters: Any) -> Any:
    response = await gateway.client.get(f"{PATH}{path}", params=parameters, headers=ADMIN)
    assert response.status_code == 200, response.text
    return response.json()


async def test_dead_letter_includes_time_queue_and_reason(gateway: Gateway, database: asyncpg.Connection) -> None:
    assert await get(gateway) == {"dead_letters": [], "count": 0, "cursor": None}
    dead_letter_id = await add(database, b'{"commands":[]}')
    summary = {
        "dead_letter_id": str(dead_letter_id),
        "died_at": 1_728_054_123,
        "service": "csp-syncer",
        "queue": "csp-syncer.commands",
        "reason": "why",
        "commands": ["SyncPool"],
        "size": 15,
    }
    assert await get(gateway) == {"dead_letters": [summary], "count": 1, "cursor": None}
    assert await get(gateway, f"/{dead_letter_id}") == {
        **summary,
        "message_id": "message",
        "correlation_id": "correlation",
        "content_type": "application/json",
        "payload": '{"commands":[]}',
        "encoding": "utf-8",
    }


async def test_pages_contain_each_dead_letter_once_newest_first(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    # Groups of three have the same time of death.
    added = {await add(database, at=1_728_054_123 + number // 3): number for number in range(10)}
    ids: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await get(gateway, limit=4, cursor=cursor)
        assert page["count"] == len(page["dead_letters"])
        ids += [letter["dead_letter_id"] for letter in page["dead_letters"]]
        cursor = page["cursor"]
    assert sorted(ids) == sorted(map(str, added))
    ages = [added[uuid.UUID(dead_letter_id)] // 3 for dead_letter_id in ids]
    assert ages == sorted(ages, reverse=True)


async def test_cursor_of_another_listing_returns_400(gateway: Gateway, database: asyncpg.Connection) -> None:
    for _ in range(2):
        await add(database)
    cursor = (await get(gateway, limit=1))["cursor"]
    for path, value in ((PATH, "forged"), ("/v1/admin/sandboxes", cursor)):
        response = await gateway.client.get(path, params={"cursor": value}, headers=ADMIN)
        assert (response.status_code, detail(response)["code"]) == (400, "INVALID_CURSOR")


@pytest.mark.parametrize("body", [b"\xff\x00\xfe", b"", b"\xff" * 100_000])
async def test_binary_payload_is_returned_in_base64(
    gateway: Gateway, database: asyncpg.Connection, body: bytes
) -> None:
    letter = await get(gateway, f"/{await add(database, body)}")
    assert letter["size"] == len(body)
    if letter["encoding"] == "base64":
        assert base64.b64decode(letter["payload"]) == body[: 64 * 1024]
    else:
        assert (letter["payload"], body) == ("", b"")


async def test_large_payload_is_cut_after_a_complete_character(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    body = ("x" + "ä" * 50_000).encode()
    letter = await get(gateway, f"/{await add(database, body)}")
    assert (letter["size"], letter["encoding"]) == (100_001, "utf-8")
    assert letter["payload"] == "x" + "ä" * 32_767


async def test_replay_returns_its_result(gateway: Gateway) -> None:
    response = await gateway.client.post(f"{PATH}/{UNKNOWN}/replay", headers=ADMIN)
    assert (response.status_code, response.json()) == (
        200,
        {
            "status": "replayed",
            "dead_letter_id": str(UNKNOWN),
            "queue": "allocator.commands",
            "published": True,
            "skipped": 2,
        },
    )
    (command,) = gateway.maintenance.commands
    assert command == ReplayDeadLetter(
        request_id=response.headers["X-Request-ID"], dead_letter_id=UNKNOWN, sender=ADMINISTRATOR
    )


async def test_drop_returns_its_result(gateway: Gateway) -> None:
    response = await gateway.client.delete(f"{PATH}/{UNKNOWN}", headers=ADMIN)
    assert (response.status_code, response.json()) == (200, {"status": "dropped", "dead_letter_id": str(UNKNOWN)})
    (command,) = gateway.maintenance.commands
    assert command == DropDeadLetter(
        request_id=response.headers["X-Request-ID"], dead_letter_id=UNKNOWN, sender=ADMINISTRATOR
    )


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("code", "status"), [("DEAD_LETTER_NOT_FOUND", 404), ("NOT_REPLAYABLE", 409), ("ALLOCATOR_UNAVAILABLE", 503)]
)
async def test_refusal_returns_the_status_of_its_code(
    gateway: Gateway, method: str, path: str, code: str, status: int
) -> None:
    gateway.maintenance.answer = refuse(code, "do something else")
    response = await gateway.client.request(method, path, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (status, code)
    assert detail(response)["message"] == "do something else"


@pytest.mark.parametrize("dead_letter_id", [str(UNKNOWN), "no-id", "%00", "7" * 200])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("POST", "/replay"), ("DELETE", "")])
async def test_unknown_dead_letter_returns_404(
    gateway: Gateway, method: str, suffix: str, dead_letter_id: str
) -> None:
    gateway.maintenance.answer = refuse("DEAD_LETTER_NOT_FOUND")
    response = await gateway.client.request(method, f"{PATH}/{dead_letter_id}{suffix}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (404, "DEAD_LETTER_NOT_FOUND")
