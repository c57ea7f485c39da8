"""Connections to PostgreSQL: an engine for reading, and one dedicated connection for the writer."""

import asyncio
from urllib.parse import urlsplit

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECT_TIMEOUT_SEC = 3.0
RETRY_SEC = 0.2

CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.OperatorInterventionError,  # it shuts down, or has ended the statement
    asyncpg.InternalClientError,  # the server has ended the connection a moment ago
    asyncpg.InsufficientResourcesError,  # no connections, memory or disk left
    asyncpg.ReadOnlySQLTransactionError,  # after a failover: no longer, or not yet, the primary
    asyncpg.PostgresSystemError,
    PoolExhausted,
)
"""The database is not there, is going away, or did not answer in time: nothing is wrong with the statement."""


def engine(database_url: str, *, statement_timeout_sec: float = 10, **options: object) -> AsyncEngine:
    """A pool of connections that are tested before use; 0 for `statement_timeout_sec` is no limit. What goes
    wrong is raised as asyncpg says it, so that CONNECTION_ERRORS tells it apart."""

    async def connection() -> asyncpg.Connection:
        # asyncpg reads the URL: SQLAlchemy would take its options (sslmode, …) for arguments of a function.
        return await connect(database_url, application_name="pool", statement_timeout_sec=statement_timeout_sec)

    created = create_async_engine("postgresql+asyncpg://", pool_pre_ping=True, async_creator=connection, **options)
    event.listen(created.sync_engine, "handle_error", _as_asyncpg_says, retval=True)
    return created


def _as_asyncpg_says(context: ExceptionContext) -> BaseException | None:
    # SQLAlchemy has no class for "the connection is gone"; the test before use needs its own classes.
    return None if context.is_pre_ping else context.original_exception.__cause__


async def connect(database_url: str, *, application_name: str, statement_timeout_sec: float) -> asyncpg.Connection:
    """One connection. A statement that takes longer than `statement_timeout_sec` is ended by the server; a
    server that does not answer at all is given up two seconds later. Raises one of CONNECTION_ERRORS, whatever the
    server says: on a full disk it may not even get as far as to name that."""
    try:
        return await asyncpg.connect(
            database_url,
            timeout=CONNECT_TIMEOUT_SEC,
            command_timeout=statement_timeout_sec + 2 if statement_timeout_sec else None,
            server_settings={
                "application_name": application_name,
                "statement_timeout": f"{statement_timeout_sec * 1000:.0f}",
                "jit": "off",
            },
        )
    except CONNECTION_ERRORS:
        raise
    except asyncpg.PostgresError as error:
        raise asyncpg.ConnectionFailureError(reason(error)) from error


def reason(error: BaseException) -> str:
    """What went wrong with a connection, in one line without the password."""
    return " ".join(str(error).split()) or type(error).__name__


def address(database_url: str) -> str:
    parts = urlsplit(database_url)
    return f"{parts.hostname}:{parts.port or 5432}{parts.path}"


async def preflight(database_url: str, *, patience_sec: float) -> str | None:
    """None if the database answers and has our tables, else what is wrong. A server that refuses connections
    is given `patience_sec` to come up; a wrong password or database name is told at once."""
    deadline = asyncio.get_running_loop().time() + patience_sec
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                return await _problem(database_url)
        except (OSError, TimeoutError, asyncpg.CannotConnectNowError) as error:
            if asyncio.get_running_loop().time() + RETRY_SEC > deadline:
                return f"no PostgreSQL answers at {address(database_url)} ({reason(error)})"
            await asyncio.sleep(RETRY_SEC)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            return f"{address(database_url)}: {reason(error)}"


async def _problem(database_url: str) -> str | None:
    connection = await connect(database_url, application_name="preflight", statement_timeout_sec=3)
    try:
        if await connection.fetchval("SELECT to_regclass('allocator_epoch')") is None:
            return f"{address(database_url)} has no tables yet: run python -m sandbox_broker.migrate"
        return None
    finally:
        connection.terminate()


async def ping(engine: AsyncEngine) -> str | None:
    """For readiness: None if the database answers."""
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except CONNECTION_ERRORS as error:
        return reason(error)
    return None
