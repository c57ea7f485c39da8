"""Differential test of request framing: random request streams, parsed by the protocol and by h11.

`SEARCH=100000` runs as many pairs with a random seed; `SEARCH_SEED` repeats them.
"""

import asyncio
import contextlib
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest

from csp_simulator.testing import serving
from devstack.request_fuzz import Pair, generate_pair
from devstack.strict_http import (
    EARLY,
    HOP_BY_HOP,
    Ending,
    Reading,
    Request,
    Response,
    find_violation,
    read_requests,
)
from sandbox_broker.runtime.uvicorn_protocol import StrictProtocol

ROUNDS = 12
PAIRS = int(os.environ.get("SEARCH", "0")) or 2400
SEED = int(os.environ.get("SEARCH_SEED", secrets.randbits(32) if "SEARCH" in os.environ else 20261129))
PAIRS_PER_CONNECTION = 20
PATIENCE_SEC = 30.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_RESPONSE = re.compile(
    rb"HTTP/1\.1 (\d{3}) (?:[^\r\n]*\r\n)+?content-length: (\d+)\r\n(?:[^\r\n]+\r\n)*\r\n", re.IGNORECASE
)


class EchoApp:
    """ASGI application that records each answered request."""

    def __init__(self) -> None:
        self.executed: list[Request] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        body = bytearray()
        is_early = target.startswith(EARLY)
        more = not is_early
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        fields = sorted(
            (name, _normalize(name, value)) for name, value in scope["headers"] if name not in HOP_BY_HOP
        )
        self.executed.append(
            Request(scope["method"].encode(), target, tuple(fields), None if is_early else bytes(body))
        )
        headers = [(b"content-length", b"0"), (b"x-executed", b"%d" % (len(self.executed) - 1))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})


def _normalize(name: bytes, value: bytes) -> bytes:
    value = value.strip(b" \t")
    return value.lower() if name == b"transfer-encoding" else value


def _length(match: re.Match[bytes]) -> int:
    """Return the length of a response from the match of its head."""
    return match.end() + int(match[2])


class Exchange:
    """Bytes sent and received on one connection.

    A plain socket, because asyncio's streams drop received bytes when a later write fails.
    """

    def __init__(self, app: EchoApp, connection: socket.socket) -> None:
        self.sent: list[bytes] = []
        self.responses: list[Response] = []
        self.continues = 0
        self.closed_by_server = False
        app.executed.clear()
        self._app = app
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._ended = False

    @property
    def is_over(self) -> bool:
        """Return whether the server has closed the connection or must close it after an error."""
        return self._ended or self._ends_with_error

    @property
    def _ends_with_error(self) -> bool:
        return bool(self.responses) and self.responses[-1].executed is None

    @property
    def reading(self) -> Reading:
        return read_requests(b"".join(self.sent))

    async def run(self, pair: Pair) -> None:
        await self._send(pair.segments)
        if not pair.pipelined:
            await self._receive(self.reading.answerable)
        await self._send(pair.victim)
        await self._receive(self.reading.answerable)

    async def finish(self) -> None:
        """Read until the connection ends. The client closes it unless the server has to."""
        if not (server_closes := self.is_over or self.reading.ending is Ending.CLOSED):
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
        while not self._ended:
            await self._receive_one()
        self.closed_by_server = server_closes or self._ends_with_error

    def find_violation(self) -> str | None:
        return find_violation(
            self.reading,
            self.responses,
            self._app.executed,
            continues=self.continues,
            closed=self.closed_by_server,
        )

    async def _send(self, segments: tuple[bytes, ...]) -> None:
        for segment in segments:
            self.sent.append(segment)
            with contextlib.suppress(OSError):  # closed by the server, as _receive detects
                await self._loop.sock_sendall(self._connection, segment)
            for _ in range(3):  # the server reads the segment before the next one is sent
                await asyncio.sleep(0)

    async def _receive(self, count: int) -> None:
        while len(self.responses) < count and not self.is_over:
            await self._receive_one()

    async def _receive_one(self) -> None:
        while (match := _RESPONSE.match(self._received)) is None or len(self._received) < match.end() + int(
            match[2]
        ):
            try:
                received = await self._loop.sock_recv(self._connection, 1 << 16)
            except OSError:
                received = b""
            if not received:
                assert not self._received, f"part of a response: {self._received!r}"
                self._ended = True
                return
            self._received += received
            self._skip_continue()
        head = self._received[: match.end()]
        self._received = self._received[_length(match) :]
        self._skip_continue()
        executed = re.search(rb"x-executed: (\d+)", head)
        self.responses.append(Response(int(match[1]), int(executed[1]) if executed else None))

    def _skip_continue(self) -> None:
        while self._received.startswith(CONTINUE):
            self._received = self._received.removeprefix(CONTINUE)
            self.continues += 1


@contextlib.asynccontextmanager
async def served(app: EchoApp) -> AsyncIterator[str]:
    async with serving(app, http=StrictProtocol, ws="none", timeout_keep_alive=600) as url:
        yield url


@contextlib.asynccontextmanager
async def connect(url: str) -> AsyncIterator[socket.socket]:
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        yield connection


@pytest.mark.parametrize("round_number", range(ROUNDS))
async def test_every_stream_is_parsed_like_h11_or_refused(round_number: int) -> None:
    numbers = range(round_number, PAIRS, ROUNDS)
    app = EchoApp()
    async with served(app) as url:
        remaining = iter(numbers)
        while (number := next(remaining, None)) is not None:
            seen = [number]
            async with connect(url) as connection:
                exchange = Exchange(app, connection)
                try:
                    async with asyncio.timeout(PATIENCE_SEC):
                        await exchange.run(generate_pair(Random(f"{SEED}-{number}"), number))
                        while (
                            not exchange.is_over
                            and exchange.reading.ending is Ending.OPEN
                            and len(seen) < PAIRS_PER_CONNECTION
                            and (number := next(remaining, None)) is not None
                        ):
                            seen.append(number)
                            await exchange.run(generate_pair(Random(f"{SEED}-{number}"), number))
                        await exchange.finish()
                    problem = exchange.find_violation()
                except TimeoutError:
                    problem = exchange.find_violation() or "the connection stays open"
            assert problem is None, _report(problem, seen, exchange)


def _report(problem: str, numbers: list[int], exchange: Exchange) -> str:
    sent = "\n".join(f"  {segment!r}" for segment in exchange.sent)
    return f"{problem}\nSEARCH_SEED={SEED}, pairs {numbers}\n{exchange.responses}\nsegments:\n{sent}"
