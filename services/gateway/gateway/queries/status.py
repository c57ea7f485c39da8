"""How the whole broker is. All parts are looked at side by side, and none is waited for longer than PART_SEC: the
answer comes in time whatever is down."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.errors import ApiError
from gateway.api.schemas import CspStatus, PartStatus, QueueStatus, ServiceState, ServiceStatus, Stats, Status
from gateway.queries.sandboxes import reading, seconds, stats
from sandbox_broker.contract import topology
from sandbox_broker.database import connections
from sandbox_broker.database.schema import csp_listings, dead_letters, sandboxes
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.queue_inspector import QueueUnavailable

PART_SEC = 0.3

LOOK = 1000
"""Pending deletions that are looked at: those that have been pending longest."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Records:
    """What the database tells."""

    pool: Stats
    csp: CspStatus
    dead_letters: int


class Look(Generic[T]):
    """One look at a time at one part, whoever waits for it: of a part that hangs, one task waits."""

    def __init__(self, look: Callable[[], Awaitable[T]]) -> None:
        self._look = look
        self._looking: asyncio.Task[T] | None = None

    async def see(self) -> T | str:
        """What the look gives, or what is wrong with the part."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._run())
            # Nobody may be waiting any more when it fails.
            self._looking.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        seen, _ = await asyncio.wait([self._looking], timeout=PART_SEC)
        if not seen:
            return _no_answer()
        try:
            return self._looking.result()
        except ApiError as error:
            return error.message if error.__cause__ is None else connections.describe_error(error.__cause__)

    async def _run(self) -> T:
        return await self._look()


class Outlook:
    """The broker, as the gateway sees it."""

    def __init__(self, publisher: Publisher, engine: AsyncEngine) -> None:
        self._publisher = publisher
        self._records = Look(lambda: _records(engine))

    async def status(self) -> Status:
        queues, records = await asyncio.gather(_queues(self._publisher), self._records.see())
        known = None if isinstance(records, str) else records
        return Status(
            checked_at=int(time.time()),
            rabbitmq=_part(queues),
            database=_part(records),
            services=[ServiceStatus(service=service, state=_state(service, queues)) for service in SERVICES],
            queues=None if isinstance(queues, str) else queues,
            pool=known and known.pool,
            csp=known and known.csp,
            dead_letters=known and known.dead_letters,
        )


def _part(seen: object) -> PartStatus:
    return PartStatus(state="down", problem=seen) if isinstance(seen, str) else PartStatus(state="up", problem=None)


def _consumer(queue: str) -> str:
    """The service that consumes it: they are named after it, but for the one that the allocator empties."""
    return "allocator" if queue == topology.DEAD_LETTER_QUEUE.name else queue.partition(".")[0]


SERVICES = tuple(dict.fromkeys(_consumer(queue.name) for queue in topology.QUEUES))


def _state(service: str, queues: Sequence[QueueStatus] | str) -> ServiceState:
    """State of a service by the consumers of its queues. Queues that do not answer say nothing about it."""
    consumers = [] if isinstance(queues, str) else [entry.consumers for entry in queues if _of(entry, service)]
    consumed = [number > 0 for number in consumers if number is not None]
    if not consumed:
        return "unknown"
    return "up" if all(consumed) else "partly" if any(consumed) else "down"


def _of(entry: QueueStatus, service: str) -> bool:
    return _consumer(entry.queue) == service


async def _queues(publisher: Publisher) -> list[QueueStatus] | str:
    """Return the state of each queue, or why RabbitMQ answers about none of them."""
    try:
        queues = await asyncio.gather(*(_queue(publisher, queue.name) for queue in topology.QUEUES))
    except Disconnected as error:
        return str(error)
    if all(entry.problem == _no_answer() for entry in queues):
        return _no_answer()
    return queues


async def _queue(publisher: Publisher, name: str) -> QueueStatus:
    """Raise Disconnected if the connection is lost."""
    try:
        info = await publisher.look(name, timeout_sec=PART_SEC)
    except QueueUnavailable as error:
        problem = _no_answer() if error.__cause__ is None else str(error)
        return QueueStatus(queue=name, messages=None, consumers=None, problem=problem)
    return QueueStatus(queue=name, messages=info.messages, consumers=info.consumers, problem=None)


def _no_answer() -> str:
    return f"no answer in {PART_SEC:g} s"


async def _records(engine: AsyncEngine) -> Records:
    """Raises ApiError DATABASE_UNAVAILABLE."""
    pool = await stats(engine)
    begun = select(
        seconds(csp_listings.c.begun_at).label("begun_at"), csp_listings.c.held_at, csp_listings.c.applied_at
    )
    newest = begun.order_by(csp_listings.c.listing_id.desc()).limit(1)
    pending = (
        select(sandboxes.c.deletion_requested_at, sandboxes.c.deletion_attempts, sandboxes.c.deletion_error)
        .where(sandboxes.c.status == "pending_deletion")
        .order_by(sandboxes.c.status_since)
        .limit(LOOK)
        .subquery()
    )
    failing = pending.c.deletion_attempts > 0
    deletions = select(
        seconds(func.min(pending.c.deletion_requested_at)).label("pending_since"),
        func.count().filter(failing).label("failing"),
        func.max(pending.c.deletion_error).filter(failing).label("error"),
    )
    async with reading(engine) as connection:
        last = (await connection.execute(newest)).one_or_none()
        applied = (await connection.execute(newest.where(csp_listings.c.applied_at.is_not(None)))).one_or_none()
        tried = (await connection.execute(deletions)).one()
        dead = (await connection.execute(select(func.count()).select_from(dead_letters))).scalar_one()
    unfinished = last is not None and last.applied_at is None and last.held_at is None
    csp = CspStatus(
        listed_at=applied and applied.begun_at,
        unfinished_since=last.begun_at if last is not None and unfinished else None,
        held=last is not None and last.held_at is not None and last.applied_at is None,
        pending_since=tried.pending_since,
        failing=tried.failing,
        error=tried.error,
    )
    return Records(pool, csp, dead)
