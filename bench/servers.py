"""Everything that is measured, as processes of their own with the settings of production, on databases and a
virtual host that go with the benchmark."""

import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import asyncpg

from bench import baseline, cpu
from devstack import infrastructure, temporary
from devstack.errors import CannotRun
from devstack.infrastructure import Found
from devstack.output import Terminal
from devstack.pool import wait_until_ready
from devstack.ports import free_port
from devstack.processes import Process, ProcessDied, spawn, unless_one_dies
from devstack.settings import ROOT, load
from sandbox_broker.migrate import migrate

# Of servers that live as long as the benchmark.
TOKEN = "bench-track-token"  # noqa: S105
ADMIN_TOKEN = "bench-admin-token"  # noqa: S105
_CSP_TOKEN = "bench-csp-token"  # noqa: S105
EXPIRY_INTERVAL_SEC = 2.0
"""A tick of the reaper; that of production would not come in the time of a scenario."""
_NEVER_SEC = "1000000"
_PREFIX = f"broker_bench_{os.getpid()}"
_LAST_LINES = 5
# The log goes through a file: a pipe would make the benchmark read it, at the cost of who is measured.
_LOGGED = ("sh", "-c", 'log=$1; shift; exec "$@" >>"$log" 2>&1', "sh")


@dataclass(frozen=True, slots=True)
class Target:
    """A system that load is put on."""

    url: str
    processes: Mapping[str, Process]
    """Ours, by the part they play; `server` is what answers HTTP."""
    database_url: str
    database: asyncpg.Connection
    """For looking at it from outside, and for filling it."""
    queue: Sequence[int] = ()
    """RabbitMQ's process."""

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[asyncpg.Connection]:
        """A further connection to the database, for what goes on during the load."""
        connection = await _connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def pids(self) -> cpu.Pids:
        ours = {part: [process.pid] for part, process in self.processes.items()}
        return {**ours, "postgres": await cpu.postgres(self.database), "rabbitmq": self.queue}


@dataclass(frozen=True, slots=True)
class Servers:
    ours: Target
    """The broker."""
    baseline: Target
    floor: Target
    """Nothing but the HTTP server."""
    bare: Target
    """Nothing but a database with our tables."""
    amqp_url: str
    """Of the broker."""
    csp: str
    """The CSP simulator that the broker has for CSP."""
    logs: Path
    processes: Sequence[Process]

    def forget_logs(self) -> None:
        """Empties the log files, which are written at their ends."""
        for log in self.logs.iterdir():
            os.truncate(log, 0)


@asynccontextmanager
async def running(terminal: Terminal, *, traced: float | None = None) -> AsyncIterator[Servers]:
    """With `traced` the broker traces this part of the requests, to a collector beside it.

    Raises CannotRun when there is no way to have PostgreSQL or RabbitMQ, and when a process of ours ends, also
    the one that the block is told of by ProcessDied."""
    async with AsyncExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory(prefix="sandbox-broker-bench-")))
        found_database, found_broker = await infrastructure.find(load(), terminal, stack)
        amqp_url = await stack.enter_async_context(temporary.vhost(found_broker, _PREFIX))
        launcher = _Launcher(stack, logs, found_database)
        try:
            csp = await launcher.simulator()
            tracing = {} if traced is None else await launcher.tracing(traced)
            ours, baseline, floor, bare = (
                await launcher.broker(amqp_url, csp, tracing),
                await launcher.baseline(),
                await launcher.floor(),
                await launcher.bare(),
            )
            await unless_one_dies(wait_until_ready(launcher.ready), launcher.processes)
            yield Servers(ours, baseline, floor, bare, amqp_url, csp, logs, launcher.processes)
        except ProcessDied as death:
            last = (logs / death.process.name).read_text(errors="replace").splitlines()[-_LAST_LINES:]
            raise CannotRun(f"{death}: {' / '.join(last)}", status=1) from None


@dataclass(frozen=True, slots=True)
class _Launcher:
    """Starts programs; they end with the stack, before the databases that they use go."""

    stack: AsyncExitStack
    logs: Path
    found: Found
    processes: list[Process] = field(default_factory=list)
    ready: dict[str, str] = field(default_factory=dict)
    """What answers when they can be used."""

    async def simulator(self) -> str:
        """Without accounts, so that the sync with which the csp-syncer begins changes nothing."""
        port = free_port()
        arguments = ["csp_simulator", "--port", str(port), "--accounts", "0", "--token", _CSP_TOKEN]
        await self._start("csp-simulator", arguments, port, {}, ready="healthz")
        return _local(port)

    async def tracing(self, ratio: float) -> Mapping[str, str]:
        """Starts a collector; returns the settings that send it traces."""
        port = free_port()
        await self._start("collector", ["bench.collector", str(port)], port, {})
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": _local(port), "OTEL_TRACES_SAMPLER_ARG": str(ratio)}

    async def broker(self, amqp_url: str, csp: str, tracing: Mapping[str, str]) -> Target:
        url, database = await self._database()
        await migrate(url)
        modules = {"gateway": "gateway", "allocator": "allocator", "reaper": "reaper", "csp-syncer": "csp_syncer"}
        ports = {name: free_port() for name in modules}
        environment = {
            "DATABASE_URL": url,
            "AMQP_URL": amqp_url,
            "BROKER_API_TOKEN": TOKEN,
            "BROKER_ADMIN_TOKEN": ADMIN_TOKEN,
            "CSP_BASE_URL": f"{csp}/v2",
            "CSP_API_TOKEN": _CSP_TOKEN,
            **{f"{modules[name].upper()}_PORT": str(port) for name, port in ports.items()},
            "LOG_LEVEL": "INFO",
            "LOG_FORMAT": "json",
            "BIND_HOST": "127.0.0.1",
            "RATE_LIMIT": "",  # all load comes from one address
            "DRAIN_SEC": "0",
            "ADMIN_WAIT_SEC": "300",  # the time of a sync is its answer's
            "AUTO_EXPIRY_INTERVAL_SEC": str(EXPIRY_INTERVAL_SEC),
            "SYNC_INTERVAL_SEC": _NEVER_SEC,
            **tracing,
        }
        processes = {
            name: await self._start(name, [module], ports[name], environment) for name, module in modules.items()
        }
        queue = cpu.listener(urlsplit(amqp_url).port or 5672)
        parts = {"server": processes.pop("gateway"), **processes}
        return Target(_local(ports["gateway"]), parts, url, database, queue)

    async def baseline(self) -> Target:
        url, database = await self._database()
        await database.execute(baseline.SCHEMA)
        port = free_port()
        uvicorn = ["uvicorn", "bench.baseline:create_app", "--factory", "--no-access-log", "--port", str(port)]
        environment = {"DATABASE_URL": url, "BROKER_API_TOKEN": TOKEN}
        process = await self._start(
            "baseline", [*uvicorn, "--loop", "uvloop", "--http", "httptools"], port, environment
        )
        return Target(_local(port), {"server": process}, url, database)

    async def floor(self) -> Target:
        url, database = await self._database()
        port = free_port()
        process = await self._start("floor", ["bench.floor", str(port)], port, {})
        return Target(_local(port), {"server": process}, url, database)

    async def bare(self) -> Target:
        url, database = await self._database()
        await migrate(url)
        return Target("", {}, url, database)

    async def _database(self) -> tuple[str, asyncpg.Connection]:
        """A new one, and a connection of ours to it."""
        url = await self.stack.enter_async_context(temporary.database(self.found, _PREFIX))
        database = await _connect(url)
        self.stack.push_async_callback(database.close)
        return url, database

    async def _start(
        self,
        name: str,
        module: Sequence[str],
        port: int,
        environment: Mapping[str, str],
        *,
        ready: str = "readyz",
    ) -> Process:
        """Starts a module of Python. It finds nothing of the caller's settings, and no `.env` file."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TZ") if name in os.environ}
        process = await spawn(
            name,
            [*_LOGGED, self.logs / name, sys.executable, "-m", *module],
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            cwd=self.logs,
        )
        self.stack.push_async_callback(process.stop)
        self.processes.append(process)
        self.ready[name] = f"{_local(port)}/{ready}"
        return process


async def _connect(database_url: str) -> asyncpg.Connection:
    return await asyncpg.connect(database_url, server_settings={"application_name": "bench"})


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"
