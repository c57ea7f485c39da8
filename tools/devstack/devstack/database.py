"""The database of this clone, and its agreement with the simulator's accounts.

The simulator keeps its accounts in a file, the broker what it knows of them in a database. When one is new
and the other is not, the broker would see a foreign pool. So each database is created together with an id,
noted on the database and beside the file; when they differ, or one is missing, both start anew.
"""

import secrets
from pathlib import Path

import asyncpg

from devstack import postgres
from devstack.infrastructure import Server
from devstack.settings import Settings, digest


async def prepare_database(settings: Settings, found: Server) -> str:
    """The URL of a database that exists. One that the user named is never created or replaced."""
    settings.state_directory.mkdir(parents=True, exist_ok=True)
    if found.user_supplied:
        return found.url
    connection = await asyncpg.connect(f"{found.url}/postgres", timeout=10)
    try:
        if settings.csp_base_url is None:
            if not await _agrees(connection, settings):
                await _start_anew(connection, settings)
        elif not await _exists(connection, settings.database_name):
            await _create(connection, settings.database_name)
    finally:
        await connection.close(timeout=10)
    return f"{found.url}/{settings.database_name}"


def accounts_file(settings: Settings) -> Path:
    """Where the simulator keeps its accounts: one file for the clone's database, and one per DATABASE_URL."""
    if settings.database_url is None:
        return settings.state_directory / "csp-accounts.json"
    return settings.state_directory / f"csp-accounts-{digest(postgres.driver_neutral(settings.database_url))}.json"


def _id_file(settings: Settings) -> Path:
    return settings.state_directory / "database-id"


async def _agrees(connection: asyncpg.Connection, settings: Settings) -> bool:
    noted = _read_id(settings)
    return noted is not None and noted == await _comment(connection, settings.database_name)


async def _start_anew(connection: asyncpg.Connection, settings: Settings) -> None:
    _forget(settings)
    await connection.execute(f'DROP DATABASE IF EXISTS "{settings.database_name}" WITH (FORCE)')
    await _create(connection, settings.database_name)
    identity = secrets.token_hex(8)
    await connection.execute(f"COMMENT ON DATABASE \"{settings.database_name}\" IS '{identity}'")
    _note(settings, identity)


def _read_id(settings: Settings) -> str | None:
    if not accounts_file(settings).exists() or not _id_file(settings).exists():
        return None
    return _id_file(settings).read_text().strip()


def _forget(settings: Settings) -> None:
    accounts_file(settings).unlink(missing_ok=True)
    _id_file(settings).unlink(missing_ok=True)


def _note(settings: Settings, identity: str) -> None:
    _id_file(settings).write_text(f"{identity}\n")


async def _create(connection: asyncpg.Connection, name: str) -> None:
    await connection.execute(f'CREATE DATABASE "{name}"')


async def _exists(connection: asyncpg.Connection, name: str) -> bool:
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name))


async def _comment(connection: asyncpg.Connection, name: str) -> str | None:
    comment: str | None = await connection.fetchval(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", name
    )
    return comment
