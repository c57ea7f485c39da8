"""The broker that faults are put on: PostgreSQL and RabbitMQ of its own, two of each service, links that can be
disturbed, and what is dead started again, as Kubernetes would."""

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
from sandbox_broker.messaging.connection import opened
from tests.chaos.disk import CannotMount, Disk
from tests.chaos.proxy import Proxy
from tests.integration.stack import ADMIN, PORTS, Stack, run_stack

SERVICES = {
    "gateway": "gateway",
    "second gateway": "gateway",
    "allocator": "allocator",
    "second allocator": "allocator",
    "reaper": "reaper",
    "second reaper": "reaper",
    "csp_syncer": "csp_syncer",
}
"""The module of each process."""
EVENTS_QUEUE = "chaos.events"
"""Takes every event from the start, and keeps it until the round is over."""
LAUNCHER = Path(__file__).with_name("crashing.py")
LAB_SEC = 100.0
GRACE_SEC = 25.0
"""A lease lasts longer than a script keeps trying, as it does in earnest: what has succeeded unheard is still there
when it asks again."""
RESTART_SEC = 1.0
"""Between the end of a process and its next start."""
SETTINGS = {
    "LAB_DURATION_HOURS": str(LAB_SEC / 3600),
    "GRACE_PERIOD_MINUTES": str(GRACE_SEC / 60),
    "CLEANUP_INTERVAL_SEC": "2",
    "DELETION_BACKOFF_BASE_SEC": "0.5",
    "DELETION_BACKOFF_MAX_SEC": "2",
    "DELETION_MAX_ATTEMPTS": "1000",  # a deletion that fails for good waits for a person
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "2",
    "SYNC_INTERVAL_SEC": "20",
}


@dataclass
class Chaos:
    stack: Stack
    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    links: dict[str, Proxy]
    """As in `second gateway to RabbitMQ`."""
    gateways: list[str]
    """Their addresses."""
    directory: Path
    disk: Disk | None
    """That of PostgreSQL; None where none can be mounted."""
    ends: list[tuple[str, str]] = field(default_factory=list)
    """Which process has ended, and how."""
    _keepers: list[asyncio.Task[None]] = field(default_factory=list)

    def process(self, name: str) -> Process:
        return self.stack.processes[name]

    def crash_at(self, module: str) -> Path:
        """Who reaches the point that is written here kills itself; see crashing.py."""
        return _crash_at(self.directory, module)

    def clock(self, name: str) -> Path:
        """How wrong the process's clock is; see devstack.faketime."""
        return _clock(self.directory, name)

    async def sync(self) -> None:
        """Through all gateways, of which one may be cut off."""
        asked = (self.stack.client.post(f"{gateway}/v1/admin/sync", headers=ADMIN) for gateway in self.gateways)
        await asyncio.gather(*asked, return_exceptions=True)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[AbstractConnection]:
        """A connection of our own to RabbitMQ, over no link."""
        async with opened(self.rabbitmq.url) as connection:
            yield connection

    async def active_allocator(self) -> str:
        """The one that has written last. Raises OSError where none is connected to the database."""
        backends = await self.stack.database.fetch(
            "SELECT client_port FROM pg_stat_activity WHERE application_name = $1 ORDER BY query_start DESC",
            topology.ALLOCATOR_COMMANDS.name,
        )
        for backend in backends:
            for name in ("allocator", "second allocator"):
                if backend["client_port"] in self.links[f"{name} to PostgreSQL"].outgoing_ports:
                    return name
        raise OSError("no allocator is connected to the database")

    async def until_all_are_ready(self) -> None:
        """However often one has to be started again for it."""
        for name, module in SERVICES.items():
            port = self.stack.settings_of[name][PORTS[module]]
            while not await self.stack.is_ready(f"http://127.0.0.1:{port}/readyz"):  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(0.1)

    async def until_a_standby_is_there(self) -> None:
        """All are ready, and both allocators are in line for the students' requests: one that is ready may be
        connecting yet."""
        await self.until_all_are_ready()
        for name, module in SERVICES.items():
            while module == "allocator" and not await self._is_in_line(name):  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(0.1)

    async def _is_in_line(self, allocator: str) -> bool:
        port = self.stack.settings_of[allocator][PORTS["allocator"]]
        try:
            metrics = await self.stack.client.get(f"http://127.0.0.1:{port}/metrics")
        except httpx.TransportError:
            return False
        return f'broker_rabbitmq_connected{{connection="{topology.ALLOCATOR_COMMANDS.name}"}} 1.0' in metrics.text

    def keep(self) -> None:
        """From now on what ends is started again."""
        self._keepers = [asyncio.create_task(self._keep(name)) for name in SERVICES]

    async def let_go(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for name in SERVICES:
            if name in self.stack.processes:
                self.process(name).send(signal.SIGCONT)  # what is stopped would not hear that it is to end

    async def _keep(self, name: str) -> None:
        module = SERVICES[name]
        while True:
            process = self.process(name)
            await process.wait()
            self.ends.append((name, process.ending))
            await asyncio.sleep(RESTART_SEC)
            await self.stack.launch(module, name=None if name == module else name)


@asynccontextmanager
async def chaos(
    directory: Path, clocks: Path, *, environment: dict[str, str] | None = None
) -> AsyncIterator[Chaos]:
    """Everything, with an empty pool. Each process's log goes to a file of `directory`; `clocks` is libfaketime."""
    async with AsyncExitStack() as everything:
        everything.callback(faketime.remove_shared_memory)
        disk = await _disk(everything)
        postgres, rabbitmq = PrivatePostgres(within=None if disk is None else disk.path), PrivateRabbitMQ()
        await everything.enter_async_context(postgres)
        await everything.enter_async_context(rabbitmq)
        await _record_events(rabbitmq.url)
        simulator_port = free_port()
        links = {
            f"{name} to {server}": await everything.enter_async_context(Proxy(port))
            for name, module in SERVICES.items()
            for server, port in _servers(module, postgres.port, rabbitmq.port, simulator_port).items()
        }
        for name in SERVICES:
            faketime.set_offset(_clock(directory, name), 0)
        settings_of = {
            name: {
                **_settings(name, links, postgres, rabbitmq),
                "CRASH_AT": str(_crash_at(directory, module)),
                **faketime.build_environment(clocks, _clock(directory, name)),
            }
            for name, module in SERVICES.items()
        }
        logs = {
            name: everything.enter_context((directory / f"{name}.log").open("a", buffering=1)) for name in SERVICES
        }
        stack = await everything.enter_async_context(
            run_stack(
                postgres.url,
                rabbitmq.url,
                launcher=(str(LAUNCHER),),
                settings={**SETTINGS, **(environment or {})},
                settings_of=settings_of,
                on_line=lambda name, line: print(line, file=logs[name]),
                simulator_port=simulator_port,
            )
        )
        gateways = [
            f"http://127.0.0.1:{settings_of[name]['GATEWAY_PORT']}"
            for name, module in SERVICES.items()
            if module == "gateway"
        ]
        stack.environment["GATEWAY_PORT"] = settings_of["gateway"]["GATEWAY_PORT"]
        chaos = Chaos(stack, postgres, rabbitmq, links, gateways, directory, disk)
        try:
            for name, module in SERVICES.items():
                if name != module:
                    await stack.start_service(module, name=name)
            chaos.keep()
            yield chaos
        finally:
            await chaos.let_go()


async def _disk(everything: AsyncExitStack) -> Disk | None:
    try:
        return await everything.enter_async_context(Disk())
    except CannotMount:
        return None


def _crash_at(directory: Path, module: str) -> Path:
    return directory / f"crash-at-{module}"


def _clock(directory: Path, name: str) -> Path:
    return directory / f"clock-of-{name.replace(' ', '-')}"


def _servers(module: str, postgres: int, rabbitmq: int, simulator: int) -> dict[str, int]:
    """What a service is linked to by a link that can be disturbed."""
    servers = {"RabbitMQ": rabbitmq}
    if module == "allocator":
        servers["PostgreSQL"] = postgres
    if module in ("reaper", "csp_syncer"):
        servers["CSP"] = simulator
    return servers


def _settings(
    name: str, links: dict[str, Proxy], postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ
) -> dict[str, str]:
    module = SERVICES[name]
    to_rabbitmq = links[f"{name} to RabbitMQ"]
    settings = {
        PORTS[module]: str(free_port()),
        "AMQP_URL": rabbitmq.url.replace(f":{rabbitmq.port}/", f":{to_rabbitmq.port}/"),
    }
    if to_postgres := links.get(f"{name} to PostgreSQL"):
        settings["DATABASE_URL"] = postgres.url.replace(f":{postgres.port}/", f":{to_postgres.port}/")
    if to_csp := links.get(f"{name} to CSP"):
        settings["CSP_BASE_URL"] = f"http://127.0.0.1:{to_csp.port}/v2"
    return settings


async def _record_events(amqp_url: str) -> None:
    async with opened(amqp_url) as connection, connection.channel() as channel:
        await topology.declare(channel)
        queue = await channel.declare_queue(EVENTS_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(topology.EVENTS.name, "#")
