"""Connections to PostgreSQL: an engine for reading, and one dedicated connection for the writer."""

import asyncio
from urllib.parse import urlsplit

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECT_TIMEOUT_SEC = 3.0

CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.QueryCanceledError,
    OperationalError,
    InterfaceError,
)
"""The database is not there, is going away, or did not answer in time: nothing is wrong with the statement."""


def engine(database_url: str, **options: object) -> AsyncEngine:
    """A pool of connections that are tested before use."""
    url = "postgresql+asyncpg://" + database_url.split("://", 1)[1]
    return create_async_engine(
        url,
        pool_pre_ping=True,
        connect_args={"timeout": CONNECT_TIMEOUT_SEC, "server_settings": {"jit": "off"}},
        **options,
    )


async def connect(database_url: str, *, application_name: str, statement_timeout_sec: float) -> asyncpg.Connection:
    """One connection. A statement that takes longer than `statement_timeout_sec` is ended by the server; a
    server that does not answer at all is given up two seconds later. Raises one of CONNECTION_ERRORS."""
    return await asyncpg.connect(
        database_url,
        timeout=CONNECT_TIMEOUT_SEC,
        command_timeout=statement_timeout_sec + 2,
        server_settings={
            "application_name": application_name,
            "statement_timeout": f"{statement_timeout_sec * 1000:.0f}",
            "jit": "off",
        },
    )


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
            connection = await connect(database_url, application_name="preflight", statement_timeout_sec=3)
        except (OSError, TimeoutError, asyncpg.CannotConnectNowError) as error:
            if asyncio.get_running_loop().time() > deadline:
                return f"no PostgreSQL answers at {address(database_url)} ({reason(error)})"
            await asyncio.sleep(0.2)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            return f"{address(database_url)}: {reason(error)}"
        else:
            break
    try:
        if await connection.fetchval("SELECT to_regclass('allocator_epoch')") is None:
            return f"{address(database_url)} has no tables yet: run python -m sandbox_broker.migrate"
        return None
    finally:
        await connection.close()


async def ping(engine: AsyncEngine) -> str | None:
    """For readiness: None if the database answers."""
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except CONNECTION_ERRORS as error:
        return reason(error)
    return None
