"""Event loop of the services: uvloop that connects to the first address of a name that answers (RFC 8305).

uvloop and asyncio try the addresses of a name one after the other, so a silent first address, for example broken
IPv6, uses up the time limit of a connection. The clients of RabbitMQ and PostgreSQL have no option for it.
"""

import asyncio
import itertools
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import uvloop

STAGGER_SEC = 0.25
"""Time for one address before the next one is tried as well."""

T = TypeVar("T")
AddressInfo = tuple[int, int, int, str, Any]


class EventLoop(uvloop.Loop):
    async def create_connection(
        self,
        protocol_factory: Any,
        host: Any = None,
        port: Any = None,
        *,
        ssl: Any = None,
        sock: socket.socket | None = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> Any:
        """Like uvloop's method, with concurrent attempts for a name with several addresses."""
        if sock is None and host is not None and not options.get("local_addr"):
            family = options.get("family", 0)
            found = await self.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
            if len(found) > 1:
                sock = await _connect_to_first(self, _alternate_families(found))
                if ssl and server_hostname is None:
                    server_hostname = host
                host = port = None
                options = {
                    name: value for name, value in options.items() if name not in ("family", "proto", "flags")
                }
        return await super().create_connection(
            protocol_factory, host, port, ssl=ssl, sock=sock, server_hostname=server_hostname, **options
        )


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new event loop, like `asyncio.run`."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        return runner.run(main)


def _alternate_families(found: Sequence[Any]) -> list[AddressInfo]:
    """Return the addresses with alternating families, starting with the family that the resolver prefers."""
    first = [info for info in found if info[0] == found[0][0]]
    other = [info for info in found if info[0] != found[0][0]]
    return [info for pair in itertools.zip_longest(first, other) for info in pair if info is not None]


async def _connect_to_first(loop: asyncio.AbstractEventLoop, found: Sequence[AddressInfo]) -> socket.socket:
    """Return a connected socket. Raises the OSError of the last address if all of them refuse."""
    waiting = list(found)
    attempts: list[asyncio.Task[socket.socket]] = []
    chosen: socket.socket | None = None
    try:
        while True:
            running = {attempt for attempt in attempts if not attempt.done()}
            if waiting:
                attempts.append(loop.create_task(_connect(loop, waiting.pop(0))))
                running.add(attempts[-1])
            elif not running:
                raise next(error for attempt in reversed(attempts) if (error := attempt.exception()) is not None)
            timeout_sec = STAGGER_SEC if waiting else None
            done, _ = await asyncio.wait(running, timeout=timeout_sec, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if attempt.exception() is None:
                    chosen = attempt.result()
                    return chosen
    finally:
        for attempt in attempts:
            attempt.cancel()
        for attempt in attempts:
            attempt.add_done_callback(lambda ended: _close_unused(ended, chosen))


async def _connect(loop: asyncio.AbstractEventLoop, info: AddressInfo) -> socket.socket:
    family, kind, protocol, _, address = info
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
    except BaseException:  # also after a cancellation, because the socket has no other owner yet
        connection.close()
        raise
    return connection


def _close_unused(attempt: asyncio.Task[socket.socket], chosen: socket.socket | None) -> None:
    if not attempt.cancelled() and attempt.exception() is None and attempt.result() is not chosen:
        attempt.result().close()
