"""Write session: connection of one command queue to the pool, under the fencing epoch of the queue."""

import secrets
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

import asyncpg
import structlog

from allocator import metrics
from allocator.newest_lease import NewestLease
from allocator.policy_book import PolicyBook
from allocator.waiting_line import WaitingLine
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.observability import log_context
from sandbox_broker.runtime.access_keys import AccessKeys

T = TypeVar("T")

MAX_TRIES = 5
LOCK_TIMEOUT = "1s"

UNAVAILABLE = (
    *connections.CONNECTION_ERRORS,
    asyncpg.LockNotAvailableError,  # an operator's transaction holds the lock
)
"""Errors of the database or its environment. The command is not their cause."""

GENERIC_PLANS = """
SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
"""
"""Plan each statement once. Planning would take two thirds of the time of a small statement."""
CUSTOM_PLANS = "SET plan_cache_mode = force_custom_plan;"
"""Plan each execution, for rare statements with large reads."""

GUARD = "guard AS MATERIALIZED (SELECT epoch, policy_version FROM allocator_epoch WHERE epoch = $1 FOR SHARE)"
"""Epoch guard, the first CTE of every statement that writes the pool. A stale epoch selects no row. FOR SHARE makes
RAISE_EPOCH wait for running statements, so a new epoch sees all changes of earlier epochs. All epochs come from one
sequence, so the guard need not name its queue. `policy_version` is in this row, so a statement sees new policies
without a look-up, and applying them waits for running statements."""

RAISE_EPOCH = """
UPDATE allocator_epoch SET epoch = nextval('allocator_epochs'), backend_pid = pg_backend_pid()
WHERE queue = $1 RETURNING epoch
"""
# A predecessor with the epoch row still locked after the lock timeout has been in its transaction at least as long.
TERMINATE_PREDECESSOR = f"""
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = $1 AND pid <> pg_backend_pid()
  AND xact_start <= now() - interval '{LOCK_TIMEOUT}'
"""

log = structlog.get_logger()


class Fenced(Exception):
    """Another allocator has raised the epoch. Stop, and leave the messages to it."""


class ConcurrentUpdate(Exception):
    """Another allocator changed the same rows concurrently. Run the statement again to see its changes."""


class PoliciesChanged(Exception):
    """An administrator has applied other policies than those in the policy book. The statement has changed no
    row. Load the book and run the statement again."""


# Run again, the statement sees the changes of the other allocator.
_RACES = (ConcurrentUpdate, asyncpg.UniqueViolationError, asyncpg.TransactionRollbackError)
# The statement may have committed before the connection broke. It is idempotent, so run it again.
_CONNECTION_LOST = (
    ConnectionError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.ReadOnlySQLTransactionError,  # another server is the primary now
)


class WriteSession:
    """Connection, epoch and resources of the command handlers of one queue."""

    def __init__(
        self,
        primary: Primary,
        queue: str,
        publisher: Publisher,
        *,
        policies: PolicyBook,
        waiting_line: WaitingLine,
        broken_hold: timedelta,
        statement_timeout_sec: float,
        planner_settings: str,
        access_keys: AccessKeys | None = None,
        pseudonym_key: bytes | None = None,
        newest_lease: NewestLease | None = None,
        needs_all_leases: bool = False,
    ) -> None:
        """`planner_settings` is GENERIC_PLANS or CUSTOM_PLANS. With `needs_all_leases`, each new connection is
        checked for a database that went back in time."""
        self._primary = primary
        self._queue = queue
        self._statement_timeout_sec = statement_timeout_sec
        self._planner_settings = planner_settings
        self._needs_all_leases = needs_all_leases
        self.newest_lease = newest_lease
        self._connection: asyncpg.Connection | None = None
        self.publisher = publisher
        self.policies = policies
        self.waiting_line = waiting_line
        self.broken_hold = broken_hold
        """Time between the replacement of a broken sandbox and its deletion."""
        self.access_keys = access_keys
        """None: no logins."""
        self.pseudonym_key = pseudonym_key or secrets.token_bytes(32)
        """Key of the pseudonyms of students. Without a key in the settings, a random one of this session."""
        self.epoch = 0
        """Fencing epoch of every statement; 0 on standby."""

    @property
    def connection(self) -> asyncpg.Connection:
        if self._connection is None:
            raise RuntimeError("The write session is not connected.")
        return self._connection

    async def fetch(self, statement: str, *arguments: object) -> list[Any]:
        """Run a guarded statement with the epoch as $1 and `arguments` as $2, $3, …; return its rows.

        Raises Fenced if the epoch is stale.
        """
        return require_fence(await self.connection.fetch(statement, self.epoch, *arguments))

    async def fetch_one(self, statement: str, *arguments: object) -> Any:
        """Like `fetch`, for a statement with exactly one row."""
        return (await self.fetch(statement, *arguments))[0]

    async def run(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Open the session and run `operation`, at most MAX_TRIES times.

        Retry after a race with another allocator and after the loss of an established connection.
        """
        for _ in range(MAX_TRIES - 1):
            is_new = self._connection is None
            try:
                await self.open()
                return await operation()
            except _RACES as error:
                log.info("allocator.raced", error=connections.describe_error(error))
            except _CONNECTION_LOST as error:
                if is_new:
                    raise
                log.warning("database.reconnecting", error=connections.describe_error(error))
                self.close()
        await self.open()
        return await operation()

    async def open(self) -> None:
        """Connect if necessary, and raise the epoch unless the session has one."""
        if self._connection is None or self._connection.is_closed():
            await self.connect()
        if self.epoch == 0:
            await self.raise_epoch()
            log_context.bind(epoch=self.epoch)
            log.info("allocator.active", queue=self._queue)

    async def connect(self) -> None:
        """Open the connection; its application name is the queue. Raises one of UNAVAILABLE, or DatabaseBehind."""
        connection = await connections.connect(
            self._primary,
            application_name=self._queue,
            statement_timeout_sec=self._statement_timeout_sec,
        )
        try:
            await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'; {self._planner_settings}")
            if self._needs_all_leases and self.newest_lease is not None:
                await self.newest_lease.check(connection)
        except BaseException:  # also after a cancellation, because the connection has no other owner yet
            connection.terminate()
            raise
        self.policies.forget()  # this may be another database, for example a restored one
        self._connection = connection

    async def raise_epoch(self) -> None:
        """Fence all predecessors on the queue and write under a new epoch.

        A predecessor frozen inside a statement holds the epoch row; terminate its connection.
        """
        try:
            epoch = await self.connection.fetchval(RAISE_EPOCH, self._queue)
        except asyncpg.LockNotAvailableError:
            await self.connection.fetch(TERMINATE_PREDECESSOR, self._queue)
            epoch = await self.connection.fetchval(RAISE_EPOCH, self._queue)
        self._set_epoch(int(epoch))

    def stand_by(self) -> None:
        """Drop the epoch. The next `open` raises a new one."""
        self._set_epoch(0)

    def close(self) -> None:
        """Drop the connection without a goodbye to the server. The epoch remains."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    def _set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        metrics.EPOCH.labels(self._queue).set(epoch)


def require_fence(rows: list[Any]) -> list[Any]:
    """Return `rows` of a guarded statement. Raises Fenced without rows, because the guard selected none."""
    if not rows:
        raise Fenced
    return rows
