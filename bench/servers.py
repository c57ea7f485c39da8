"""Start the measured systems as separate processes with production settings.

They use their own databases and their own virtual host, which are removed at the end.
"""

import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import asyncpg

from bench import baseline, process_stats
from devstack import infrastructure, temporary
from devstack.errors import CannotRun
from devstack.infrastructure import Server
from devstack.output import Terminal
from devstack.pool import wait_until_ready
from devstack.ports import free_port
from devstack.processes import Process, ProcessDied, run_unless_process_dies, spawn
from devstack.settings import ROOT, load
from sandbox_broker.migrate import migrate

# These tokens protect only the servers of this benchmark.
TOKEN = "bench-track-token"  # noqa: S105 (of the broker that the benchmark starts)
ADMIN_TOKEN = "bench-admin-token"  # noqa: S105 (of the same broker)
_CSP_TOKEN = "bench-csp-token"  # noqa: S105 (of the CSP simulator that the benchmark starts)
_EXPIRY_INTERVAL_SEC = 2.0
"""Interval of the reaper's expiry tick. The default of 60 s is longer than a scenario."""
_NEVER_SEC = "1000000"
_NAME_PREFIX = f"broker_bench_{os.getpid()}"
_LOG_TAIL_LINES = 5
# As in production, programs write their log to a pipe, and its reader runs on the same machine. The reader is cat,
# not the benchmark, because its work would delay the measurement. The program keeps the process id of the shell.
_LOG_TO_PIPE = """
log=$1; shift
mkfifo "$log.pipe"
cat <"$log.pipe" >>"$log" &
exec 3>"$log.pipe"
rm "$log.pipe"
exec "$@" >&3 2>&1 3>&-
"""


@dataclass(frozen=True, slots=True)
class Target:
    """System under load."""

    url: str
    processes: Mapping[str, Process]
    """Processes started by the benchmark, by component. `server` is the HTTP server."""
    database_url: str
    database: asyncpg.Connection
    """Connection to fill and inspect the database."""
    rabbitmq_pids: Sequence[int] = ()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[asyncpg.Connection]:
        """Open another connection to the database, for work that runs during the load."""
        connection = await _connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def find_pids(self) -> process_stats.Pids:
        own_pids = {component: [process.pid] for component, process in self.processes.items()}
        postgres_pids = await process_stats.find_postgres_pids(self.database)
        return {**own_pids, "postgres": postgres_pids, "rabbitmq": self.rabbitmq_pids}


@dataclass(frozen=True, slots=True)
class Servers:
    broker: Target
    baseline: Target
    floor: Target
    """HTTP server with a constant response."""
    database_only: Target
    """Database with the broker's schema and no server."""
    amqp_url: str
    """URL of the broker's virtual host."""
    csp_url: str
    """URL of the CSP simulator, which the broker uses as CSP."""
    logs: Path
    processes: Sequence[Process]
    tokens: dict[bool, Sequence[str]] = field(default_factory=dict)
    """Named tokens with and without a quota. All runs share them: the gateway holds all tokens in memory."""

    def truncate_logs(self) -> None:
        """Empty the log files. The readers append, so they continue at the new end."""
        for log in self.logs.iterdir():
            os.truncate(log, 0)


@asynccontextmanager
async def start_servers(terminal: Terminal, *, trace_ratio: float | None = None) -> AsyncIterator[Servers]:
    """Start all measured systems and stop them after the block.

    With `trace_ratio`, the broker traces this share of its requests and exports them to a local collector. Raises
    CannotRun if PostgreSQL or RabbitMQ is unavailable or a process dies, also when the block raises ProcessDied.
    """
    async with AsyncExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory(prefix="sandbox-broker-bench-")))
        postgres, rabbitmq = await infrastructure.find_servers(load(), terminal, stack)
        amqp_url = await stack.enter_async_context(temporary.create_vhost(rabbitmq, _NAME_PREFIX))
        launcher = _Launcher(stack, logs, postgres)
        try:
            csp_url = await launcher.start_csp_simulator()
            tracing = {} if trace_ratio is None else await launcher.start_trace_collector(trace_ratio)
            broker, baseline, floor, database_only = (
                await launcher.start_broker(amqp_url, csp_url, tracing),
                await launcher.start_baseline(),
                await launcher.start_floor(),
                await launcher.create_database_only(),
            )
            await run_unless_process_dies(wait_until_ready(launcher.probe_urls), launcher.processes)
            yield Servers(broker, baseline, floor, database_only, amqp_url, csp_url, logs, launcher.processes)
        except ProcessDied as death:
            tail = (logs / death.process.name).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            raise CannotRun(f"{death}: {' / '.join(tail)}", status=1) from None


@dataclass(frozen=True, slots=True)
class _Launcher:
    """Starts programs. The stack stops them before it drops the databases that they use."""

    stack: AsyncExitStack
    logs: Path
    postgres: Server
    processes: list[Process] = field(default_factory=list)
    probe_urls: dict[str, str] = field(default_factory=dict)
    """URL by program name that answers 200 when the program is ready."""

    async def start_csp_simulator(self) -> str:
        """Start the simulator without accounts, so that the csp-syncer's first sync changes no row."""
        port = free_port()
        arguments = ["csp_simulator", "--port", str(port), "--accounts", "0", "--token", _CSP_TOKEN]
        await self._start("csp-simulator", arguments, port, {}, probe="healthz")
        return _local_url(port)

    async def start_trace_collector(self, ratio: float) -> Mapping[str, str]:
        """Start a trace collector. Returns the services' settings that export traces to it."""
        port = free_port()
        await self._start("collector", ["bench.collector", str(port)], port, {})
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": _local_url(port), "OTEL_TRACES_SAMPLER_ARG": str(ratio)}

    async def start_broker(self, amqp_url: str, csp_url: str, tracing: Mapping[str, str]) -> Target:
        url, database = await self._create_database()
        await migrate(url)
        modules = {"gateway": "gateway", "allocator": "allocator", "reaper": "reaper", "csp-syncer": "csp_syncer"}
        ports = {name: free_port() for name in modules}
        environment = {
            "DATABASE_URL": url,
            "AMQP_URL": amqp_url,
            "BROKER_API_TOKEN": TOKEN,
            "BROKER_ADMIN_TOKEN": ADMIN_TOKEN,
            "CSP_BASE_URL": f"{csp_url}/v2",
            "CSP_API_TOKEN": _CSP_TOKEN,
            **{f"{modules[name].upper()}_PORT": str(port) for name, port in ports.items()},
            "LOG_LEVEL": "INFO",
            "LOG_FORMAT": "json",
            "BIND_HOST": "127.0.0.1",
            "RATE_LIMIT": "",  # disabled, because the whole load comes from one address
            "DRAIN_SEC": "0",
            "ADMIN_WAIT_SEC": "300",  # the response time of a sync is its duration
            "AUTO_EXPIRY_INTERVAL_SEC": str(_EXPIRY_INTERVAL_SEC),
            "SYNC_INTERVAL_SEC": _NEVER_SEC,
            **tracing,
        }
        processes = {
            name: await self._start(name, [module], ports[name], environment) for name, module in modules.items()
        }
        rabbitmq_pids = process_stats.find_listener_pids(urlsplit(amqp_url).port or 5672)
        components = {"server": processes.pop("gateway"), **processes}
        return Target(_local_url(ports["gateway"]), components, url, database, rabbitmq_pids)

    async def start_baseline(self) -> Target:
        url, database = await self._create_database()
        await database.execute(baseline.SCHEMA)
        port = free_port()
        uvicorn = ["uvicorn", "bench.baseline:create_app", "--factory", "--no-access-log", "--port", str(port)]
        environment = {"DATABASE_URL": url, "BROKER_API_TOKEN": TOKEN}
        process = await self._start(
            "baseline", [*uvicorn, "--loop", "uvloop", "--http", "httptools"], port, environment
        )
        return Target(_local_url(port), {"server": process}, url, database)

    async def start_floor(self) -> Target:
        url, database = await self._create_database()
        port = free_port()
        process = await self._start("floor", ["bench.floor", str(port)], port, {})
        return Target(_local_url(port), {"server": process}, url, database)

    async def create_database_only(self) -> Target:
        url, database = await self._create_database()
        await migrate(url)
        return Target("", {}, url, database)

    async def _create_database(self) -> tuple[str, asyncpg.Connection]:
        """Create a database. Returns its URL and a connection to it."""
        url = await self.stack.enter_async_context(temporary.create_database(self.postgres, _NAME_PREFIX))
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
        probe: str = "readyz",
    ) -> Process:
        """Start a Python module, isolated from the caller's settings and from `.env` files."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TZ") if name in os.environ}
        process = await spawn(
            name,
            ["sh", "-c", _LOG_TO_PIPE, "sh", self.logs / name, sys.executable, "-m", *module],
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            cwd=self.logs,
        )
        self.stack.push_async_callback(process.stop)
        self.processes.append(process)
        self.probe_urls[name] = f"{_local_url(port)}/{probe}"
        return process


async def _connect(database_url: str) -> asyncpg.Connection:
    return await asyncpg.connect(database_url, server_settings={"application_name": "bench"})


def _local_url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
