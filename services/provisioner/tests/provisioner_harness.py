"""A provisioner on the real RabbitMQ, with the CSP simulator and a stand-in for the allocator."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
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
from provisioner.main import create_app
from provisioner.settings import Settings
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, ReplyEnvelope, decode_commands
from sandbox_broker.contract.commands import (
    ClaimCreations,
    Command,
    EndCreations,
    RecordCreation,
    RecordCreationFailure,
    SyncPool,
)
from sandbox_broker.contract.replies import CreationsClaimed, DueCreation, PoolSynced, Recorded, Refused, Reply

M = TypeVar("M", bound=Command)

REFUSED = Refused(code="ALLOCATOR_UNAVAILABLE", message="because")


@dataclass
class Csp:
    """The CSP simulator and its control API."""

    url: str
    control: httpx.AsyncClient

    async def behave(self, **switches: Any) -> None:
        (await self.control.patch("/_control/behaviour", json=switches)).raise_for_status()

    async def add(self, name: str) -> None:
        """Create an account by hand."""
        headers = {"Authorization": f"Token {DEFAULT_TOKEN}"}
        (await self.control.post("/v2/sandbox/accounts", json={"name": name}, headers=headers)).raise_for_status()

    async def names(self) -> list[str]:
        """Return the names of the sandboxes in the order of their creation."""
        records = (await self.control.get("/_control/accounts")).json()["accounts"]
        return [record["name"] for record in records if record["name"].startswith("lab-")]

    async def external_id(self, name: str) -> str:
        records = (await self.control.get("/_control/accounts")).json()["accounts"]
        (record,) = [record for record in records if record["name"] == name]
        return str(record["id"]).rpartition("/")[2]

    async def calls(self, method: str) -> list[dict[str, Any]]:
        """Return the answered creations (POST) or look-ups (GET), in the order of their start."""
        calls = (await self.control.get("/_control/calls", params={"method": method})).json()["calls"]
        return sorted(calls, key=lambda call: call["at"])


@asynccontextmanager
async def simulated_csp() -> AsyncIterator[Csp]:
    async with (
        serving(create_simulator(accounts=0)) as url,
        httpx.AsyncClient(base_url=url, verify=False) as control,
    ):
        yield Csp(url, control)


@dataclass
class Allocator:
    """Holds creation intents with their due times, and records commands."""

    due: dict[int, DueCreation] = field(default_factory=dict)
    due_at: dict[int, float] = field(default_factory=dict)
    claims: dict[int, uuid.UUID] = field(default_factory=dict)
    """Run of each claim without a result."""
    created: dict[str, str] = field(default_factory=dict)
    """External id of each created account, by name."""
    failed: dict[str, RecordCreationFailure] = field(default_factory=dict)
    leader: tuple[uuid.UUID | None, float] = (None, 0)
    awaited_sec: float = 0
    received: list[tuple[float, Command]] = field(default_factory=list)
    invalid: list[InvalidCommand] = field(default_factory=list)
    refuses: Callable[[Command], bool] = lambda _: False
    loses: Callable[[Command], bool] = lambda _: False
    """Commands that have no effect, as if the provisioner had died before it sent them."""

    def add(self, count: int = 1, **changes: Any) -> None:
        for number in range(len(self.due) + 1, len(self.due) + 1 + count):
            intent = {"creation_id": number, "name": f"lab-{number}", "name_prefix": "lab-", "attempts": 0}
            self.due[number] = DueCreation(**{**intent, "claimed_before": False, **changes})

    def all(self, kind: type[M]) -> list[M]:
        return [command for _, command in self.received if isinstance(command, kind)]

    def end_claims(self) -> None:
        """End all claims and the leader lease, as if their times were over."""
        self.due_at.clear()
        self.claims.clear()
        self.leader = (None, 0)

    async def answer(self, command: Command) -> Reply:
        now = time.monotonic()
        self.received.append((now, command))
        if self.refuses(command):
            return REFUSED
        if self.loses(command):
            return Recorded(changed=True)
        match command:
            case ClaimCreations():
                return self._claim(command, now)
            case EndCreations():
                ended = self.leader[0] == command.run_id
                if ended:
                    self.leader = (None, 0)
                return Recorded(changed=ended)
            case RecordCreation():
                creation = self.due.pop(command.creation_id)
                self.created[creation.name] = command.external_id
                return Recorded(changed=True)
            case RecordCreationFailure():
                creation = self.due.pop(command.creation_id)
                self.due_at.pop(command.creation_id, None)
                self.claims.pop(command.creation_id, None)
                self.failed[creation.name] = command
                if command.retry_in_sec is not None:
                    changes = {"attempts": creation.attempts + 1, "claimed_before": True}
                    self.due[creation.creation_id] = creation.model_copy(update=changes)
                    self.due_at[creation.creation_id] = (
                        float("inf") if command.refused else now + command.retry_in_sec
                    )
                return Recorded(changed=True)
            case SyncPool():
                return PoolSynced(synced=0, marked_stale=0, restored=0, duration_ms=1)
        raise AssertionError(command)

    def _claim(self, command: ClaimCreations, now: float) -> CreationsClaimed:
        if command.dry_run:
            return CreationsClaimed(creations=tuple(self.due.values()))
        run_id, until = self.leader
        if run_id != command.run_id and until > now:
            return CreationsClaimed(creations=(), on_duty=False, next_in_sec=until - now)
        self.leader = (command.run_id, now + command.claim_sec)
        lost = {key for key, run_id in self.claims.items() if run_id == command.run_id}
        lost -= set(lost if command.received is None else command.received)
        ready = [creation for key, creation in self.due.items() if self.due_at.get(key, 0) <= now or key in lost]
        claimed = tuple(ready[: command.limit])
        for creation in claimed:
            self.claims[creation.creation_id] = command.run_id
            self.due_at[creation.creation_id] = now + command.claim_sec
            self.due[creation.creation_id] = creation.model_copy(update={"claimed_before": True})
        later = [self.due_at.get(key, now) - now for key in self.due if self.due_at.get(key, now) < float("inf")]
        return CreationsClaimed(
            creations=claimed,
            next_in_sec=None if claimed else min(later, default=None),
            awaited=len(self.created),
            awaited_sec=self.awaited_sec if self.created else None,
        )

    @asynccontextmanager
    async def consuming(self, amqp_url: str) -> AsyncIterator[None]:
        """Consume the commands for the allocator and for the csp-syncer."""
        connection = await aio_pika.connect(amqp_url)
        async with connection, connection.channel() as channel:
            replies_exchange = await channel.get_exchange(topology.REPLIES.name, ensure=False)

            async def handle(message: AbstractIncomingMessage) -> None:
                await message.ack()
                commands = decode_commands(message.body)
                assert message.exchange == topology.COMMANDS_FROM_PROVISIONER.name
                self.invalid += [command for command in commands if isinstance(command, InvalidCommand)]
                replies = tuple(
                    [await self.answer(command) for command in commands if not isinstance(command, InvalidCommand)]
                )
                if message.reply_to:
                    body = ReplyEnvelope(replies=replies).model_dump_json().encode()
                    answered = aio_pika.Message(body, correlation_id=message.correlation_id)
                    await replies_exchange.publish(answered, message.reply_to, mandatory=False)

            for queue in (topology.ALLOCATOR_MAINTENANCE, topology.SYNCER_COMMANDS):
                await (await channel.get_queue(queue.name)).consume(handle)
            yield


def settings(**changes: Any) -> Settings:
    return Settings(
        _env_file=None,
        **{
            "amqp_url": "amqp://127.0.0.1:1/",
            "csp_base_url": "http://127.0.0.1:1/v2",
            "csp_api_token": DEFAULT_TOKEN,
            "stock_enabled": True,
            # One tick at the start only, so that later claims have another cause.
            "stock_interval_sec": 3600,
            "create_sync_sec": 3600,
            "create_per_minute": 1000,
            "create_backoff_base_sec": 0.1,
            **changes,
        },
    )


@asynccontextmanager
async def provisioning(amqp_url: str, csp: Csp, **changes: Any) -> AsyncIterator[None]:
    app = create_app(settings(amqp_url=amqp_url, csp_base_url=f"{csp.url}/v2", **changes))
    async with app.router.lifespan_context(app):
        yield


async def announce(amqp_url: str, event: str = "pool.exhausted", size: int = 1) -> None:
    """Publish `size` events."""
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        target = await channel.get_exchange(topology.EVENTS.name)
        await asyncio.gather(*(target.publish(aio_pika.Message(b"{}"), event) for _ in range(size)))


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0
