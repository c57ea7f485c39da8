"""Connections to PostgreSQL: a pooled engine for reads, and a dedicated connection for the writer."""

import asyncio

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sandbox_broker.database import schema_version
from sandbox_broker.database.primary import Primary
from sandbox_broker.runtime.server_urls import format_database

RETRY_SEC = 0.2

SHARED_SESSIONS = (
    "leads to a pooler that shares sessions, like PgBouncer in transaction mode; "
    "set pool_mode = session, or connect to PostgreSQL directly"
)

CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.OperatorInterventionError,  # the server shuts down, or has cancelled the statement
    asyncpg.InternalClientError,  # the server has just closed the connection
    asyncpg.InsufficientResourcesError,  # no connections, memory or disk space left
    asyncpg.ReadOnlySQLTransactionError,  # after a fail-over, this server is not the primary
    asyncpg.PostgresSystemError,
    PoolExhausted,
)
"""Errors of the connection, not of the statement: the database is down, shuts down, or did not answer in time."""


def create_engine(primary: Primary, *, statement_timeout_sec: float = 10, **options: object) -> AsyncEngine:
    """Create an engine with a connection pool that tests connections before use. `statement_timeout_sec` 0 means no
    limit. The engine raises the errors of asyncpg, so that callers can catch CONNECTION_ERRORS."""

    async def connection() -> asyncpg.Connection:
        # asyncpg parses the URL, because SQLAlchemy would pass its options (sslmode, …) on as keyword arguments.
        return await connect(primary, application_name="pool", statement_timeout_sec=statement_timeout_sec)

    created = create_async_engine("postgresql+asyncpg://", pool_pre_ping=True, async_creator=connection, **options)
    event.listen(created.sync_engine, "handle_error", _asyncpg_error, retval=True)
    return created


def _asyncpg_error(context: ExceptionContext) -> BaseException | None:
    # SQLAlchemy has no class for a lost connection. Its test before use still needs the classes of SQLAlchemy.
    return None if context.is_pre_ping else context.original_exception.__cause__


async def connect(primary: Primary, *, application_name: str, statement_timeout_sec: float) -> asyncpg.Connection:
    """Open one connection (see Primary.connect).

    Raises one of CONNECTION_ERRORS for every error of the server, because a server with a full disk may report
    another error class.
    """
    try:
        return await primary.connect(
            application_name=application_name,
            statement_timeout_sec=statement_timeout_sec,
        )
    except CONNECTION_ERRORS:
        raise
    except asyncpg.PostgresError as error:
        raise asyncpg.ConnectionFailureError(describe_error(error)) from error


def describe_error(error: BaseException) -> str:
    """Return the error text of a connection in one line, without the password."""
    return " ".join(str(error).split()) or type(error).__name__


# Divides by zero in the session of the first connection.
_FAIL_IN_FIRST_SESSION = """
SELECT 1 / (current_setting('sandbox_broker.session_owner', true) IS DISTINCT FROM 'first')::int
"""


class SharedSessionsError(asyncpg.InterfaceError):
    """The connections of the URL share sessions, so settings and locks of a session do not work."""

    def __init__(self) -> None:
        super().__init__(f"the URL {SHARED_SESSIONS}")


async def require_own_sessions(primary: Primary) -> None:
    """Raise SharedSessionsError if two connections share a session. PgBouncer in transaction mode gives the session
    that was released last to the next transaction, perhaps of another client."""
    try:
        first = await connect(primary, application_name="preflight", statement_timeout_sec=3)
        try:
            second = await connect(primary, application_name="preflight", statement_timeout_sec=3)
            try:
                # Without prepared statements, which fail in such a session.
                await first.execute("SET sandbox_broker.session_owner = 'first'")
                await second.execute(_FAIL_IN_FIRST_SESSION)
            finally:
                second.terminate()
        finally:
            first.terminate()
    except (
        asyncpg.DivisionByZeroError,
        asyncpg.DuplicatePreparedStatementError,
        asyncpg.InvalidSQLStatementNameError,
        asyncpg.ProtocolViolationError,
    ) as error:
        raise SharedSessionsError from error


async def find_problem(database_url: str, *, patience_sec: float) -> str | None:
    """Return None if the database answers and has the schema, otherwise the problem. Retry for `patience_sec` while
    no primary accepts connections. A wrong password or database name is returned at once."""
    deadline = asyncio.get_running_loop().time() + patience_sec
    reason: BaseException | None = None
    while True:
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await _problem(database_url)
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.ReadOnlySQLTransactionError) as error:
            # The deadline interrupts the last attempt. The error of the attempt before it says more.
            reason = reason if reason is not None and limit.expired() else error
            if asyncio.get_running_loop().time() + RETRY_SEC > deadline:
                return f"no PostgreSQL answers at {format_database(database_url)} ({describe_error(reason)})"
            await asyncio.sleep(RETRY_SEC)
        except SharedSessionsError:
            return f"{format_database(database_url)} {SHARED_SESSIONS}"
        except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            return f"{format_database(database_url)}: {describe_error(error)}"


async def _problem(database_url: str) -> str | None:
    primary = Primary(database_url)
    await require_own_sessions(primary)
    connection = await connect(primary, application_name="preflight", statement_timeout_sec=3)
    try:
        if await connection.fetchval("SELECT to_regclass('allocator_epoch')") is None:
            return f"{format_database(database_url)} has no tables yet: run python -m sandbox_broker.migrate"
        # A newer schema suits this code, too, so an earlier version can be started again.
        required = schema_version.read_required()
        version = await connection.fetchval("SELECT version_num FROM alembic_version")
        if version is None or version < required:
            return (
                f"{format_database(database_url)} has the schema {version}, and this version needs {required}: run "
                "python -m sandbox_broker.migrate"
            )
        return None
    finally:
        connection.terminate()


async def check_connection(engine: AsyncEngine) -> str | None:
    """Return None if the database answers, otherwise the error. This is a readiness check."""
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except CONNECTION_ERRORS as error:
        return describe_error(error)
    return None
