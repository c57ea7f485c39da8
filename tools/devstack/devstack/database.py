"""Database of this clone, consistent with the accounts of the simulator.

The simulator stores its accounts in a file, the broker its pool in a database. If only one of them were new, the
pool would not match CSP. Each database therefore has a random id, stored as a comment on the database and in a file
beside the accounts. If the ids differ or one is missing, both are created again.
"""

import secrets
from pathlib import Path

import asyncpg

from devstack import postgres
from devstack.infrastructure import Server
from devstack.settings import Settings, digest


async def prepare_database(settings: Settings, server: Server) -> str:
    """Create the database if necessary and return its URL. A database named by the user stays unchanged."""
    settings.state_directory.mkdir(parents=True, exist_ok=True)
    if server.user_supplied:
        return server.url
    connection = await asyncpg.connect(f"{server.url}/postgres", timeout=10)
    try:
        if settings.csp_base_url is None:
            if not await _matches_accounts(connection, settings):
                await _recreate(connection, settings)
        elif not await _exists(connection, settings.database_name):
            await _create(connection, settings.database_name)
    finally:
        await connection.close(timeout=10)
    return f"{server.url}/{settings.database_name}"


def accounts_file(settings: Settings) -> Path:
    """Return the accounts file of the simulator: one for the clone's database and one for each DATABASE_URL."""
    if settings.database_url is None:
        return settings.state_directory / "csp-accounts.json"
    return settings.state_directory / f"csp-accounts-{digest(postgres.driver_neutral(settings.database_url))}.json"


def _id_file(settings: Settings) -> Path:
    return settings.state_directory / "database-id"


async def _matches_accounts(connection: asyncpg.Connection, settings: Settings) -> bool:
    stored = _read_id(settings)
    return stored is not None and stored == await _read_comment(connection, settings.database_name)


async def _recreate(connection: asyncpg.Connection, settings: Settings) -> None:
    _delete_state(settings)
    await connection.execute(f'DROP DATABASE IF EXISTS "{settings.database_name}" WITH (FORCE)')
    await _create(connection, settings.database_name)
    identity = secrets.token_hex(8)
    await connection.execute(f"COMMENT ON DATABASE \"{settings.database_name}\" IS '{identity}'")
    _write_id(settings, identity)


def _read_id(settings: Settings) -> str | None:
    if not accounts_file(settings).exists() or not _id_file(settings).exists():
        return None
    return _id_file(settings).read_text().strip()


def _delete_state(settings: Settings) -> None:
    accounts_file(settings).unlink(missing_ok=True)
    _id_file(settings).unlink(missing_ok=True)


def _write_id(settings: Settings, identity: str) -> None:
    _id_file(settings).write_text(f"{identity}\n")


async def _create(connection: asyncpg.Connection, name: str) -> None:
    await connection.execute(f'CREATE DATABASE "{name}"')


async def _exists(connection: asyncpg.Connection, name: str) -> bool:
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name))


async def _read_comment(connection: asyncpg.Connection, name: str) -> str | None:
    comment: str | None = await connection.fetchval(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", name
    )
    return comment
