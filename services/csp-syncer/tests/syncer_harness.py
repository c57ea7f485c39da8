"""A csp-syncer on the real RabbitMQ, with the CSP simulator and a stand-in for the allocator."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aio_pika
import httpx
from aio_pika.abc import AbstractIncomingMessage
from prometheus_client import REGISTRY

from csp_simulator.app import DEFAULT_TOKEN
from csp_simulator.app import create_app as create_simulator
from csp_simulator.testing import serving
from csp_syncer.main import create_app
from csp_syncer.settings import Settings
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, ReplyEnvelope, decode_commands
from sandbox_broker.contract.commands import (
    ApplyListing,
    BeginListing,
    Command,
    DeleteStale,
    PurgeAudit,
    PurgePersonalData,
    PurgeRecords,
    RecordJob,
    RefreshSandboxes,
    StageListing,
    SyncPool,
)
from sandbox_broker.contract.replies import (
    ListingApplied,
    ListingBegun,
    ListingStaged,
    Purged,
    Recorded,
    Refused,
    Reply,
    SandboxesRefreshed,
)
from sandbox_broker.messaging.outcome import CommandRefused
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.runtime.service import cancel_and_wait

M = TypeVar("M", bound=Command)


@dataclass
class Csp:
    """The CSP simulator and its control API."""

    url: str
    control: httpx.AsyncClient

    async def behave(self, **switches: Any) -> None:
        (await self.control.patch("/_control/behaviour", json=switches)).raise_for_status()

    async def list_raw(self, records: list[Any]) -> None:
        (await self.control.put("/_control/accounts", json={"raw": records})).raise_for_status()

    async def records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = (await self.control.get("/_control/accounts")).json()["accounts"]
        return records

    async def listings(self) -> int:
        """Return the number of answered listing calls."""
        return len((await self.control.get("/_control/calls", params={"method": "GET"})).json()["calls"])


@asynccontextmanager
async def simulated_csp(accounts: int) -> AsyncIterator[Csp]:
    async with (
        serving(create_simulator(accounts=accounts)) as url,
        httpx.AsyncClient(base_url=url, verify=False) as control,
    ):
        yield Csp(url, control)


@dataclass
class Allocator:
    """Records commands, counts staged accounts, and refuses commands as the test asks."""

    staged: dict[int, list[str]] = field(default_factory=dict)
    received: list[Command] = field(default_factory=list)
    jobs: list[RecordJob] = field(default_factory=list)
    purges: list[DeleteStale | PurgeAudit | PurgePersonalData | PurgeRecords] = field(default_factory=list)
    to_purge: int = 0
    to_refresh: list[str] = field(default_factory=list)
    refusal: Callable[[Command], Refused | None] = lambda _: None
    before_answer: Callable[[Command], Awaitable[None]] | None = None

    def all(self, kind: type[M]) -> list[M]:
        return [command for command in self.received if isinstance(command, kind)]

    async def answer(self, command: Command) -> Reply:
        if isinstance(command, DeleteStale | PurgeAudit | PurgePersonalData | PurgeRecords):
            self.purges.append(command)
            count = min(command.limit, self.to_purge)
            self.to_purge -= count
            return self.refusal(command) or Purged(count=count)
        if isinstance(command, RecordJob):
            self.jobs.append(command)
            return Recorded(changed=True)
        self.received.append(command)
        if self.before_answer is not None:
            await self.before_answer(command)
        if refusal := self.refusal(command):
            return refusal
        match command:
            case BeginListing():
                listing_id = len(self.staged) + 1
                self.staged[listing_id] = []
                return ListingBegun(listing_id=listing_id)
            case StageListing():
                staged = self.staged[command.listing_id]
                staged += [account.sandbox_id for account in command.accounts if account.sandbox_id not in staged]
                return ListingStaged(staged=len(command.accounts))
            case RefreshSandboxes():
                left = [name for name in self.to_refresh if name > (command.after or "")][: command.limit]
                return SandboxesRefreshed(last=left[-1] if left else None)
            case ApplyListing():
                synced = len(self.staged[command.listing_id])
                return ListingApplied(synced=synced, discovered=3, restored=2, marked_stale=1)
        raise AssertionError(command)

    @asynccontextmanager
    async def consuming(self, amqp_url: str) -> AsyncIterator[None]:
        connection = await aio_pika.connect(amqp_url)
        async with connection, connection.channel() as channel:
            replies_exchange = await channel.get_exchange(topology.REPLIES.name, ensure=False)
            queue = await channel.get_queue(topology.ALLOCATOR_MAINTENANCE.name)

            async def handle(message: AbstractIncomingMessage) -> None:
                await message.ack()
                (command,) = decode_commands(message.body)
                assert message.exchange == topology.COMMANDS_FROM_SYNCER.name
                assert not isinstance(command, InvalidCommand)
                body = ReplyEnvelope(replies=(await self.answer(command),)).model_dump_json().encode()
                answered = aio_pika.Message(body, correlation_id=message.correlation_id)
                await replies_exchange.publish(answered, message.reply_to or "", mandatory=False)

            await queue.consume(handle)
            yield


@dataclass
class Caller:
    """Sends commands to the csp-syncer like the gateway."""

    rpc_client: RpcClient

    async def sync(self, *, force: bool = False, job_id: uuid.UUID | None = None) -> Reply:
        return await self.send(SyncPool(request_id="r", force=force, job_id=job_id))

    async def send(self, command: Command) -> Reply:
        """Return the reply, also if it is a refusal."""
        try:
            reply: Reply = await self.rpc_client.request(topology.SYNCER_COMMANDS, command, timeout_sec=20)
        except CommandRefused as error:
            return error.refusal
        return reply

    async def all_arrived(self) -> None:
        """Return when the csp-syncer has started on all earlier commands. It handles commands in order, and refuses
        this one."""
        await asyncio.create_task(self.send(BeginListing()))


@asynccontextmanager
async def calling(amqp_url: str) -> AsyncIterator[Caller]:
    publisher = Publisher(amqp_url, "test")
    rpc_client = RpcClient(amqp_url, "test", publisher)
    tasks = [asyncio.create_task(publisher.run()), asyncio.create_task(rpc_client.run())]
    try:
        yield Caller(rpc_client)
    finally:
        for task in reversed(tasks):
            await cancel_and_wait(task)


def settings(**changes: Any) -> Settings:
    return Settings(
        _env_file=None,
        **{
            "amqp_url": "amqp://127.0.0.1:1/",
            "csp_base_url": "http://127.0.0.1:1/v2",
            "csp_api_token": DEFAULT_TOKEN,
            "sync_interval_sec": 3600,  # one tick at the start only
            **changes,
        },
    )


@asynccontextmanager
async def syncing(amqp_url: str, csp: Csp, **changes: Any) -> AsyncIterator[None]:
    app = create_app(settings(amqp_url=amqp_url, csp_base_url=f"{csp.url}/v2", **changes))
    async with app.router.lifespan_context(app):
        yield


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0
