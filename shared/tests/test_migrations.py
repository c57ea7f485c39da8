"""Migrations, and the constraints of the schema."""

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from sandbox_broker.contract import topology
from sandbox_broker.database import connections, schema
from sandbox_broker.database.primary import Primary
from sandbox_broker.migrate import config, migrate

CATALOG = """
SELECT 'column', a.attrelid::regclass::text, a.attname, concat_ws(
    ' ', format_type(a.atttypid, a.atttypmod), 'not null=' || a.attnotnull,
    'identity=' || a.attidentity::text,
    'collation=' || (SELECT collname FROM pg_collation WHERE oid = a.attcollation),
    'default=' || pg_get_expr(d.adbin, d.adrelid),
    'comment=' || col_description(a.attrelid, a.attnum))
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'table', oid::regclass::text, '', coalesce(obj_description(oid), '')
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
ORDER BY 1, 2, 3
"""


@pytest.fixture
async def empty(empty_database_url: str) -> AsyncIterator[str]:
    """Create a separate database for the test."""
    name = f"broker_test_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(empty_database_url)
    await admin.execute(f"CREATE DATABASE {name}")
    yield f"{empty_database_url.rsplit('/', 1)[0]}/{name}"
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def connection(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    opened = await asyncpg.connect(clean_database)
    yield opened
    await opened.close()


async def catalog(url: str) -> list[tuple[str, ...]]:
    opened = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await opened.fetch(CATALOG) if row[1] != "alembic_version"]
    finally:
        await opened.close()


async def test_migrate_is_idempotent(empty: str) -> None:
    await migrate(empty)
    first = await catalog(empty)
    await migrate(empty)
    assert await catalog(empty) == first


async def test_concurrent_migrations_are_serialized(empty: str) -> None:
    await asyncio.gather(*(migrate(empty) for _ in range(5)))
    opened = await asyncpg.connect(empty)
    assert await opened.fetchval("SELECT count(*) FROM allocator_epoch") == 2
    left = """
        SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
        WHERE locktype = 'advisory' AND datname = current_database()
    """
    assert await opened.fetchval(left) == 0
    await opened.close()


async def test_the_schema_equals_the_migrated_database(empty: str, database_url: str) -> None:
    engine = connections.create_engine(Primary(empty))
    async with engine.begin() as opened:
        await opened.run_sync(schema.metadata.create_all)
    await engine.dispose()
    assert await catalog(empty) == await catalog(database_url)


async def test_alembic_finds_no_difference_to_the_schema(database_url: str) -> None:
    def differences(opened: Connection) -> list[object]:
        context = MigrationContext.configure(opened, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, schema.metadata))

    engine = connections.create_engine(Primary(database_url))
    async with engine.connect() as opened:
        assert await opened.run_sync(differences) == []
    await engine.dispose()


async def test_the_schema_has_the_columns_of_each_view(database_url: str) -> None:
    opened = await asyncpg.connect(database_url)
    columns = await opened.fetch(
        "SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) AS columns "
        "FROM information_schema.columns JOIN information_schema.views USING (table_schema, table_name) "
        "WHERE table_schema = 'public' GROUP BY table_name"
    )
    await opened.close()
    assert {row["table_name"]: row["columns"] for row in columns} == {
        view.name: [column.name for column in view.columns] for view in schema.VIEWS
    }


async def test_the_listing_views_return_the_newest_listing_of_their_kind(connection: asyncpg.Connection) -> None:
    async def listings() -> tuple[int | None, int | None]:
        applied = await connection.fetchval("SELECT listing_id FROM applied_listing")
        return applied, await connection.fetchval("SELECT listing_id FROM decided_listing")

    assert await listings() == (None, None)
    begin = "INSERT INTO csp_listings DEFAULT VALUES RETURNING listing_id"
    first, second, unfinished = [await connection.fetchval(begin) for _ in range(3)]
    assert await listings() == (None, None)
    await connection.execute("UPDATE csp_listings SET applied_at = now() WHERE listing_id = $1", first)
    assert await listings() == (first, first)
    await connection.execute("UPDATE csp_listings SET held_at = now() WHERE listing_id = $1", second)
    assert await listings() == (first, second)
    await connection.execute("UPDATE csp_listings SET applied_at = now() WHERE listing_id = $1", unfinished)
    assert await listings() == (unfinished, unfinished)


async def test_pool_totals_include_changes_that_are_not_added_up(connection: asyncpg.Connection) -> None:
    for number, status in enumerate(("available", "available", "stale")):
        await add_sandbox(connection, str(number), status=status)
    await connection.execute(
        "INSERT INTO pool_counts VALUES ('pool', '', 'deleted', 4), ('name_prefix', 'n', 'deleted', 4)"
    )
    await connection.execute("UPDATE sandboxes SET status = 'stale' WHERE sandbox_id = '0'")
    totals = await connection.fetch("SELECT status, number FROM pool_totals WHERE number > 0")
    assert {row["status"]: row["number"] for row in totals} == {"available": 1, "stale": 2, "deleted": 4}


async def test_a_downgrade_can_be_upgraded_again(empty: str) -> None:
    await migrate(empty)
    first = await catalog(empty)
    engine = connections.create_engine(Primary(empty))
    async with engine.connect() as opened:
        await opened.run_sync(lambda plain: command.downgrade(config(plain), "base"))
    await engine.dispose()
    assert await catalog(empty) == []
    await migrate(empty)
    assert await catalog(empty) == first


# Constraints


async def add_sandbox(opened: asyncpg.Connection, sandbox_id: str, **values: object) -> None:
    await insert(
        opened,
        "sandboxes",
        sandbox_id=sandbox_id,
        **{"external_id": f"u-{sandbox_id}", "name": "n", "status": "available", **values},
    )


async def add_lease(opened: asyncpg.Connection, sandbox_id: str, holder: str, **values: object) -> None:
    await insert(opened, "leases", sandbox_id=sandbox_id, holder=holder, **values)


async def insert(opened: asyncpg.Connection, table: str, **values: object) -> None:
    columns = {"expires_at": "now()"} if table == "leases" else {}
    names = [*values, *columns]
    values_sql = [f"${number}" for number in range(1, len(values) + 1)] + list(columns.values())
    await opened.execute(
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(values_sql)})", *values.values()
    )


async def end_leases(opened: asyncpg.Connection) -> None:
    await opened.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")


async def test_a_holder_has_one_active_lease(connection: asyncpg.Connection) -> None:
    await add_lease(connection, "1", "anna")
    with pytest.raises(asyncpg.UniqueViolationError, match="leases_one_per_holder"):
        await add_lease(connection, "2", "anna")
    await add_lease(connection, "2", "bert")
    await end_leases(connection)
    await add_lease(connection, "3", "anna")


async def test_a_sandbox_has_one_lease_ever(connection: asyncpg.Connection) -> None:
    await add_lease(connection, "1", "anna")
    with pytest.raises(asyncpg.UniqueViolationError, match="leases_one_per_sandbox"):
        await add_lease(connection, "1", "bert")
    await end_leases(connection)
    with pytest.raises(asyncpg.UniqueViolationError, match="leases_one_per_sandbox"):
        await add_lease(connection, "1", "bert")


async def test_an_idempotency_key_names_one_lease(connection: asyncpg.Connection) -> None:
    await add_lease(connection, "1", "anna", idempotency_key="k")
    with pytest.raises(asyncpg.UniqueViolationError, match="leases_one_per_idempotency_key"):
        await add_lease(connection, "2", "bert", idempotency_key="k")
    await add_lease(connection, "3", "cleo")
    await add_lease(connection, "4", "dora")


async def test_an_ended_lease_has_a_known_reason(connection: asyncpg.Connection) -> None:
    await add_lease(connection, "1", "anna")
    for change in ("ended_at = now()", "end_reason = 'student'", "ended_at = now(), end_reason = 'boredom'"):
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE leases SET {change}")
    await end_leases(connection)


async def test_an_account_has_one_live_record(connection: asyncpg.Connection) -> None:
    await add_sandbox(connection, "1", external_id="u")
    with pytest.raises(asyncpg.UniqueViolationError, match="sandboxes_one_per_account"):
        await add_sandbox(connection, "2", external_id="u")
    with pytest.raises(asyncpg.UniqueViolationError):
        await add_sandbox(connection, "1", external_id="another")
    await connection.execute("UPDATE sandboxes SET status = 'deleted'")
    await add_sandbox(connection, "2", external_id="u")


async def test_only_the_statuses_of_the_contract_are_stored(connection: asyncpg.Connection) -> None:
    statuses = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")
    for number, status in enumerate(statuses):
        await add_sandbox(connection, str(number), status=status)
    for wrong in ("", "Available", "lost"):
        with pytest.raises(asyncpg.CheckViolationError, match="sandboxes_status"):
            await add_sandbox(connection, "99", status=wrong)
    with pytest.raises(asyncpg.NotNullViolationError):
        await add_sandbox(connection, "99", status=None)


async def test_each_queue_has_one_unique_epoch(connection: asyncpg.Connection) -> None:
    queues = {row["queue"]: row["epoch"] for row in await connection.fetch("SELECT * FROM allocator_epoch")}
    assert set(queues) == {topology.ALLOCATOR_COMMANDS.name, topology.ALLOCATOR_MAINTENANCE.name}
    for queue, epoch in queues.items():
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("INSERT INTO allocator_epoch (queue) VALUES ($1)", queue)
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("INSERT INTO allocator_epoch (queue, epoch) VALUES ('new', $1)", epoch)


async def test_names_are_sorted_by_bytes(connection: asyncpg.Connection) -> None:
    for number, name in enumerate(("b", "B", "a", "ä")):
        await add_sandbox(connection, str(number), name=name)
    assert [row[0] for row in await connection.fetch("SELECT name FROM sandboxes ORDER BY name")] == [
        "B",
        "a",
        "b",
        "ä",
    ]


async def test_text_keys_of_indexes_are_in_byte_order(connection: asyncpg.Connection) -> None:
    """The order of a locale depends on the version of the C library. A comparison with a column in byte order
    cannot use an index in that order either."""
    keys = await connection.fetch(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid, key::int, true) FROM pg_index, "
        "unnest(indcollation) WITH ORDINALITY AS collations (collation_id, key) "
        "WHERE collation_id = 'pg_catalog.default'::regcollation "
        "AND indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)"
    )
    # The statuses are known. A generated column uses them, so their collation cannot change.
    assert [tuple(key) for key in keys if key[0] != "alembic_version_pkc"] == [("sandboxes_by_status", "status")]


# The command


def run_migrate(url: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox_broker.migrate"],
        env={**os.environ, "DATABASE_URL": url},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


async def test_the_command_prints_nothing_on_success(empty: str, tmp_path: Path) -> None:
    for _ in range(2):
        ended = await asyncio.to_thread(run_migrate, empty, tmp_path)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert await catalog(empty)


@pytest.mark.parametrize(
    ("user", "host", "path", "reason"),
    [
        ("", "127.0.0.1:1", "/x", "127.0.0.1:1/x: "),
        ("", "no-such-host.invalid:5432", "/x", ""),
        ("", "", "/no_such_database", 'database "no_such_database" does not exist'),
        ("no_such_user:hunter2@", "", "", "no_such_user"),
        ("", "", "?sslmode=perhaps", "sslmode"),
        ("", "", "?no_such_option=1", "no_such_option"),
    ],
    ids=["refused", "host", "database", "user", "malformed", "option"],
)
async def test_the_command_reports_a_problem_in_one_line(
    database_url: str, tmp_path: Path, user: str, host: str, path: str, reason: str
) -> None:
    parts = urlsplit(database_url)
    ours, _, server = parts.netloc.rpartition("@")
    path = path if path.startswith("/") else f"{parts.path}{path}"
    url = f"postgresql://{user or ours + '@'}{host or server}{path}"
    ended = await asyncio.to_thread(run_migrate, url, tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("cannot start: DATABASE_URL: ")
    assert reason in ended.stderr
    assert "hunter2" not in ended.stderr
