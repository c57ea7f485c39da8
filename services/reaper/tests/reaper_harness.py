"""A reaper on the real RabbitMQ, with the CSP simulator and a stand-in for the allocator."""

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
from reaper.main import create_app
from reaper.settings import Settings
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, ReplyEnvelope, decode_commands
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    Command,
    EndCleanup,
    ExpireLeases,
    HurryDeletions,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
)
from sandbox_broker.contract.replies import (
    DeletionsClaimed,
    DeletionsHurried,
    DueDeletion,
    LeasesExpired,
    Recorded,
    Refused,
    Reply,
)

M = TypeVar("M", bound=Command)

REFUSED = Refused(code="ALLOCATOR_UNAVAILABLE", message="because")


@dataclass
class Csp:
    """The CSP simulator and its control API."""

    url: str
    control: httpx.AsyncClient

    async def behave(self, **switches: Any) -> None:
        (await self.control.patch("/_control/behaviour", json=switches)).raise_for_status()

    async def accounts(self) -> dict[str, str]:
        """Return the external ids of the active sandboxes by csp_id."""
        records = (await self.control.get("/_control/accounts")).json()["accounts"]
        return {
            str(record["csp_id"]): record["id"].rpartition("/")[2]
            for record in records
            if (record["account_type"], record["state"]) == ("sandbox", "active")
        }

    async def deletions(self) -> list[dict[str, Any]]:
        """Return the answered DELETE calls in the order of their start."""
        calls = (await self.control.get("/_control/calls", params={"method": "DELETE"})).json()["calls"]
        return sorted(calls, key=lambda call: call["at"])


@asynccontextmanager
async def simulated_csp(accounts: int) -> AsyncIterator[Csp]:
    async with (
        serving(create_simulator(accounts=accounts)) as url,
        httpx.AsyncClient(base_url=url, verify=False) as control,
    ):
        yield Csp(url, control)


@dataclass
class Allocator:
    """Holds pending deletions with their due times, and records commands."""

    csp: Csp
    due: dict[str, DueDeletion] = field(default_factory=dict)
    due_at: dict[str, float] = field(default_factory=dict)
    leader: tuple[uuid.UUID | None, float] = (None, 0)
    dead_runs: set[uuid.UUID | None] = field(default_factory=set)
    overdue_leases: int = 0
    received: list[tuple[float, Command]] = field(default_factory=list)
    invalid: list[InvalidCommand] = field(default_factory=list)
    refuses: Callable[[Command], bool] = lambda _: False
    gone_from_csp_when_recorded: list[bool] = field(default_factory=list)

    async def add_due(self) -> None:
        """Make the deletion of every account in CSP due."""
        for sandbox_id, external_id in (await self.csp.accounts()).items():
            self.add(sandbox_id, external_id)

    def add(self, sandbox_id: str, external_id: str, attempts: int = 0) -> None:
        self.due[sandbox_id] = DueDeletion(
            sandbox_id=sandbox_id, external_id=external_id, name=f"sandbox-{sandbox_id}", attempts=attempts
        )

    def all(self, kind: type[M]) -> list[M]:
        return [command for _, command in self.received if isinstance(command, kind)]

    def end_claims(self) -> None:
        self.due_at.clear()
        self.leader = (None, 0)

    def end_run(self) -> None:
        """End the claims of the leading run, as if its process had died. Its later commands get no deletion."""
        self.dead_runs.add(self.leader[0])
        self.end_claims()

    def _renew_leader_lease(self, command: ClaimDeletions | HurryDeletions, now: float) -> bool:
        run_id, until = self.leader
        if command.run_id in self.dead_runs or (run_id != command.run_id and until > now):
            return False
        self.leader = (command.run_id, now + command.claim_sec)
        return True

    async def answer(self, command: Command) -> Reply:
        now = time.monotonic()
        self.received.append((now, command))
        if self.refuses(command):
            return REFUSED
        match command:
            case ExpireLeases():
                ended = min(self.overdue_leases, command.limit)
                self.overdue_leases -= ended
                return LeasesExpired(sandbox_ids=tuple(map(str, range(ended))))
            case ClaimDeletions():
                if not self._renew_leader_lease(command, now):
                    return DeletionsClaimed(deletions=(), on_duty=False, next_in_sec=self.leader[1] - now)
                ready = [due for key, due in self.due.items() if self.due_at.get(key, 0) <= now]
                if command.untried and (untried := [due for due in ready if due.attempts == 0]):
                    ready = untried if command.untried == "oldest" else untried[::-1]
                claimed = tuple(ready[: command.limit])
                for due in claimed:
                    self.due_at[due.sandbox_id] = now + command.claim_sec
                later = [self.due_at[key] - now for key in self.due if key in self.due_at]
                return DeletionsClaimed(deletions=claimed, next_in_sec=min(later, default=None))
            case HurryDeletions():
                if not self._renew_leader_lease(command, now):
                    return DeletionsHurried(on_duty=False, hurried=0)
                hurried = len(self.due_at)
                self.due_at.clear()
                return DeletionsHurried(hurried=hurried)
            case EndCleanup():
                ended = self.leader[0] == command.run_id
                if ended:
                    self.leader = (None, 0)
                return Recorded(changed=ended)
            case RecordJob():
                return Recorded(changed=True)
            case RecordDeletion():
                in_csp = (await self.csp.accounts()).values()
                self.gone_from_csp_when_recorded.append(self.due[command.sandbox_id].external_id not in in_csp)
                del self.due[command.sandbox_id]
                self.due_at.pop(command.sandbox_id, None)
                return Recorded(changed=True)
            case RecordDeletionFailure():
                due = self.due.pop(command.sandbox_id)
                self.due_at.pop(command.sandbox_id, None)
                if command.retry_in_sec is not None:
                    self.due[due.sandbox_id] = due.model_copy(update={"attempts": due.attempts + 1})
                    self.due_at[due.sandbox_id] = now + command.retry_in_sec
                return Recorded(changed=True)
        raise AssertionError(command)

    @asynccontextmanager
    async def consuming(self, amqp_url: str) -> AsyncIterator[None]:
        connection = await aio_pika.connect(amqp_url)
        async with connection, connection.channel() as channel:
            replies_exchange = await channel.get_exchange(topology.REPLIES.name, ensure=False)
            queue = await channel.get_queue(topology.ALLOCATOR_MAINTENANCE.name)

            async def handle(message: AbstractIncomingMessage) -> None:
                await message.ack()
                commands = decode_commands(message.body)
                assert message.exchange == topology.COMMANDS_FROM_REAPER.name
                self.invalid += [command for command in commands if isinstance(command, InvalidCommand)]
                replies = tuple(
                    [await self.answer(command) for command in commands if not isinstance(command, InvalidCommand)]
                )
                body = ReplyEnvelope(replies=replies).model_dump_json().encode()
                answered = aio_pika.Message(body, correlation_id=message.correlation_id)
                await replies_exchange.publish(answered, message.reply_to or "", mandatory=False)

            await queue.consume(handle)
            yield


def settings(**changes: Any) -> Settings:
    return Settings(
        _env_file=None,
        **{
            "amqp_url": "amqp://127.0.0.1:1/",
            "csp_base_url": "http://127.0.0.1:1/v2",
            "csp_api_token": DEFAULT_TOKEN,
            "cleanup_batch_delay_sec": 0,
            # One tick at the start only, so that later runs have another cause.
            "cleanup_interval_sec": 3600,
            "auto_expiry_interval_sec": 3600,
            **changes,
        },
    )


@asynccontextmanager
async def reaping(amqp_url: str, csp: Csp, **changes: Any) -> AsyncIterator[None]:
    app = create_app(settings(amqp_url=amqp_url, csp_base_url=f"{csp.url}/v2", **changes))
    async with app.router.lifespan_context(app):
        yield


async def announce(amqp_url: str) -> None:
    """Publish the event of one released sandbox."""
    await publish_burst(amqp_url, topology.EVENTS, "sandbox.deletion_requested", 1)


async def publish_burst(amqp_url: str, exchange: topology.Exchange, routing_key: str, size: int) -> None:
    """Publish `size` messages at once."""
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        target = await channel.get_exchange(exchange.name)
        await asyncio.gather(*(target.publish(aio_pika.Message(b"{}"), routing_key) for _ in range(size)))


async def is_empty(amqp_url: str, queue: topology.Queue) -> bool:
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        declared = await channel.declare_queue(queue.name, passive=True)
        return not declared.declaration_result.message_count


def make_external_id() -> str:
    return str(uuid.uuid4())


def sample(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0
