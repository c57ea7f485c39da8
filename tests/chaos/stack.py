"""The broker under test, with private PostgreSQL and RabbitMQ servers and proxies on the links.

Most services have two processes. Dead processes are restarted, as Kubernetes would do.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from aio_pika.abc import AbstractConnection

from devstack import faketime
from devstack.ports import free_port
from devstack.postgres import PrivatePostgres
from devstack.processes import Process
from devstack.rabbitmq import PrivateRabbitMQ
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_connection
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Servers, start_cluster, start_single_servers
from tests.integration.stack import ADMIN, PORTS, Stack, run_stack

SERVICES = {
    "gateway": "gateway",
    "second gateway": "gateway",
    "allocator": "allocator",
    "second allocator": "allocator",
    "reaper": "reaper",
    "second reaper": "reaper",
    "csp_syncer": "csp_syncer",
    "provisioner": "provisioner",
    "second provisioner": "provisioner",
}
"""Module of each process."""
NEWCOMER = "allocator of another broker"
"""Process of a fault in setup_faults.py."""
EVENTS_QUEUE = "chaos.events"
"""Queue that keeps every event of the round."""
LAUNCHER = Path(__file__).with_name("crash_runner.py")
LAB_SEC = 100.0
GRACE_SEC = 25.0
"""Together longer than a script keeps retrying, as in production, so that a retry after a lost response still finds
the lease.
"""
QUERY_SEC = 5.0
RESTART_SEC = 1.0
"""Pause between the exit of a process and its restart."""
HOLD_SEC = 10.0
"""Time from the replacement of a broken sandbox to its deletion."""
SETTINGS = {
    "LAB_DURATION_HOURS": str(LAB_SEC / 3600),
    "GRACE_PERIOD_MINUTES": str(GRACE_SEC / 60),
    "STANDBY_HOURS": str((LAB_SEC + GRACE_SEC) / 3600),
    "BROKEN_HOLD_HOURS": str(HOLD_SEC / 3600),
    "CLEANUP_INTERVAL_SEC": "2",
    "CLEANUP_BATCH_SIZE": "50",
    "CLEANUP_CONCURRENCY": "8",
    "DELETION_BACKOFF_BASE_SEC": "0.5",
    "DELETION_BACKOFF_MAX_SEC": "2",
    "DELETION_MAX_ATTEMPTS": "1000",  # a permanently failed deletion would wait for an operator
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "2",
    "SYNC_INTERVAL_SEC": "20",
    "SYNC_MAX_GROWTH_FRACTION": "1000",  # a held sync would wait for an operator
    "STOCK_ENABLED": "true",
    "STOCK_INTERVAL_SEC": "2",
    "CREATE_PER_MINUTE": "600",
    "CREATE_TIMEOUT_SEC": "5",
    "CREATE_BACKOFF_BASE_SEC": "0.5",
    "CREATE_BACKOFF_MAX_SEC": "2",
    "CREATE_MAX_FAILURES": "1000",  # a stopped stock would wait for an operator
    "CREATE_SYNC_SEC": "2",
    "WAITING_TTL_SEC": "20",
}


@dataclass
class ChaosBroker:
    """Running broker with handles to its servers, processes and links."""

    stack: Stack
    servers: Servers
    links: dict[str, list[Proxy]]
    """By name, such as `second gateway to RabbitMQ`. One proxy for each address of the server."""
    gateways: list[str]
    """URLs of the gateways."""
    directory: Path
    exits: list[tuple[str, str]] = field(default_factory=list)
    """Name of each exited process, and how it exited."""
    _restart_tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def postgres(self) -> PrivatePostgres:
        """The server, or the primary of the pair."""
        return self.servers.postgres if self.servers.pair is None else self.servers.pair.primary

    @property
    def rabbitmq(self) -> PrivateRabbitMQ:
        """The server, or the first node of the cluster."""
        return self.servers.rabbitmq

    def process(self, name: str) -> Process:
        return self.stack.processes[name]

    def crash_file(self, module: str) -> Path:
        """Return the file with a crash point; crash_runner.py kills the process that reaches the point."""
        return _get_crash_file(self.directory, module)

    def clock_file(self, name: str) -> Path:
        """Return the file with the clock offset of a process; see devstack.faketime."""
        return _get_clock_file(self.directory, name)

    async def sync(self) -> None:
        """Request a sync through all gateways, because one of them may be disconnected."""
        requests = (self.stack.client.post(f"{gateway}/v1/admin/sync", headers=ADMIN) for gateway in self.gateways)
        await asyncio.gather(*requests, return_exceptions=True)

    @asynccontextmanager
    async def connect_to_rabbitmq(self) -> AsyncIterator[AbstractConnection]:
        """Open a connection to RabbitMQ, without a proxy."""
        async with open_connection(self.rabbitmq.url) as connection:
            yield connection

    async def find_active_allocator(self) -> str:
        """Return the allocator with the newest statement. Raises OSError if none is connected to the database."""
        async with asyncio.timeout(QUERY_SEC):
            backends = await self.stack.database.fetch(
                "SELECT client_port FROM pg_stat_activity WHERE application_name = $1 ORDER BY query_start DESC",
                topology.ALLOCATOR_COMMANDS.name,
            )
        for backend in backends:
            for name in ("allocator", "second allocator"):
                links = self.links[f"{name} to PostgreSQL"]
                if any(backend["client_port"] in link.outgoing_ports for link in links):
                    return name
        raise OSError("no allocator is connected to the database")

    async def wait_until_ready(self) -> None:
        """Wait until all processes are ready, also across restarts."""
        for name, module in SERVICES.items():
            port = self.stack.settings_of[name][PORTS[module]]
            while not await self.stack.is_ready(f"http://127.0.0.1:{port}/readyz"):  # noqa: ASYNC110 (readiness can only be polled)
                await asyncio.sleep(0.1)

    async def wait_for_standby(self) -> None:
        """Wait until all processes are ready and both allocators consume the command queue.

        Readiness alone is not enough, because a ready allocator may still be connecting.
        """
        await self.wait_until_ready()
        for name, module in SERVICES.items():
            while module == "allocator" and not await self._is_consuming(name):  # noqa: ASYNC110 (readiness can only be polled)
                await asyncio.sleep(0.1)

    async def _is_consuming(self, allocator: str) -> bool:
        port = self.stack.settings_of[allocator][PORTS["allocator"]]
        try:
            metrics = await self.stack.client.get(f"http://127.0.0.1:{port}/metrics")
        except httpx.TransportError:
            return False
        return f'broker_rabbitmq_connected{{connection="{topology.ALLOCATOR_COMMANDS.name}"}} 1.0' in metrics.text

    def start_restarting(self) -> None:
        """Restart every process that exits from now on."""
        self._restart_tasks = [asyncio.create_task(self._restart_on_exit(name)) for name in SERVICES]

    async def stop_restarting(self) -> None:
        for task in self._restart_tasks:
            task.cancel()
        await asyncio.gather(*self._restart_tasks, return_exceptions=True)
        for name in SERVICES:
            if name in self.stack.processes:
                self.process(name).send(signal.SIGCONT)  # a frozen process would not handle SIGTERM

    async def _restart_on_exit(self, name: str) -> None:
        module = SERVICES[name]
        while True:
            process = self.process(name)
            await process.wait()
            self.exits.append((name, process.ending))
            await asyncio.sleep(RESTART_SEC)
            await self.stack.launch(module, name=None if name == module else name)


@asynccontextmanager
async def start_broker(
    directory: Path,
    clocks: Path,
    *,
    environment: dict[str, str] | None = None,
    net_ticktime_sec: int | None = None,
) -> AsyncIterator[ChaosBroker]:
    """Start the whole broker with an empty pool.

    Each process logs to a file in `directory`. `clocks` is the path of libfaketime. With
    `net_ticktime_sec`, RabbitMQ is a cluster of three nodes and PostgreSQL has a synchronous standby.
    """
    async with AsyncExitStack() as resources:
        resources.callback(faketime.remove_shared_memory)
        if net_ticktime_sec is None:
            servers = await start_single_servers(resources)
        else:
            servers = await start_cluster(resources, net_ticktime_sec=net_ticktime_sec)
        await _create_events_queue(servers.rabbitmq.url)
        simulator_port = free_port()
        links = {
            f"{name} to {server}": [await resources.enter_async_context(Proxy(port)) for port in ports]
            for name, module in SERVICES.items()
            for server, ports in _list_proxied_servers(module, servers, simulator_port).items()
        }
        for name in SERVICES:
            faketime.set_offset(_get_clock_file(directory, name), 0)
        settings_of = {
            name: {
                **_build_settings(name, links, servers),
                "CRASH_AT": str(_get_crash_file(directory, module)),
                **faketime.build_environment(clocks, _get_clock_file(directory, name)),
            }
            for name, module in SERVICES.items()
        }
        logs = {
            name: resources.enter_context((directory / f"{name}.log").open("a", buffering=1))
            for name in (*SERVICES, NEWCOMER)
        }
        stack = await resources.enter_async_context(
            run_stack(
                servers.database_url,
                servers.amqp_url,
                launcher=(str(LAUNCHER),),
                settings={**SETTINGS, **(environment or {})},
                settings_of=settings_of,
                on_line=lambda name, line: print(line, file=logs[name]),
                simulator_port=simulator_port,
                without=["console"],
            )
        )
        gateways = [
            f"http://127.0.0.1:{settings_of[name]['GATEWAY_PORT']}"
            for name, module in SERVICES.items()
            if module == "gateway"
        ]
        stack.environment["GATEWAY_PORT"] = settings_of["gateway"]["GATEWAY_PORT"]
        broker = ChaosBroker(stack, servers, links, gateways, directory)
        try:
            for name, module in SERVICES.items():
                if name != module:
                    await stack.start_service(module, name=name)
            broker.start_restarting()
            yield broker
        finally:
            await broker.stop_restarting()


def _get_crash_file(directory: Path, module: str) -> Path:
    return directory / f"crash-at-{module}"


def _get_clock_file(directory: Path, name: str) -> Path:
    return directory / f"clock-of-{name.replace(' ', '-')}"


def _list_proxied_servers(module: str, servers: Servers, simulator: int) -> dict[str, list[int]]:
    """Return name and ports of each server that a service reaches through proxies."""
    ports = {"RabbitMQ": servers.amqp_ports}
    if module == "allocator":
        ports["PostgreSQL"] = servers.postgres_ports
    if module in ("reaper", "csp_syncer", "provisioner"):
        ports["CSP"] = [simulator]
    return ports


def _build_settings(name: str, links: dict[str, list[Proxy]], servers: Servers) -> dict[str, str]:
    settings = {
        PORTS[SERVICES[name]]: str(free_port()),
        "AMQP_URL": servers.build_amqp_url([link.port for link in links[f"{name} to RabbitMQ"]]),
    }
    if postgres_links := links.get(f"{name} to PostgreSQL"):
        settings["DATABASE_URL"] = servers.build_database_url([link.port for link in postgres_links])
    if csp_links := links.get(f"{name} to CSP"):
        settings["CSP_BASE_URL"] = f"http://127.0.0.1:{csp_links[0].port}/v2"
    return settings


async def _create_events_queue(amqp_url: str) -> None:
    async with open_connection(amqp_url) as connection, connection.channel() as channel:
        await topology.declare(channel)
        queue = await channel.declare_queue(EVENTS_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(topology.EVENTS.name, "#")
