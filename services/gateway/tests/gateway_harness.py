"""Gateway on a real RabbitMQ and PostgreSQL, and fakes of the services that reply to its commands."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import aio_pika
import httpx
from aio_pika.abc import AbstractIncomingMessage
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.types import ASGIApp

from devstack.conditions import wait_until
from gateway.main import create_app
from gateway.settings import Settings
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, ReplyEnvelope, decode_commands
from sandbox_broker.contract.commands import (
    ApplyPolicies,
    CleanUpNow,
    Command,
    DeleteStale,
    DropDeadLetter,
    EndLease,
    EndTokenLeases,
    ExtendLease,
    ForgetStudent,
    IssueToken,
    PurgeRecords,
    RecordJob,
    RecordTokenUses,
    ReleaseSandbox,
    ReplayDeadLetter,
    RetryDeletion,
    RevokeToken,
    SuspendToken,
    SyncPool,
)
from sandbox_broker.contract.replies import (
    CleanedUp,
    DeadLetterReplayed,
    LeaseExtended,
    LeaseGranted,
    PoliciesApplied,
    PolicyChange,
    PoolSynced,
    Purged,
    Recorded,
    Refused,
    Reply,
    SandboxReleased,
    StudentForgotten,
    TokenLeasesEnded,
)

TRACK_TOKEN = "track-token-1"
OTHER_TRACK_TOKEN = "track-token-2"
ADMIN_TOKEN = "admin-token-1"
TRACK = {"Authorization": f"Bearer {TRACK_TOKEN}"}
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
STUDENT = {**TRACK, "X-Instruqt-Sandbox-ID": "student-1"}

LEASE = LeaseGranted(
    new=True,
    sandbox_id="2012224",
    name="sandbox-1",
    external_id="af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3",
    sfdc_account_id=None,
    allocated_at=1728054123,
    expires_at=1728068523,
)

QUEUE_DECLARE = (50).to_bytes(2, "big") + (10).to_bytes(2, "big")
"""Class and method of the AMQP method queue.declare."""

Answer = Callable[[Command], Awaitable[Reply]]


async def say_yes(command: Command) -> Reply:
    if isinstance(command, ReleaseSandbox):
        return SandboxReleased(
            sandbox_id=command.sandbox_id, status="pending_deletion", deletion_requested_at=1728054200
        )
    if isinstance(command, ExtendLease):
        return LeaseExtended(changed=True, expires_at=1728075723, max_expires_at=1728082923)
    if isinstance(command, SyncPool):
        return PoolSynced(synced=5, marked_stale=1, restored=2, duration_ms=34)
    if isinstance(command, EndLease | RetryDeletion):
        return SandboxReleased(
            sandbox_id=command.sandbox_id, status="pending_deletion", deletion_requested_at=1728054200
        )
    if isinstance(command, CleanUpNow):
        return CleanedUp(deleted=3, failed=1, duration_ms=34)
    if isinstance(command, DeleteStale | PurgeRecords):
        return Purged(count=7)
    if isinstance(command, ReplayDeadLetter):
        return DeadLetterReplayed(
            dead_letter_id=command.dead_letter_id, queue="allocator.commands", published=True, skipped=2
        )
    if isinstance(command, ApplyPolicies):
        return PoliciesApplied(changes=(PolicyChange(name="a", change="changed", fields=("lease_hours",)),))
    if isinstance(command, ForgetStudent):
        return StudentForgotten(pseudonym="forgotten-1", leases=2)
    if isinstance(command, EndTokenLeases):
        return TokenLeasesEnded(sandbox_ids=())
    if isinstance(command, RecordJob | DropDeadLetter | IssueToken | RevokeToken | SuspendToken | RecordTokenUses):
        return Recorded(changed=True)
    return LEASE


async def say_nothing(_: Command) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


def refuse(code: Any, message: str = "because") -> Answer:
    async def answer(_: Command) -> Reply:
        return Refused(code=code, message=message)

    return answer


@dataclass
class FarSide:
    """Fake service that consumes a command queue. Its replies come from `answer`."""

    queue: topology.Queue
    answer: Answer = say_yes
    envelopes: list[list[Command | InvalidCommand]] = field(default_factory=list)

    @property
    def commands(self) -> list[Command | InvalidCommand]:
        return [command for envelope in self.envelopes for command in envelope]

    @asynccontextmanager
    async def consuming(self, amqp_url: str) -> AsyncIterator[None]:
        connection = await aio_pika.connect(amqp_url)
        async with connection, connection.channel() as channel:
            replies_exchange = await channel.get_exchange(topology.REPLIES.name, ensure=False)
            queue = await channel.get_queue(self.queue.name)
            await queue.purge()

            async def handle(message: AbstractIncomingMessage) -> None:
                await message.ack()
                commands = decode_commands(message.body)
                self.envelopes.append(commands)
                replies = tuple([await self.answer(command) for command in commands])  # type: ignore[arg-type]
                body = ReplyEnvelope(replies=replies).model_dump_json().encode()
                reply = aio_pika.Message(body, correlation_id=message.correlation_id)
                await replies_exchange.publish(reply, message.reply_to or "", mandatory=False)

            await queue.consume(handle)
            yield


@dataclass
class Gateway:
    app: FastAPI
    client: httpx.AsyncClient
    allocator: FarSide
    maintenance: FarSide
    syncer: FarSide
    reaper: FarSide

    async def allocate(self, **headers: str | bytes) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/v1/allocate", headers=raw({**STUDENT, **named}))

    async def present(self) -> None:
        """Wait until the gateway is connected and has seen a consumer of its commands."""
        await wait_until(
            lambda: self.app.state.context.allocator._present and self.app.state.context.rpc_client.connected
        )

    async def absent(self) -> None:
        await wait_until(lambda: not self.app.state.context.allocator._present)

    def reset(self) -> None:
        for far_side in (self.allocator, self.maintenance, self.syncer, self.reaper):
            far_side.answer = say_yes
            far_side.envelopes.clear()


def raw(headers: Mapping[str, str | bytes]) -> list[tuple[bytes, bytes]]:
    """Return the headers for httpx as exact bytes."""
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers.items()
    ]


def settings(**changes: Any) -> Settings:
    return Settings(
        _env_file=None,
        **{
            "amqp_url": "amqp://127.0.0.1:1/",
            "database_url": "postgresql://127.0.0.1:1/nowhere",
            "broker_api_token": f"{TRACK_TOKEN}, {OTHER_TRACK_TOKEN}",
            "broker_admin_token": ADMIN_TOKEN,
            "rate_limit": "",
            **changes,
        },
    )


def create_app_without_servers(**changes: Any) -> FastAPI:
    """Return an application without its lifespan. Routes that need RabbitMQ or the database return 503."""
    return create_app(settings(**changes))


def client(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


@asynccontextmanager
async def running(amqp_url: str, *, far_sides: bool = True, **changes: Any) -> AsyncIterator[Gateway]:
    """Run a connected gateway; with `far_sides`, all services that it sends commands to are running."""
    app = create_app(settings(amqp_url=amqp_url, **changes))
    queues = (
        topology.ALLOCATOR_COMMANDS,
        topology.ALLOCATOR_MAINTENANCE,
        topology.SYNCER_COMMANDS,
        topology.REAPER_COMMANDS,
    )
    services = [FarSide(queue) for queue in queues]
    async with app.router.lifespan_context(app), client(app) as http:
        gateway = Gateway(app, http, *services)
        await wait_until(lambda: app.state.context.rpc_client.connected)
        if not far_sides:
            yield gateway
            return
        async with AsyncExitStack() as stack:
            for far_side in services:
                await stack.enter_async_context(far_side.consuming(amqp_url))
            await gateway.present()
            yield gateway


class Cable:
    """TCP proxy in front of RabbitMQ that can be disconnected.

    It can also delay each declaration of one queue. RabbitMQ then seems not to respond for this queue.
    """

    def __init__(self, amqp_url: str) -> None:
        self.held: list[tuple[asyncio.StreamWriter, bytes]] = []
        """Delayed declarations."""
        self._silent: bytes | None = None
        self._parts = urlsplit(amqp_url)
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._port = 0

    @classmethod
    @asynccontextmanager
    async def to(cls, amqp_url: str) -> AsyncIterator[Self]:
        cable = cls(amqp_url)
        await cable.plug_in()
        try:
            yield cable
        finally:
            await cable.pull()

    @property
    def url(self) -> str:
        user, _, _ = self._parts.netloc.rpartition("@")
        return self._parts._replace(netloc=f"{user}@127.0.0.1:{self._port}").geturl()

    async def plug_in(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def pull(self) -> None:
        if self._server is not None:
            self._server.close()
        for end in list(self._ends):
            end.transport.abort()
        await wait_until(lambda: not self._ends)

    def silence(self, queue: str) -> None:
        """Delay the declarations of this queue until `answer()`."""
        self._silent = queue.encode()

    def answer(self) -> None:
        """Forward the delayed declarations, as if the node of the queue had returned."""
        self._silent = None
        for writer, held in self.held:
            writer.write(held)
        self.held.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._parts.hostname, self._parts.port or 5672)
        await asyncio.gather(self._pump_frames(reader, far_writer), self._pump(far_reader, writer))

    async def _pump_frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward data like `_pump()`, but frame by frame (AMQP 0-9-1, section 2.3)."""
        self._ends.add(writer)
        try:
            writer.write(await reader.readexactly(len(b"AMQP\0\0\x09\x01")))
            while True:
                header = await reader.readexactly(7)
                frame = header + await reader.readexactly(int.from_bytes(header[3:], "big") + 1)
                if self._silent and frame[:1] == b"\x01" and frame[7:11] == QUEUE_DECLARE and self._silent in frame:
                    self.held.append((writer, frame))
                    continue
                writer.write(frame)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self._ends.discard(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            self._ends.discard(writer)


def detail(response: httpx.Response) -> dict[str, Any]:
    """Return the `detail` of an error response, after checks of the whole body."""
    body = response.json()
    assert set(body) == {"detail"}
    assert set(body["detail"]) - {"retry_after", "fields"} == {"code", "message", "request_id"}
    assert body["detail"]["request_id"] == response.headers["X-Request-ID"]
    retry_after = body["detail"].get("retry_after")
    assert response.headers.get("Retry-After") == (None if retry_after is None else str(retry_after))
    result: dict[str, Any] = body["detail"]
    return result


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0
