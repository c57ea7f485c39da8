"""Status report of all components. Probes run concurrently and end after PROBE_TIMEOUT_SEC.

The report is therefore complete in time, even if RabbitMQ or PostgreSQL does not respond.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, Literal, TypeVar

from sqlalchemy import func, select, true
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import attention
from gateway.api.errors import ApiError
from gateway.api.schemas.pool import Stats
from gateway.api.schemas.status import (
    CspStatus,
    PartStatus,
    QueueStatus,
    ServiceState,
    ServiceStatus,
    Status,
    StoppedStock,
)
from gateway.queries.sandboxes import pool_stats, read_connection, unix_seconds
from sandbox_broker.contract import topology
from sandbox_broker.database import connections
from sandbox_broker.database.schema import (
    allocator_epoch,
    allocators,
    applied_listing,
    csp_listings,
    dead_letters,
    sandboxes,
    stock_forecasts,
    stock_prefixes,
    stock_rules,
    waiting,
)
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.queue_inspector import QueueUnavailable

PROBE_TIMEOUT_SEC = 0.3
DOWN_AFTER_SEC = 5.0
"""Time without an answer after which a component counts as down. Before, its state is unknown."""

MAX_PENDING_DELETIONS = 1000
"""Limit of pending deletions to examine, oldest first."""

OTHER_BROKER_WARNING = timedelta(minutes=10)

SERVICES = tuple(dict.fromkeys(queue.owner for queue in topology.QUEUES))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """A component without a result, and the reason."""

    state: Literal["down", "unknown"]
    reason: str


@dataclass(frozen=True, slots=True)
class DatabaseReport:
    """The part of the status report that comes from PostgreSQL."""

    pool: Stats
    csp: CspStatus
    waiting: int
    dead_letters: int
    stopped_stock: list[StoppedStock]
    other_broker_at: int | None
    database_behind_at: int | None


class Probe(Generic[T]):
    """Probe of one component. Concurrent callers share one check, so a component that hangs holds one task."""

    def __init__(self, check: Callable[[], Awaitable[T]]) -> None:
        """`check` raises ApiError when the component fails."""
        self._check = check
        self._task: asyncio.Task[T | Problem] | None = None
        self._began = 0.0
        self._failure: Problem | None = None
        """Result of the previous check, if the component failed."""

    async def run(self) -> T | Problem:
        """Return the result of the check, or the problem."""
        clock = asyncio.get_running_loop().time
        if self._task is None or self._task.done():
            self._task, self._began = asyncio.create_task(self._run_check()), clock()
            # Retrieve the exception here, because all callers may have timed out before the check fails.
            self._task.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        done, _ = await asyncio.wait([self._task], timeout=PROBE_TIMEOUT_SEC)
        if done:
            return self._task.result()
        if self._failure is not None:
            return self._failure
        return Problem("unknown" if clock() - self._began < DOWN_AFTER_SEC else "down", _no_answer())

    async def _run_check(self) -> T | Problem:
        try:
            result = await self._check()
        except ApiError as error:
            reason = error.message if error.__cause__ is None else connections.describe_error(error.__cause__)
            self._failure = Problem("down", reason)
            return self._failure
        self._failure = None
        return result


class StatusReporter:
    """Builds the status report from the queues in RabbitMQ and the records in PostgreSQL."""

    def __init__(self, publisher: Publisher, engine: AsyncEngine) -> None:
        self._publisher = publisher
        self._database = Probe(lambda: _query_database(engine))
        # Apart, because the forecast takes longest. Without an answer in time, the report leaves it out.
        self._low_stock = Probe(lambda: _query_low_stock(engine))

    async def report(self) -> Status:
        """Return the status. Fields of a component that is down are None."""
        queues, database, low_stock = await asyncio.gather(
            _inspect_queues(self._publisher), self._database.run(), self._low_stock.run()
        )
        known = None if isinstance(database, Problem) else database
        status = Status(
            checked_at=int(time.time()),
            rabbitmq=_part_status(queues),
            database=_part_status(database),
            services=[
                ServiceStatus(service=service, state=_service_state(service, queues)) for service in SERVICES
            ],
            queues=None if isinstance(queues, Problem) else queues,
            pool=known and known.pool,
            csp=known and known.csp,
            waiting=known and known.waiting,
            dead_letters=known and known.dead_letters,
            stopped_stock=known and known.stopped_stock,
            other_broker_at=known and known.other_broker_at,
            database_behind_at=known and known.database_behind_at,
            attention=[],
        )
        items = attention.find_items(status, () if isinstance(low_stock, Problem) else low_stock)
        return status.model_copy(update={"attention": items})


def _part_status(result: object) -> PartStatus:
    if isinstance(result, Problem):
        return PartStatus(state=result.state, problem=result.reason)
    return PartStatus(state="up", problem=None)


def _service_state(service: str, queues: Sequence[QueueStatus] | Problem) -> ServiceState:
    """Return the state of a service by the consumers of its queues. Queues without an answer do not count."""
    if isinstance(queues, Problem):
        return "unknown"
    consumers = [status.consumers for status in queues if status.service == service]
    consumed = [number > 0 for number in consumers if number is not None]
    if not consumed:
        return "unknown"
    return "up" if all(consumed) else "partly" if any(consumed) else "down"


async def _inspect_queues(publisher: Publisher) -> list[QueueStatus] | Problem:
    """Return the status of each queue, or the problem if RabbitMQ answers about no queue."""
    try:
        queues = await asyncio.gather(*(_inspect_queue(publisher, queue) for queue in topology.QUEUES))
    except Disconnected as error:
        return Problem("down", str(error))
    if all(status.problem == _no_answer() for status in queues):
        # Not down: if RabbitMQ does not answer at all, the heartbeats end the connection.
        return Problem("unknown", _no_answer())
    return queues


async def _inspect_queue(publisher: Publisher, queue: topology.Queue) -> QueueStatus:
    """Raise Disconnected if the connection is lost."""
    try:
        info = await publisher.inspect_queue(queue.name, timeout_sec=PROBE_TIMEOUT_SEC)
    except QueueUnavailable as error:
        problem = _no_answer() if error.__cause__ is None else str(error)
        return QueueStatus(queue=queue.name, service=queue.owner, messages=None, consumers=None, problem=problem)
    return QueueStatus(
        queue=queue.name, service=queue.owner, messages=info.messages, consumers=info.consumers, problem=None
    )


def _no_answer() -> str:
    return f"no answer in {PROBE_TIMEOUT_SEC:g} s"


async def _query_database(engine: AsyncEngine) -> DatabaseReport:
    """Raises ApiError DATABASE_UNAVAILABLE."""
    newest = (
        select(csp_listings.c.begun_at, csp_listings.c.held_at, csp_listings.c.applied_at)
        .order_by(csp_listings.c.listing_id.desc())
        .limit(1)
        .subquery()
    )
    listed_at = select(unix_seconds(applied_listing.c.begun_at))
    hold_until = sandboxes.c.deletion_hold_until
    pending = (
        select(
            func.coalesce(hold_until, sandboxes.c.deletion_requested_at).label("pending_since"),
            sandboxes.c.deletion_attempts,
            sandboxes.c.deletion_error,
        )
        .where(sandboxes.c.status == "pending_deletion", hold_until.is_(None) | (hold_until <= func.now()))
        .order_by(sandboxes.c.status_since)
        .limit(MAX_PENDING_DELETIONS)
        .subquery()
    )
    failing = pending.c.deletion_attempts > 0
    deletions = select(
        unix_seconds(func.min(pending.c.pending_since)).label("pending_since"),
        func.count().filter(failing).label("failing"),
        func.max(pending.c.deletion_error).filter(failing).label("error"),
    ).subquery()
    seen_at = func.max(allocators.c.other_broker_at)
    other_broker_at = select(unix_seconds(seen_at)).having(seen_at > func.now() - OTHER_BROKER_WARNING)
    behind_at = select(unix_seconds(func.max(allocator_epoch.c.database_behind_at)))
    # One row and one statement, because round trips are most of the cost of a report.
    report = select(
        deletions,
        unix_seconds(newest.c.begun_at).label("begun_at"),
        newest.c.held_at,
        newest.c.applied_at,
        listed_at.scalar_subquery().label("listed_at"),
        select(func.count()).select_from(waiting).scalar_subquery().label("waiting"),
        select(func.count()).select_from(dead_letters).scalar_subquery().label("dead_letters"),
        other_broker_at.scalar_subquery().label("other_broker_at"),
        behind_at.scalar_subquery().label("database_behind_at"),
    ).select_from(deletions.outerjoin(newest, true()))
    stopped = (
        select(
            stock_prefixes.c.name_prefix,
            unix_seconds(stock_prefixes.c.stopped_at).label("stopped_at"),
            stock_prefixes.c.stop_cause.label("cause"),
            stock_prefixes.c.stop_reason.label("reason"),
        )
        .join(stock_rules, stock_rules.c.name_prefix == stock_prefixes.c.name_prefix)
        .where(stock_prefixes.c.stopped_at.is_not(None))
        .order_by(stock_prefixes.c.name_prefix)
    )
    pool = await pool_stats(engine)
    async with read_connection(engine) as connection:
        row = (await connection.execute(report)).one()
        stopped_stock = [
            StoppedStock.model_validate(dict(rule)) for rule in (await connection.execute(stopped)).mappings()
        ]
    unfinished = row.begun_at is not None and row.applied_at is None and row.held_at is None
    csp = CspStatus(
        listed_at=row.listed_at,
        unfinished_since=row.begun_at if unfinished else None,
        held=row.held_at is not None and row.applied_at is None,
        pending_since=row.pending_since,
        failing=row.failing,
        error=row.error,
    )
    return DatabaseReport(
        pool=pool,
        csp=csp,
        waiting=row.waiting,
        dead_letters=row.dead_letters,
        stopped_stock=stopped_stock,
        other_broker_at=row.other_broker_at,
        database_behind_at=row.database_behind_at,
    )


async def _query_low_stock(engine: AsyncEngine) -> list[attention.LowStock]:
    """Raises ApiError DATABASE_UNAVAILABLE."""
    rates = (stock_forecasts.c.recent_leases_per_sec, stock_forecasts.c.usual_leases_per_sec)
    low = (
        select(
            stock_forecasts.c.name_prefix,
            stock_forecasts.c.exhaustion_sec,
            (func.greatest(*rates) * 3600).label("leases_per_hour"),
        )
        .where(stock_forecasts.c.exhaustion_sec < attention.SOON_EMPTY_SEC)
        .order_by(stock_forecasts.c.name_prefix)
    )
    async with read_connection(engine) as connection:
        return [attention.LowStock(**row) for row in (await connection.execute(low)).mappings()]
