"""Database of a clone: kept together with the simulator's accounts, or created again together with them."""

from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest

from devstack import database
from devstack.infrastructure import Server
from devstack.settings import Settings

pytest_plugins = ("devstack.fixtures",)

SettingsFrom = Callable[..., Settings]


@pytest.fixture
async def server(settings_from: SettingsFrom, own_postgres_url: str) -> AsyncIterator[Server]:
    yield Server(own_postgres_url.removesuffix("/postgres"))
    connection = await asyncpg.connect(own_postgres_url)
    for row in await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'sandbox_broker_dev_%'"):
        await connection.execute(f'DROP DATABASE "{row["datname"]}"')
    await connection.close()


async def create_mark(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE mark ()")
    await connection.close()


async def is_marked(url: str) -> bool:
    connection = await asyncpg.connect(url)
    exists = await connection.fetchval("SELECT to_regclass('mark') IS NOT NULL")
    await connection.close()
    return bool(exists)


async def test_a_database_with_its_accounts_is_kept(settings_from: SettingsFrom, server: Server) -> None:
    settings = settings_from()
    url = await database.prepare_database(settings, server)
    await create_mark(url)
    database.accounts_file(settings).write_text("{}")

    assert await database.prepare_database(settings, server) == url
    assert await is_marked(url)
    assert database.accounts_file(settings).exists()


async def test_a_database_without_its_accounts_is_recreated(settings_from: SettingsFrom, server: Server) -> None:
    settings = settings_from()
    url = await database.prepare_database(settings, server)
    await create_mark(url)

    await database.prepare_database(settings, server)

    assert not await is_marked(url)


async def test_accounts_without_their_database_are_deleted(
    settings_from: SettingsFrom, server: Server, own_postgres_url: str
) -> None:
    settings = settings_from()
    await database.prepare_database(settings, server)
    database.accounts_file(settings).write_text("{}")
    connection = await asyncpg.connect(own_postgres_url)
    await connection.execute(f'DROP DATABASE "{settings.database_name}"')
    await connection.close()

    await database.prepare_database(settings, server)

    assert not database.accounts_file(settings).exists()


async def test_a_database_for_a_real_csp_is_never_replaced(settings_from: SettingsFrom, server: Server) -> None:
    settings = settings_from(CSP_BASE_URL="https://csp.example/v2", CSP_API_TOKEN="t")
    url = await database.prepare_database(settings, server)
    await create_mark(url)

    await database.prepare_database(settings, server)

    assert await is_marked(url)


async def test_a_database_named_by_the_user_is_used_unchanged(
    settings_from: SettingsFrom, own_postgres_url: str
) -> None:
    settings = settings_from(DATABASE_URL=own_postgres_url)

    assert (
        await database.prepare_database(settings, Server(own_postgres_url, user_supplied=True)) == own_postgres_url
    )
    assert database.accounts_file(settings) != database.accounts_file(settings_from())
