"""The whole broker as processes, for tests over its public interfaces."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import httpx

from devstack import fork_server
from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.processes import Process, spawn, stop_all
from devstack.testing import clear_tables
from sandbox_broker.contract import topology
from sandbox_broker.migrate import migrate
from tests.integration import instruqt_events

ROOT = Path(__file__).parents[2]
TRACK_TOKEN = "test-track-token"
ADMIN_TOKEN = "test-admin-token"
CSP_TOKEN = "test-csp-token"
CONSOLE_SECRET = "test-console-secret"
PORTS = {
    "gateway": "GATEWAY_PORT",
    "allocator": "ALLOCATOR_PORT",
    "reaper": "REAPER_PORT",
    "csp_syncer": "CSP_SYNCER_PORT",
    "provisioner": "PROVISIONER_PORT",
    "console": "CONSOLE_PORT",
}
FORKABLE = {
    ("-m",),
    (str(ROOT / "tests" / "integration" / "crash_runner.py"),),
    (str(ROOT / "tests" / "integration" / "frequent_metrics.py"),),
    (str(ROOT / "tests" / "chaos" / "mutating.py"),),
}
"""Launchers that run in a copy of a fork server. They only replace names that the service reads later."""


@dataclass
class Stack:
    """Running broker: one process per service. `start_service` adds processes."""

    environment: dict[str, str]
    client: httpx.AsyncClient
    database: asyncpg.Pool
    simulator: str
    launcher: tuple[str, ...] = ("-m",)
    settings_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Additional settings, by module or by process name."""
    on_line: Callable[[str, str], None] | None = None
    """Called with the process name and each line of its output."""
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environment['GATEWAY_PORT']}"

    async def start_service(
        self,
        module: str,
        *,
        name: str | None = None,
        launcher: tuple[str, ...] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a service and wait until it is ready. A process with a `name` gets its own port."""
        process, url = await self.launch(module, name=name, launcher=launcher, settings=settings)
        await self.until_ready(f"{url}/readyz", process)
        return process

    async def launch(
        self,
        module: str,
        *,
        name: str | None = None,
        launcher: tuple[str, ...] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> tuple[Process, str]:
        """Start a service. Return the process and its URL without waiting until it is ready."""
        environment = {**self.environment, **self.settings_of.get(module, {})}
        if name is not None:
            environment |= {PORTS[module]: str(free_port()), **self.settings_of.get(name, {})}
        environment |= settings or {}
        process_name, launcher = name or module, launcher or self.launcher
        on_line = None if self.on_line is None else partial(self.on_line, process_name)
        directory = ROOT / "tests"
        if launcher in FORKABLE and fork_server.can_fork(environment):
            process = await fork_server.fork(
                process_name, module, *launcher, env=environment, cwd=directory, on_line=on_line
            )
        else:
            process = await spawn(
                process_name, [sys.executable, *launcher, module], env=environment, cwd=directory, on_line=on_line
            )
        self.processes[process_name] = process
        return process, f"http://127.0.0.1:{environment[PORTS[module]]}"

    async def start_simulator(self) -> None:
        port = str(urlsplit(self.simulator).port)
        process = await spawn(
            "simulator",
            [sys.executable, "-m", "csp_simulator", "--port", port, "--token", CSP_TOKEN],
            env=self.environment,
        )
        self.processes["simulator"] = process
        await self.until_ready(f"{self.simulator}/healthz", process)

    async def until_ready(self, url: str, process: Process) -> None:
        state = "no response"

        async def ready() -> bool:
            nonlocal state
            if not process.running:
                raise AssertionError(f"{process.name} {process.ending}: {list(process.tail)}")
            is_ready, state = await self._ask_readiness(url)
            return is_ready

        try:
            await wait_until(ready, every_sec=0.2)
        except AssertionError as error:
            raise AssertionError(f"{process.name}: {state}; {list(process.tail)}") from error

    async def is_ready(self, url: str) -> bool:
        return (await self._ask_readiness(url))[0]

    async def _ask_readiness(self, url: str) -> tuple[bool, str]:
        """Return whether the service is ready, and the body of its response or the error."""
        try:
            response = await self.client.get(url)
        except httpx.TransportError as error:
            return False, repr(error)
        return response.status_code == 200, response.text

    async def allocate(self, student: str, **headers: str) -> httpx.Response:
        return await self.client.post(
            f"{self.url}/v1/allocate",
            headers={**track_headers(student), **{k.replace("_", "-"): v for k, v in headers.items()}},
        )

    async def release(self, sandbox_id: str, student: str) -> httpx.Response:
        return await self.client.post(
            f"{self.url}/v1/sandboxes/{sandbox_id}/mark-for-deletion", headers=track_headers(student)
        )

    async def end_play(self, student: str, *, ended_at: float) -> httpx.Response:
        """Send the webhook of Instruqt about the end of the student's play, at `ended_at` (Unix seconds)."""
        headers, body = instruqt_events.sign_event(student, ended_at=ended_at)
        return await self.client.post(f"{self.url}/v1/instruqt/events", headers=headers, content=body)

    async def stats(self) -> dict[str, int]:
        response = await self.client.get(f"{self.url}/v1/admin/stats", headers=ADMIN)
        response.raise_for_status()
        counts: dict[str, int] = response.json()
        return counts

    async def sync(self, **parameters: str) -> httpx.Response:
        return await self.client.post(f"{self.url}/v1/admin/sync", headers=ADMIN, params=parameters)

    async def admin(self, method: str, path: str, **parameters: str) -> httpx.Response:
        return await self.client.request(method, f"{self.url}/v1/admin/{path}", headers=ADMIN, params=parameters)

    async def issue_token(self, **grant: Any) -> str:
        """Issue a named token; `grant` has the fields of the API."""
        response = await self.client.post(f"{self.url}/v1/admin/tokens", headers=ADMIN, json=grant)
        assert response.status_code == 201, response.text
        token: str = response.json()["token"]
        return token

    async def fill(self, accounts: int, name_prefix: str = "sandbox-") -> None:
        """Reset the broker and CSP to this number of accounts, all available."""
        await clear_tables(self.database)
        await self._forget_newest_lease()
        await self.control("POST", "reset", {"accounts": accounts, "name_prefix": name_prefix})

        async def synced() -> bool:
            return (await self.sync(force="true")).status_code == 200

        await wait_until(synced)
        await wait_until(self.serves_requests)
        stats = await self.stats()
        assert stats["available"] == accounts, stats

    async def _forget_newest_lease(self) -> None:
        """Purge the queue, because an allocator that starts later refuses a database without this lease."""
        connection = await aio_pika.connect(self.environment["AMQP_URL"].split(",")[0])
        async with connection, connection.channel() as channel:
            await (await channel.get_queue(topology.NEWEST_LEASE.name, ensure=False)).purge()

    async def forget_other_broker(self) -> None:
        """Restart the allocator without reports of another broker. It would go on to report it for ten minutes."""
        await self.processes["allocator"].stop()
        await self.forget_allocators()
        await self.start_service("allocator")

    async def serves_requests(self) -> bool:
        """Return whether the gateway has detected the allocator."""
        return (await self.release("0", "student")).status_code == 404

    async def forget_allocators(self) -> None:
        """Delete the reports of all allocators. A new one would wait two seconds for that of a killed one."""
        await self.database.execute("DELETE FROM allocators")

    async def nothing_pending(self) -> bool:
        return (await self.stats())["pending_deletion"] == 0

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        response = await self.client.request(method, f"{self.simulator}/_control/{path}", json=body)
        response.raise_for_status()
        return response.json() if response.content else None

    async def deletions(self) -> list[dict[str, Any]]:
        """Return the deletion requests received by CSP, in order."""
        calls: list[dict[str, Any]] = (await self.control("GET", "calls?method=DELETE"))["calls"]
        return calls

    async def assert_sound(self) -> None:
        """Check the invariants of the database, which hold at any time.

        A sandbox has at most one lease, a holder at most one open lease. Open leases match allocated sandboxes.
        """
        duplicates = """
            SELECT count(*) FROM (
                SELECT sandbox_id FROM leases GROUP BY sandbox_id HAVING count(*) > 1
                UNION ALL
                SELECT holder FROM leases WHERE ended_at IS NULL GROUP BY holder HAVING count(*) > 1
            ) t
        """
        assert await self.database.fetchval(duplicates) == 0
        mismatches = """
            SELECT count(*) FROM leases FULL JOIN sandboxes USING (sandbox_id)
            WHERE (ended_at IS NULL AND lease_id IS NOT NULL) <> coalesce(status = 'allocated', false)
        """
        assert await self.database.fetchval(mismatches) == 0


ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def track_headers(student: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TRACK_TOKEN}", "X-Instruqt-Sandbox-ID": student}


@asynccontextmanager
async def run_stack(
    database_url: str,
    amqp_url: str,
    *,
    launcher: tuple[str, ...] = ("-m",),
    settings: Mapping[str, str] | None = None,
    settings_of: Mapping[str, Mapping[str, str]] | None = None,
    on_line: Callable[[str, str], None] | None = None,
    simulator_port: int | None = None,
    without: Collection[str] = (),
) -> AsyncIterator[Stack]:
    await migrate(database_url)
    simulator_port = simulator_port or free_port()
    simulator = f"http://127.0.0.1:{simulator_port}"
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PORT",)},
        "DATABASE_URL": database_url,
        "AMQP_URL": amqp_url,
        "BROKER_API_TOKEN": TRACK_TOKEN,
        "BROKER_ADMIN_TOKEN": ADMIN_TOKEN,
        "INSTRUQT_WEBHOOK_SECRET": instruqt_events.SECRET,
        "BIND_HOST": "127.0.0.1,::1",
        "RATE_LIMIT": "",  # all students come from one address
        "DRAIN_SEC": "0",
        "CSP_BASE_URL": f"{simulator}/v2",
        "CONSOLE_SECRET": CONSOLE_SECRET,
        "CSP_API_TOKEN": CSP_TOKEN,
        "CLEANUP_BATCH_DELAY_SEC": "0",
        "CLEANUP_INTERVAL_SEC": "5",
        "AUTO_EXPIRY_INTERVAL_SEC": "2",
        "DELETION_BACKOFF_BASE_SEC": "0.2",
        **{variable: str(free_port()) for variable in PORTS.values()},
        **(settings or {}),
    }
    environment.setdefault("BROKER_API_URL", f"http://127.0.0.1:{environment['GATEWAY_PORT']}")
    environment.setdefault("CONSOLE_URL", f"http://127.0.0.1:{environment['CONSOLE_PORT']}")
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
    async with (
        httpx.AsyncClient(timeout=30, limits=limits, trust_env=False) as client,
        asyncpg.create_pool(database_url, min_size=1, max_size=2) as database,
    ):
        stack = Stack(environment, client, database, simulator, launcher, settings_of or {}, on_line)
        try:
            await asyncio.gather(
                stack.start_simulator(),
                *(stack.start_service(module) for module in PORTS if module not in without),
            )
            yield stack
        finally:
            await stop_all(stack.processes.values())
