"""`python -m sandbox_broker.migrate`: migrate the database of DATABASE_URL to the newest schema.

The command is idempotent. An advisory lock serializes concurrent runs.
"""

from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from pydantic import Field
from sqlalchemy import Connection, text

from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.runtime import event_loop
from sandbox_broker.runtime.server_urls import format_database
from sandbox_broker.runtime.settings import DatabaseUrl, EnvironmentSettings, load, stop

_LOCK = 0x5A4DB0
"""Number of the advisory lock, an arbitrary constant."""


class Settings(EnvironmentSettings):
    database_url: DatabaseUrl = Field(repr=False)


async def migrate(database_url: str) -> None:
    """Migrate the database. Raises the errors of asyncpg if the database does not answer or shares sessions."""
    primary = Primary(database_url)
    await connections.require_own_sessions(primary)
    engine = connections.create_engine(primary, statement_timeout_sec=0)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
    connection.commit()
    try:
        command.upgrade(config(connection), "head")
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": _LOCK})
        connection.commit()


def config(connection: Connection) -> Config:
    """Return the Alembic configuration for this connection, because there is no alembic.ini."""
    alembic = Config()
    alembic.set_main_option("script_location", str(Path(__file__).parent / "database" / "migrations"))
    alembic.attributes["connection"] = connection
    return alembic


def main() -> None:
    url = load(Settings).database_url
    try:
        event_loop.run(migrate(url))
    except (*connections.CONNECTION_ERRORS, asyncpg.PostgresError) as error:
        stop(f"DATABASE_URL: {format_database(url)}: {connections.describe_error(error)}")


if __name__ == "__main__":
    main()
