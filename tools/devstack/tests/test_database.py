"""The database of a clone and the simulator's accounts are of one age, or both are new."""

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


async def mark(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE mark ()")
    await connection.close()


async def is_marked(url: str) -> bool:
    connection = await asyncpg.connect(url)
    found = await connection.fetchval("SELECT to_regclass('mark') IS NOT NULL")
    await connection.close()
    return bool(found)


async def test_what_belongs_together_is_kept(settings_from: SettingsFrom, server: Server) -> None:
    settings = settings_from()
    url = await database.prepare_database(settings, server)
    await mark(url)
    database.accounts_file(settings).write_text("{}")

    assert await database.prepare_database(settings, server) == url
    assert await is_marked(url)
    assert database.accounts_file(settings).exists()


async def test_a_database_without_its_accounts_starts_anew(settings_from: SettingsFrom, server: Server) -> None:
    settings = settings_from()
    url = await database.prepare_database(settings, server)
    await mark(url)

    await database.prepare_database(settings, server)

    assert not await is_marked(url)


async def test_accounts_of_another_database_are_forgotten(
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
    await mark(url)

    await database.prepare_database(settings, server)

    assert await is_marked(url)


async def test_a_database_that_the_user_named_is_taken_as_it_is(
    settings_from: SettingsFrom, own_postgres_url: str
) -> None:
    settings = settings_from(DATABASE_URL=own_postgres_url)

    assert (
        await database.prepare_database(settings, Server(own_postgres_url, user_supplied=True)) == own_postgres_url
    )
    assert database.accounts_file(settings) != database.accounts_file(settings_from())
