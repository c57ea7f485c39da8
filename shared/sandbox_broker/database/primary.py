"""Connections to the primary server of the database.

After a fail-over, the former primary may come back and still accept connections as a primary. The identity
distinguishes the two: all servers of an installation have the same system identifier, and a promotion raises the
timeline.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

import asyncpg
import structlog
from asyncpg.connect_utils import SessionAttribute

from sandbox_broker.runtime.server_urls import database_host, split_database_url

CONNECT_TIMEOUT_SEC = 3.0
HOST_TIMEOUT_SEC = 2.0
"""Time limit of one server of several. A frozen server or a silent address delays no connection for longer."""
OTHER_PRIMARY_SEC = 0.3
"""Time for the other servers to answer after a primary has answered, because another primary may be newer."""
CHECK_SEC = 5.0
"""Time between two checks for a newer primary."""

_READ_ROLE = """
SELECT pg_is_in_recovery() AS is_standby, current_setting('default_transaction_read_only') = 'on' AS is_read_only
"""
# pg_control_checkpoint() would show the new timeline only after the first checkpoint of the new primary.
_READ_IDENTITY = """
SELECT pg_walfile_name(pg_current_wal_lsn()) AS wal_file, system_identifier FROM pg_control_system()
"""

log = structlog.get_logger()


class Identity(NamedTuple):
    """A primary at one time: its timeline and the system identifier of the installation."""

    timeline: int
    system: int

    def is_older_than(self, other: "Identity | None") -> bool:
        return other is not None and self.system == other.system and self.timeline < other.timeline


class Primary:
    """Opens connections to the newest primary of DATABASE_URL. When it finds a newer one, it closes all connections
    to older ones, so that their owners connect again. It never returns to an older primary."""

    def __init__(self, database_url: str) -> None:
        self._urls = split_database_url(database_url)
        attributes = parse_qs(urlsplit(database_url).query).get("target_session_attrs", [])
        self._needs_writable = attributes[-1:] == ["read-write"]
        self._newest: Identity | None = None
        self._opened: WeakKeyDictionary[asyncpg.Connection, Identity] = WeakKeyDictionary()

    async def watch(self) -> None:
        """Look for a newer primary every CHECK_SEC, until cancelled. Connections that are in use or idle do not
        notice a fail-over while the former primary still answers."""
        while True:
            await asyncio.sleep(CHECK_SEC)
            try:
                connection = await self.connect(application_name="primary-check", statement_timeout_sec=1)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                log.debug("database.primary_not_checked", error=str(error) or type(error).__name__)
            else:
                connection.terminate()

    async def connect(self, *, application_name: str, statement_timeout_sec: float) -> asyncpg.Connection:
        """Open a connection. Several servers are tried concurrently. The server cancels statements after
        `statement_timeout_sec`, 0 for no limit. The client gives up on a silent server two seconds later.

        Raises ReadOnlySQLTransactionError if a standby or a former primary answers, but no primary. Raises the
        errors of asyncpg, OSError or TimeoutError if no server accepts the connection.
        """
        attempts = [
            asyncio.create_task(self._open(url, application_name, statement_timeout_sec)) for url in self._urls
        ]
        chosen: asyncpg.Connection | None = None
        try:
            await _wait_for_primaries(attempts)
            chosen = self._choose(attempts)
            return chosen
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.wait(attempts)
            for connection in _connections(attempts):
                if connection is not chosen:
                    connection.terminate()

    async def _open(self, url: str, application_name: str, statement_timeout_sec: float) -> asyncpg.Connection:
        """Connect to one server and learn its identity."""
        async with asyncio.timeout(CONNECT_TIMEOUT_SEC if len(self._urls) == 1 else HOST_TIMEOUT_SEC):
            connection: asyncpg.Connection = await asyncpg.connect(
                url,
                target_session_attrs=SessionAttribute.any,  # because `_identify` checks and names the server
                command_timeout=statement_timeout_sec + 2 if statement_timeout_sec else None,
                server_settings={"application_name": application_name},
            )
            try:
                # Not in `server_settings`, because PgBouncer refuses other settings there.
                await connection.execute(
                    f"SET statement_timeout = {statement_timeout_sec * 1000:.0f}; SET jit = off"
                )
                self._opened[connection] = await self._identify(connection, str(database_host(url)))
            except BaseException:  # also after a cancellation, because the connection has no other owner yet
                connection.terminate()
                raise
            return connection

    async def _identify(self, connection: asyncpg.Connection, server: str) -> Identity:
        (role,) = await connection.fetch(_READ_ROLE)
        if role["is_standby"]:
            raise asyncpg.ReadOnlySQLTransactionError(f"{server} is a standby")
        if role["is_read_only"] and self._needs_writable:
            raise asyncpg.ReadOnlySQLTransactionError(f"{server} is read-only")
        try:
            (row,) = await connection.fetch(_READ_IDENTITY)
        except (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError):
            return Identity(timeline=0, system=0)  # a managed service hides them
        identity = Identity(int(row["wal_file"][:8], 16), row["system_identifier"])
        if identity.is_older_than(self._newest):
            raise asyncpg.ReadOnlySQLTransactionError(f"{server} is a former primary")
        return identity

    def _choose(self, attempts: Sequence["asyncio.Task[asyncpg.Connection]"]) -> asyncpg.Connection:
        """Return the connection to the newest primary. Raises the most specific error without one."""
        connections = _connections(attempts)
        if not connections:
            errors = [error for attempt in attempts if (error := attempt.exception()) is not None]
            raise next((error for error in errors if not isinstance(error, OSError)), errors[0])
        chosen = max(connections, key=lambda connection: self._opened[connection])
        identity = self._opened[chosen]
        if identity.is_older_than(self._newest):  # a concurrent call has found a newer one
            raise asyncpg.ReadOnlySQLTransactionError("only a former primary answers")
        if identity != self._newest:
            self._close_older_than(identity)
            self._newest = identity
        return chosen

    def _close_older_than(self, identity: Identity) -> None:
        superseded = [connection for connection, old in self._opened.items() if old.is_older_than(identity)]
        for connection in superseded:
            connection.terminate()
        if self._newest is not None:
            log.warning("database.primary_changed", timeline=identity.timeline, closed=len(superseded))


async def _wait_for_primaries(attempts: Sequence["asyncio.Task[asyncpg.Connection]"]) -> None:
    """Wait until all attempts have ended, at most OTHER_PRIMARY_SEC after the first connection."""
    pending = set(attempts)
    while pending and not _connections(attempts):
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    if pending:
        await asyncio.wait(pending, timeout=OTHER_PRIMARY_SEC)


def _connections(attempts: Sequence["asyncio.Task[asyncpg.Connection]"]) -> list[asyncpg.Connection]:
    return [
        attempt.result()
        for attempt in attempts
        if attempt.done() and not attempt.cancelled() and attempt.exception() is None
    ]
