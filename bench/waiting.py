"""Scenarios with policies and with a waiting line."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

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
    async with httpx.AsyncClient(timeout=_TIMEOUT_SEC, trust_env=False) as client:
        line = _Line(client, url, asyncio.Semaphore(_LINE_CONNECTIONS))
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
        if not waiting.cancelled():
            waiting.result()  # the gateway refused a student


async def _wait_for_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


@dataclass(frozen=True, slots=True)
class _Line:
    """The students in line. They share a few connections."""

    client: httpx.AsyncClient
    url: str
    slots: asyncio.Semaphore

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

    async def ask(self, student: str, *, wait_sec: int) -> float | None:
        """Join, keep or leave the line. Return the seconds until the next request, None without an answer."""
        headers = {
            "Authorization": f"Bearer {TOKEN}",
            "X-Instruqt-Sandbox-ID": student,
            "X-Sandbox-Name-Prefix": _LINE_PREFIX,
            "Prefer": f"respond-async, wait={wait_sec}",
        }
        try:
            async with self.slots:
                response = await self.client.post(f"{self.url}/v1/allocate", headers=headers)
        except httpx.TransportError:
            return None
        if response.status_code in (503, 504):
            return None
        if response.status_code != (202 if wait_sec else 409):
            raise CannotRun(f"a student in line was answered {response.status_code}: {response.text}", status=1)
        return float(response.headers["Retry-After"])
