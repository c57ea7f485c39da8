"""Request smuggling: no bytes of one client become the request of another, directly or behind real proxies."""

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from csp_simulator.testing import serving
from devstack.errors import CannotRun
from devstack.request_fuzz import VICTIM, generate_pair
from sandbox_broker.runtime.uvicorn_protocol import StrictProtocol
from tests.integration.reverse_proxies import PROXIES, SEGMENT_GAP_SEC, SegmentingRelay
from tests.integration.stack import ADMIN_TOKEN, PORTS, Stack, track_headers

FUZZED_PAIRS = 80
SEED = 20261129
ADMIN_FIELD = b"Authorization: Bearer " + ADMIN_TOKEN.encode() + b"\r\n"
OPERATOR = b"GET /v1/admin/stats HTTP/1.1\r\nHost: broker\r\n" + ADMIN_FIELD + b"\r\n"

FRAMINGS = ("Content-Length", "chunked")
UPGRADES = {
    "upgrade": b"Connection: Upgrade\r\nUpgrade: x\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n",
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA\r\n",
}


def attack(sandbox_id: str, student: str, offer: bytes, framing: str) -> tuple[bytes, bytes]:
    """Return head and body of a student's request. The body is the begin of an administrator's request with an open
    header line, which swallows the request line of the request after it."""
    smuggled = f"POST /v1/admin/sandboxes/{sandbox_id}/release?reason=x HTTP/1.1\r\nX-Ignore: ".encode()
    if framing == "chunked":
        field = b"Transfer-Encoding: chunked\r\n"
        body = b"%x\r\n" % len(smuggled) + smuggled + b"\r\n0\r\n\r\n"
    else:
        field, body = b"Content-Length: %d\r\n" % len(smuggled), smuggled
    fields = "".join(f"{name}: {value}\r\n" for name, value in track_headers(student).items()).encode()
    return b"POST /v1/allocate HTTP/1.1\r\nHost: broker\r\n" + fields + offer + field + b"\r\n", body


class Response:
    def __init__(self, head: bytes, body: bytes) -> None:
        self.status = int(head.split()[1])
        self.head = head
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class KeepingReceived(asyncio.StreamReaderProtocol):
    """A server that closes with unread bytes resets the connection. A response before the reset stays readable."""

    def connection_lost(self, _: Exception | None) -> None:
        super().connection_lost(None)


class RawClient:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *segments: bytes) -> None:
        for segment in segments:
            with contextlib.suppress(OSError):  # closed by the server
                self._writer.write(segment)
                await self._writer.drain()
            await asyncio.sleep(SEGMENT_GAP_SEC)

    async def receive(self) -> Response | None:
        """Return the next response; None if the server has closed the connection instead."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            body = await self._reader.readexactly(int(length[1])) if length else b""
        except (asyncio.IncompleteReadError, OSError):
            return None
        return Response(head, body)

    async def receive_all(self) -> list[Response]:
        """Return the responses until the server closes the connection."""
        responses = []
        while (response := await self.receive()) is not None:
            responses.append(response)
        return responses


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[RawClient]:
    async with asyncio.timeout(60):
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, protocol = await loop.create_connection(lambda: KeepingReceived(reader), "127.0.0.1", port)
        try:
            yield RawClient(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        finally:
            transport.abort()


@asynccontextmanager
async def proxied(proxy: str, upstream: int) -> AsyncIterator[tuple[int, SegmentingRelay]]:
    try:
        async with SegmentingRelay(upstream).listen() as relay, PROXIES[proxy](relay.port) as port:
            yield port, relay
    except CannotRun as reason:
        pytest.fail(f"this test needs nginx and HAProxy: {reason}")


def gateway_port(stack: Stack) -> int:
    return int(stack.environment["GATEWAY_PORT"])


async def leased(stack: Stack) -> str:
    """Return the sandbox of a student other than the attacker."""
    lease = await stack.allocate("ada")
    assert lease.status_code == 201
    sandbox_id: str = lease.json()["sandbox_id"]
    return sandbox_id


async def assert_leased(stack: Stack, sandbox_id: str) -> None:
    answer = await stack.admin("GET", f"sandboxes/{sandbox_id}")
    assert answer.json()["status"] == "allocated"


async def assert_operator_is_served(stack: Stack, port: int) -> None:
    async with connect(port) as operator:
        await operator.send(OPERATOR)
        answer = await operator.receive()
    assert answer is not None
    assert (answer.status, answer.json.keys()) == (200, (await stack.stats()).keys())


@pytest.mark.parametrize("proxy", PROXIES)
async def test_an_operator_behind_a_proxy_gets_the_response_to_the_own_request(stack: Stack, proxy: str) -> None:
    sandbox_id = await leased(stack)
    async with proxied(proxy, gateway_port(stack)) as (port, _):
        for offer, framing in itertools.product(UPGRADES.values(), FRAMINGS):
            head, body = attack(sandbox_id, f"mallory-{offer!r}-{framing}", offer, framing)
            async with connect(port) as attacker:
                await attacker.send(head + body)
                first = await attacker.receive()
            assert first is not None
            assert first.status == 201
            await assert_operator_is_served(stack, port)
            await assert_leased(stack, sandbox_id)


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_trailer_does_not_end_the_connection_of_the_next_request(whole_stack: Stack, proxy: str) -> None:
    """HAProxy passes trailers on, `Connection` too."""
    head = b"POST /healthz HTTP/1.1\r\nHost: broker\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with proxied(proxy, gateway_port(whole_stack)) as (port, _):
        for trailer in (b"Connection: close", b"Connection: upgrade\r\nUpgrade: x", b"Host: y"):
            async with connect(port) as attacker:
                await attacker.send(head, b"1\r\nx\r\n0\r\n" + trailer + b"\r\n\r\n")
                first = await attacker.receive()
            assert first is not None
            assert first.status == 405
            await assert_operator_is_served(whole_stack, port)


@pytest.mark.parametrize("proxy", PROXIES)
async def test_the_clients_of_these_proxies_share_upstream_connections(whole_stack: Stack, proxy: str) -> None:
    async with proxied(proxy, gateway_port(whole_stack)) as (port, relay):
        for _ in range(10):
            await assert_operator_is_served(whole_stack, port)
        # A request that arrives just after a response can need a second connection.
        assert relay.connections <= 5


async def test_an_upgrade_offer_to_the_gateway_is_ignored_and_its_body_is_read(stack: Stack) -> None:
    sandbox_id = await leased(stack)
    last = OPERATOR.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n"
    for offer, framing in itertools.product(UPGRADES.values(), FRAMINGS):
        head, body = attack(sandbox_id, f"mallory-{offer!r}-{framing}", offer, framing)
        async with connect(gateway_port(stack)) as client:
            await client.send(head, body[:7], body[7:], OPERATOR, last)
            responses = await client.receive_all()
        assert [response.status for response in responses] == [201, 200, 200]
        assert responses[0].json["sandbox_id"] != sandbox_id
        assert responses[1].json.keys() == responses[2].json.keys() == (await stack.stats()).keys()
        await assert_leased(stack, sandbox_id)


@pytest.mark.parametrize("module", PORTS)
async def test_an_upgrade_offer_to_any_service_is_ignored_and_its_body_is_read(
    whole_stack: Stack, module: str
) -> None:
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    for offer in UPGRADES.values():
        head = b"POST /healthz HTTP/1.1\r\nHost: x\r\n" + offer + b"Content-Length: %d\r\n\r\n" % len(smuggled)
        async with connect(int(whole_stack.environment[PORTS[module]])) as client:
            await client.send(head, smuggled, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            responses = await client.receive_all()
        assert [response.status for response in responses] == [405, 200], offer
        assert responses[1].json == {"status": "ok"}


GET, POST = b"GET /healthz HTTP/1.1\r\n", b"POST /healthz HTTP/1.1\r\n"
HOST, CHUNKED = b"Host: x\r\n", b"Transfer-Encoding: chunked\r\n"
ENCODINGS = [b"gzip, chunked", b"chunked, chunked", b"identity", b"", b"chunked\r\nTransfer-Encoding: chunked"]
REFUSED = {
    "no Host": (GET + b"\r\n", 400),
    "two Hosts": (GET + HOST + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT x:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two lengths": (POST + HOST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "two lengths, reversed": (POST + HOST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n", 400),
    "two Content-Lengths": (POST + HOST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
    "a list of Content-Lengths": (POST + HOST + b"Content-Length: 0, 0\r\n\r\n", 400),
    "a signed Content-Length": (POST + HOST + b"Content-Length: +0\r\n\r\n", 400),
    "an empty Content-Length": (POST + HOST + b"Content-Length:\r\n\r\n", 400),
    "a chunk size of 65 bits": (POST + HOST + CHUNKED + b"\r\n10000000000000000\r\n", 400),
    "bare line feeds": (b"GET /healthz HTTP/1.1\nHost: x\n\n", 400),
    "a folded field": (GET + HOST + b"X: a\r\n b\r\n\r\n", 400),
    "a space before the colon": (POST + HOST + b"Content-Length : 0\r\n\r\n", 400),
    "a bare carriage return": (GET + HOST + b"X: a\rContent-Length: 5\r\n\r\n", 400),
    "a head of 20 KiB": (GET + HOST + b"X-Long: " + b"x" * 20_000 + b"\r\n\r\n", 431),
    "101 fields": (GET + HOST + b"X: y\r\n" * 100 + b"\r\n", 431),
    **{
        f"Transfer-Encoding {value!r} in HTTP/1.{minor}": (
            b"POST /healthz HTTP/1.%d\r\n" % minor + HOST + b"Transfer-Encoding: %b\r\n\r\n0\r\n\r\n" % value,
            400,
        )
        for value in ENCODINGS
        for minor in (0, 1)
    },
}


@pytest.mark.parametrize("module", PORTS)
async def test_a_message_with_an_ambiguous_end_is_refused_and_the_bytes_after_it_are_not_executed(
    whole_stack: Stack, module: str
) -> None:
    for name, (refused, status) in REFUSED.items():
        async with connect(int(whole_stack.environment[PORTS[module]])) as client:
            await client.send(refused + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            responses = await client.receive_all()
        assert [response.status for response in responses] == [status], name
        assert b"connection: close" in responses[0].head.lower()
        assert responses[0].json["detail"]["code"]


@pytest.mark.parametrize("module", PORTS)
async def test_the_bytes_after_a_request_that_closes_the_connection_are_not_executed(
    whole_stack: Stack, module: str
) -> None:
    for close in (b"close", b"Close", b"x, close", b"close, keep-alive", b"upgrade, close"):
        closing = GET + HOST + b"Upgrade: x\r\nConnection: " + close + b"\r\n\r\n"
        async with connect(int(whole_stack.environment[PORTS[module]])) as client:
            await client.send(closing + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /metrics HTTP/1.1\r\n")
            responses = await client.receive_all()
        assert [response.status for response in responses] == [200], close
        assert responses[0].json == {"status": "ok"}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """ASGI application that answers with the target and the marker of the request, after its body."""
    while scope["path"] != "/early":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if not message["more_body"]:
            break
    markers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-marker"]
    body = json.dumps([scope["path"], markers]).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.usefixtures("server_programs")
@pytest.mark.parametrize("proxy", PROXIES)
async def test_random_framing_through_a_proxy_never_changes_the_response_to_another_client(proxy: str) -> None:
    served = 0
    async with (
        serving(echo, http=StrictProtocol, ws="none", timeout_keep_alive=600) as url,
        proxied(proxy, int(url.rsplit(":", 1)[1])) as (port, _),
    ):
        for number in range(FUZZED_PAIRS):
            pair = generate_pair(Random(f"{SEED}-{number}"), number)
            async with connect(port) as attacker, connect(port) as victim:
                await attacker.send(*pair.segments)
                await victim.send(*pair.victim)
                answer = await victim.receive()
            context = f"seed {SEED}, pair {number}: {pair.segments}"
            assert answer is not None, context
            # The proxy may report that the server has closed the connection after the message that it refused.
            assert answer.status in (200, 502), context
            if answer.status == 200:
                served += 1
                assert answer.json == [VICTIM.decode(), [f"victim-{number}"]], context
    assert served > FUZZED_PAIRS * 0.8
