"""Webhook of Instruqt: the end of a play becomes a command; refused, ignored and repeated events."""

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest

from sandbox_broker.contract.commands import Command, EndPlay
from sandbox_broker.contract.replies import PlayEnded, Reply

from .gateway_harness import Gateway, client, create_app_without_servers, detail, refuse, running, sample
from .test_gateway_webhook_signature import OTHER_SECRET, SECRET, sign

EVENT = {
    "type": "track.completed",
    "track_slug": "dns-basics",
    "participant_id": "student-1",
    "pooled": False,
    "timestamp": "2026-03-27T16:14:57.31297754Z",
    "duration": 5400,
}
ENDED_AT = int(datetime(2026, 3, 27, 16, 14, 57, tzinfo=UTC).timestamp())


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(
        amqp_url, database_url=database_url, instruqt_webhook_secret=f"{OTHER_SECRET},{SECRET}"
    ) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    shared_gateway.allocator.answer = end_play
    return shared_gateway


async def end_play(command: Command) -> Reply:
    assert isinstance(command, EndPlay)
    return PlayEnded(outcome="released", sandbox_id="2012224")


async def send(
    http: httpx.AsyncClient, event: object, *, secret: str = SECRET, prefix: str = "webhook"
) -> httpx.Response:
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return await http.post("/v1/instruqt/events", content=body, headers=sign(body, secret=secret, prefix=prefix))


def count(outcome: str) -> float:
    return sample("broker_instruqt_events_total", outcome=outcome)


@pytest.mark.parametrize("prefix", ["webhook", "svix"])
@pytest.mark.parametrize("secret", [SECRET, OTHER_SECRET])
async def test_the_end_of_a_play_is_sent_to_the_allocator(gateway: Gateway, prefix: str, secret: str) -> None:
    before = count("released")
    response = await send(gateway.client, EVENT, prefix=prefix, secret=secret)
    assert (response.status_code, response.json()) == (200, {"outcome": "released"})
    (command,) = gateway.allocator.commands
    assert isinstance(command, EndPlay)
    assert (command.holder, command.ended_at) == ("student-1", ENDED_AT)
    assert command.request_id == response.headers["X-Request-ID"]
    assert count("released") == before + 1


@pytest.mark.parametrize("outcome", ["stopped_waiting", "no_lease", "newer_lease"])
async def test_an_event_without_effect_succeeds(gateway: Gateway, outcome: str) -> None:
    async def answer(_: Command) -> Reply:
        return PlayEnded.model_validate({"outcome": outcome})

    gateway.allocator.answer = answer
    response = await send(gateway.client, EVENT)
    assert (response.status_code, response.json()) == (200, {"outcome": outcome})


@pytest.mark.parametrize("timestamp", [None, "yesterday", 5, ""])
async def test_an_event_without_a_usable_time_counts_as_sent_now(gateway: Gateway, timestamp: object) -> None:
    before = int(time.time())
    await send(gateway.client, {**EVENT, "timestamp": timestamp})
    (command,) = gateway.allocator.commands
    assert isinstance(command, EndPlay)
    assert before <= command.ended_at <= time.time()


@pytest.mark.parametrize("timestamp", ["2026-03-27T16:14:57", "2026-03-27T18:14:57+02:00"])
async def test_a_time_without_zone_is_utc(gateway: Gateway, timestamp: str) -> None:
    await send(gateway.client, {**EVENT, "timestamp": timestamp})
    (command,) = gateway.allocator.commands
    assert isinstance(command, EndPlay)
    assert command.ended_at == ENDED_AT


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        ({**EVENT, "type": "track.started"}, "ignored"),
        ({"type": "x" * 10_000}, "ignored"),
        ({**EVENT, "participant_id": ""}, "no_participant"),
        ({**EVENT, "participant_id": None, "pooled": True}, "no_participant"),
        ({**EVENT, "participant_id": 5}, "no_participant"),
        ({**EVENT, "participant_id": "x" * 129}, "no_participant"),
        ({**EVENT, "participant_id": "tränk\n"}, "no_participant"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_other_events_succeed_without_a_command(gateway: Gateway, event: object, outcome: str) -> None:
    response = await send(gateway.client, event)
    assert (response.status_code, response.json()) == (200, {"outcome": outcome})
    assert gateway.allocator.commands == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"type": 5}', b'"track.completed"'])
async def test_a_signed_body_that_is_no_event_is_400(gateway: Gateway, body: bytes) -> None:
    response = await send(gateway.client, body)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_EVENT")
    assert gateway.allocator.commands == []


async def test_an_unsigned_event_is_401_and_no_token_replaces_the_signature(gateway: Gateway) -> None:
    before = count("invalid_signature")
    response = await gateway.client.post(
        "/v1/instruqt/events", json=EVENT, headers={"Authorization": "Bearer admin-token-1"}
    )
    assert (response.status_code, detail(response)["code"]) == (401, "INVALID_SIGNATURE")
    assert count("invalid_signature") == before + 1
    assert gateway.allocator.commands == []


async def test_a_body_over_the_bound_is_413(gateway: Gateway) -> None:
    response = await send(gateway.client, {**EVENT, "content": "x" * 70_000})
    assert (response.status_code, detail(response)["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_a_refusal_of_the_allocator_makes_the_sender_repeat_the_event(gateway: Gateway) -> None:
    gateway.allocator.answer = refuse("ALLOCATOR_UNAVAILABLE")
    response = await send(gateway.client, EVENT)
    assert response.status_code == 503


async def test_without_a_secret_the_route_is_off() -> None:
    async with client(create_app_without_servers()) as http:
        response = await send(http, EVENT)
    assert (response.status_code, detail(response)["code"]) == (404, "EVENTS_NOT_CONFIGURED")


async def test_shadow_mode_counts_and_sends_no_command() -> None:
    before = count("shadow")
    app = create_app_without_servers(
        instruqt_webhook_secret=SECRET,
        instruqt_events_shadow=True,
        instruqt_end_events="play.over, track.completed",
    )
    async with client(app) as http:
        outcomes = [
            (await send(http, {**EVENT, "type": type_})).json()["outcome"]
            for type_ in ("track.completed", "play.over", "track.stopped")
        ]
    assert outcomes == ["shadow", "shadow", "ignored"]
    assert count("shadow") == before + 2


async def test_only_refused_events_count_against_the_rate_limit() -> None:
    app = create_app_without_servers(
        instruqt_webhook_secret=SECRET, instruqt_events_shadow=True, rate_limit="40/hour"
    )
    async with client(app) as http:
        signed = {(await send(http, EVENT)).status_code for _ in range(50)}
        forged = [(await http.post("/v1/instruqt/events", json=EVENT)).status_code for _ in range(12)]
        afterwards = (await send(http, EVENT)).status_code
    assert signed == {200}
    assert forged == 10 * [401] + 2 * [429]
    assert afterwards == 200, "forged events must not block the genuine ones"
