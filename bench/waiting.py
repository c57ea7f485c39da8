"""Scenarios with policies and with a waiting line."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench import allocation
from bench.meter import Run
from bench.servers import ADMIN_TOKEN, TOKEN, Servers
from bench.sizes import Sizes
from devstack.errors import CannotRun
from sandbox_broker.runtime.service import cancel_and_wait

_PREFIXES = 20
"""Name prefixes of the load. The students in line wait for another one, so the load is served directly."""
_LINE_PREFIX = "never-"
_CONNECTIONS = 200
_POLICIES = 100
_LINE_CONNECTIONS = 10
"""Connections of all students in line. With one each, this client would take more processor time than the load."""
_TIMEOUT_SEC = 30.0
_BACKOFF_SEC = 1.0


async def run_with_waiting(servers: Servers, sizes: Sizes, *, waiting: int) -> Run:
    """Run while `waiting` students repeat their requests for sandboxes that do not exist."""
    async with _keep_waiting(servers.broker.url, waiting):
        run = await allocation.run_prefixes(servers, sizes, prefixes=_PREFIXES)
        left = await servers.broker.database.fetchval("SELECT count(*) FROM waiting")
    return run.with_problems((f"{left} students wait, expected {waiting}",) if left != waiting else ())


async def run_with_policies(servers: Servers, sizes: Sizes) -> Run:
    """Run with policies that do not match the requests, while no student waits."""
    policies = [
        {"name": f"policy-{number}", "match": {"track_name": f"track-{number}"}, "max_active": 10}
        for number in range(_POLICIES)
    ]
    await _put_policies(servers.broker.url, policies)
    try:
        return await allocation.run_broker(servers, sizes, connections=_CONNECTIONS)
    finally:
        await _put_policies(servers.broker.url, [])


async def _put_policies(url: str, policies: list[dict[str, Any]]) -> None:
    async with httpx.AsyncClient(timeout=_TIMEOUT_SEC, trust_env=False) as client:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        response = await client.put(f"{url}/v1/admin/policies", headers=headers, json={"policies": policies})
    if response.status_code != 200:
        raise CannotRun(f"the policies were answered {response.status_code}: {response.text}", status=1)


@asynccontextmanager
async def _keep_waiting(url: str, students: int) -> AsyncIterator[None]:
    """Let students join the line, and repeat their requests until the end of the block. Then they leave."""
    names = [f"waiting-{number}" for number in range(students)]
    joined = {name: asyncio.Event() for name in names}
    line = _Line(url)
    waiting = asyncio.create_task(line.wait(joined))
    try:
        await asyncio.wait(
            [waiting, asyncio.create_task(_wait_for_all(joined.values()))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        yield
    finally:
        await cancel_and_wait(waiting)
        await asyncio.gather(*(line.ask(name, wait_sec=0) for name in names))
        line.close()
    if not waiting.cancelled():
        waiting.result()  # the gateway refused a student


async def _wait_for_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


class _Line:
    """The students in line. They share a few connections.

    They use no client library, because it would take more processor time per request than the broker, and so slow
    down the measured load.
    """

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._slots = asyncio.Semaphore(_LINE_CONNECTIONS)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def wait(self, joined: Mapping[str, asyncio.Event]) -> None:
        async with asyncio.TaskGroup() as students:
            for name, event in joined.items():
                students.create_task(self._repeat(name, event))

    async def _repeat(self, student: str, joined: asyncio.Event) -> None:
        while True:
            pause_sec = await self.ask(student, wait_sec=900)
            if pause_sec is not None:
                joined.set()
            await asyncio.sleep(pause_sec or _BACKOFF_SEC)

    async def ask(self, student: str, *, wait_sec: int) -> int | None:
        """Join, keep or leave the line. Return the seconds until the next request, None without an answer."""
        request = (
            f"POST /v1/allocate HTTP/1.1\r\nHost: {self._address.netloc}\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"X-Instruqt-Sandbox-ID: {student}\r\nX-Sandbox-Name-Prefix: {_LINE_PREFIX}\r\n"
            f"Prefer: respond-async, wait={wait_sec}\r\nContent-Length: 0\r\n\r\n"
        )
        async with self._slots:
            try:
                async with asyncio.timeout(_TIMEOUT_SEC):
                    head, body = await self._exchange(request.encode())
            except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
                return None
        status = int(head.split()[1])
        if status in (503, 504):
            return None
        if status != (202 if wait_sec else 409):
            raise CannotRun(f"a student in line was answered {status}: {body.decode()}", status=1)
        return _field(head, b"retry-after")

    async def _exchange(self, request: bytes) -> tuple[bytes, bytes]:
        """Return the head and the body of the response."""
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(_field(head, b"content-length"))
        except BaseException:  # also after a cancellation, because the connection has no other owner yet
            writer.close()
            raise
        self._idle.append((reader, writer))
        return head, body

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def _field(head: bytes, name: bytes) -> int:
    """Return the number in a header field of a response."""
    return int(head.partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0])
