"""`GET /v1/admin/events` on the running broker: live events, replay after an interruption, stop of the gateway."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from devstack.conditions import wait_until
from tests.integration.stack import ADMIN, TRACK_TOKEN, Stack

TIMEOUT_SEC = 10


class Events:
    """Parsed server-sent events of one response."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def next(self) -> dict[str, str]:
        """Return the fields of the next event with data."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(TIMEOUT_SEC):
            async for line in self._lines:
                if not line and "data" in fields:
                    return fields
                name, _, value = line.partition(": ")
                if line and name:
                    fields[name] = value
        raise AssertionError("the stream has ended")

    async def read_to_end(self) -> None:
        async with asyncio.timeout(TIMEOUT_SEC):
            async for _ in self._lines:
                pass


@asynccontextmanager
async def open_events(stack: Stack, **headers: str) -> AsyncIterator[Events]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with stack.client.stream("GET", f"{stack.url}/v1/admin/events", headers={**ADMIN, **named}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Events(response)


async def lease(stack: Stack, student: str) -> dict[str, Any]:
    response = await stack.allocate(student)
    assert response.status_code == 201
    leased: dict[str, Any] = response.json()
    return leased


async def test_an_event_arrives_within_two_seconds(stack: Stack) -> None:
    await stack.fill(3)
    async with open_events(stack) as events:
        began = time.monotonic()
        leased = await lease(stack, "ann")
        event = await events.next()
        assert time.monotonic() - began < 2
    body = json.loads(event["data"])
    assert event["event"] == body["type"] == "sandbox.allocated"
    assert event["id"] == body["sequence"]
    assert body["subject"] == leased["sandbox_id"]
    assert body["data"]["holder"] == "ann"


async def test_a_client_continues_with_its_last_event(stack: Stack) -> None:
    await stack.fill(3)
    async with open_events(stack) as events:
        await lease(stack, "ann")
        last = await events.next()
    missed = await lease(stack, "ben")

    async def is_in_history() -> bool:
        return bool(await stack.database.fetchval("SELECT 1 FROM history WHERE data->>'holder' = 'ben'"))

    await wait_until(is_in_history)
    async with open_events(stack, Last_Event_ID=last["id"]) as events:
        while (event := await events.next())["event"] != "sandbox.allocated" or '"ben"' not in event["data"]:
            assert int(event["id"]) <= int(last["id"])  # repeated
        body = json.loads(event["data"])
        assert body["subject"] == missed["sandbox_id"]
        assert int(event["id"]) > int(last["id"])
        live = await lease(stack, "cay")
        while json.loads((event := await events.next())["data"])["subject"] != live["sandbox_id"]:
            pass


async def test_too_many_missed_events_are_a_gap(stack: Stack) -> None:
    await stack.fill(1)
    await stack.database.execute(
        "INSERT INTO history (sandbox_id, outbox_id, type, occurred_at, data, event_id) "
        "SELECT 'x', 1000000000 + n, 'sandbox.stale', now(), '{}', gen_random_uuid() "
        "FROM generate_series(1, 1001) n"
    )
    async with open_events(stack, Last_Event_ID="1000000000") as events:
        assert (await events.next())["event"] == "gap"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Last-Event-ID": "abc"}, 400), ({"Authorization": f"Bearer {TRACK_TOKEN}"}, 403)],
)
async def test_other_requests_are_refused(stack: Stack, headers: dict[str, str], status: int) -> None:
    response = await stack.client.get(f"{stack.url}/v1/admin/events", headers={**ADMIN, **headers})
    assert response.status_code == status


async def test_a_head_request_leaves_no_stream_open(stack: Stack) -> None:
    response = await stack.client.head(f"{stack.url}/v1/admin/events", headers=ADMIN)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")

    async def no_stream_is_open() -> bool:
        return "broker_event_streams 0.0" in (await stack.client.get(f"{stack.url}/metrics")).text

    await wait_until(no_stream_is_open)
