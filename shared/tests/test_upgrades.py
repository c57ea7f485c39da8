"""Upgrades of a database with data, and migrations that the services of the previous version survive."""

import re
from collections.abc import Mapping
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from devstack.testing import NewDatabase
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.migrate import config, migrate

UPGRADING = (Path(__file__).parents[2] / "docs" / "upgrading.md").read_text()


def list_revisions() -> list[str]:
    """Return all revisions, the oldest first."""
    directory = ScriptDirectory.from_config(config(None))  # type: ignore[arg-type]  # needs no connection
    return [script.revision for script in reversed(list(directory.walk_revisions()))]


REVISIONS = list_revisions()

WIDENED = ("leases_end_reason",)
"""Rules that later migrations replaced by one that allows more."""
BREAKING: Mapping[str, str] = {
    "0002": "replaces the table allocator_epoch",
    "0004": "replaces the table csp_accounts",
    "0007": "drops the column name_stem",
    "0008": "adds triggers to sandboxes that write the new table pool_changes",
}
"""Migrations during which the services of the previous version must be stopped: docs/upgrading.md."""

RECORDS = """
INSERT INTO sandboxes (sandbox_id, external_id, name, status, missing_since)
SELECT number::text, 'uuid-' || number, 'lab-' || number, status, CASE WHEN status = 'stale' THEN now() END
FROM unnest(ARRAY['available', 'available', 'allocated', 'pending_deletion', 'deletion_failed', 'stale', 'deleted'])
    WITH ORDINALITY AS record (status, number);
INSERT INTO leases (sandbox_id, holder, track_name, idempotency_key, expires_at, ended_at, end_reason) VALUES
    ('3', 'ada', 'dns-101', 'key-1', now() + interval '4 hours', NULL, NULL),
    ('4', 'bert', 'dns-101', NULL, now(), now(), 'student'),
    ('7', 'cleo', NULL, NULL, now(), now(), 'expired');
INSERT INTO outbox (type, subject, data) VALUES ('sandbox.allocated', '3', '{}');
INSERT INTO csp_listings (applied_at) VALUES (now());
INSERT INTO csp_accounts (external_id, sandbox_id, name, listing_id) VALUES ('uuid-1', '1', 'lab-1', 1)
"""

KEPT = {
    "sandboxes": "SELECT sandbox_id, external_id, name, status, status_since FROM sandboxes ORDER BY 1",
    "leases": "SELECT lease_id, sandbox_id, holder, track_name, idempotency_key, allocated_at, expires_at, "
    "ended_at, end_reason FROM leases ORDER BY 1",
    "outbox": "SELECT outbox_id, event_id, type, subject, data FROM outbox ORDER BY 1",
    "csp_listings": "SELECT listing_id, begun_at, applied_at FROM csp_listings ORDER BY 1",
}

COLUMNS = """
SELECT attrelid::regclass::text AS table_name, attname::text AS column_name,
    format_type(atttypid, atttypmod) AS type,
    attnotnull AND pg_get_expr(adbin, adrelid) IS NULL AND attidentity = '' AS required
FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0 AND NOT attisdropped
"""
RULES = """
SELECT conrelid::regclass::text AS table_name, conname || ' ' || pg_get_constraintdef(oid) AS rule
FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND conrelid <> 0 AND contype IN ('c', 'f', 'u', 'p', 'x')
UNION
SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public' AND indexdef LIKE 'CREATE UNIQUE%'
UNION
SELECT tgrelid::regclass::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
"""


async def upgrade(url: str, revision: str) -> None:
    def run(opened: Connection) -> None:
        command.upgrade(config(opened), revision)

    engine = connections.create_engine(Primary(url))
    async with engine.connect() as opened:
        await opened.run_sync(run)
    await engine.dispose()


async def read_kept(opened: asyncpg.Connection) -> dict[str, list[tuple[object, ...]]]:
    return {table: [tuple(row) for row in await opened.fetch(query)] for table, query in KEPT.items()}


@pytest.mark.parametrize("revision", REVISIONS[:-1])
async def test_data_of_each_revision_survives_the_upgrade(new_database: NewDatabase, revision: str) -> None:
    async with new_database() as url:
        await upgrade(url, revision)
        opened = await asyncpg.connect(url)
        await opened.execute(RECORDS)
        before = await read_kept(opened)

        await migrate(url)
        await opened.reload_schema_state()

        assert await read_kept(opened) == before
        # Values that migrations derive from the data.
        counts = "SELECT status, sum(number)::int FROM pool_changes GROUP BY status ORDER BY status"
        records = "SELECT status, count(*)::int FROM sandboxes GROUP BY status ORDER BY status"
        assert await opened.fetch(counts) == await opened.fetch(records)
        track = "SELECT track_name FROM sandboxes WHERE sandbox_id = '3'"
        assert revision >= "0008" or await opened.fetchval(track) == "dns-101"
        available = "SELECT sandbox_id FROM sandboxes WHERE available_stem = 'lab-' ORDER BY available_since"
        assert [row[0] for row in await opened.fetch(available)] == ["1", "2"]
        # The constraints hold for old and new leases together.
        with pytest.raises(asyncpg.UniqueViolationError, match="leases_one_per_holder"):
            await opened.execute("INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ('1', 'ada', now())")
        await opened.execute("INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ('1', 'dora', now())")
        await opened.close()


@pytest.mark.parametrize("revision", [revision for revision in REVISIONS[1:] if revision not in BREAKING])
async def test_the_previous_version_works_on_the_schema_after_a_migration(
    new_database: NewDatabase, revision: str
) -> None:
    """Statements of the previous version name only what existed before. They work on a schema that keeps every
    column with its type, requires no new column, and adds no rule to an existing table."""
    assert await find_restrictions(new_database, revision) == []


async def test_open_connections_outlive_the_new_order_of_the_keys(new_database: NewDatabase) -> None:
    """The prepared statements of running services return columns whose collation changes."""
    query = "SELECT sandbox_id, holder FROM leases WHERE holder = 'ada' AND ended_at IS NULL"
    async with new_database() as url:
        await upgrade(url, "0013")
        engine = connections.create_engine(Primary(url), pool_size=1)
        opened = await asyncpg.connect(url)
        await opened.execute(RECORDS)

        async def read() -> list[tuple[str, str]]:
            async with engine.connect() as connection:
                rows = (await connection.execute(text(query))).all()
            return [(row.sandbox_id, row.holder) for row in rows]

        before = await read()
        assert [tuple(row) for row in await opened.fetch(query)] == before
        await upgrade(url, "0014")
        assert [tuple(row) for row in await opened.fetch(query)] == before
        with pytest.raises(asyncpg.InvalidCachedStatementError):  # once; asyncpg alone repeats the statement
            await read()
        assert await read() == before
        await opened.close()
        await engine.dispose()


@pytest.mark.parametrize("revision", BREAKING)
async def test_a_breaking_migration_is_recognised(new_database: NewDatabase, revision: str) -> None:
    assert await find_restrictions(new_database, revision) != []


def test_the_page_lists_the_breaking_migrations() -> None:
    for revision in BREAKING:
        assert f"| `{revision}` |" in UPGRADING


async def test_the_statements_of_the_page_are_valid(database_url: str) -> None:
    statements = re.findall(r"```sql\n(.*?)```", UPGRADING, re.DOTALL)
    assert len(statements) == 3
    opened = await asyncpg.connect(database_url)
    for statement in statements:
        await opened.execute(statement)
    database = await opened.fetchval("SELECT current_database()")
    await opened.execute(f"ALTER DATABASE {database} REFRESH COLLATION VERSION")
    await opened.close()


async def find_restrictions(new_database: NewDatabase, revision: str) -> list[str]:
    """Return the changes of a migration that statements of the previous version can notice."""
    async with new_database() as url:
        await upgrade(url, REVISIONS[REVISIONS.index(revision) - 1])
        opened = await asyncpg.connect(url)
        columns, rules = await opened.fetch(COLUMNS), await opened.fetch(RULES)
        await upgrade(url, revision)
        new_columns, new_rules = await opened.fetch(COLUMNS), await opened.fetch(RULES)
        await opened.close()
    types = {(row["table_name"], row["column_name"]): row["type"] for row in new_columns}
    known = {(row["table_name"], row["column_name"]): row["required"] for row in columns}
    tables = {table for table, _ in known}
    changed = [
        f"{row['table_name']}.{row['column_name']}: dropped or of another type"
        for row in columns
        if types.get((row["table_name"], row["column_name"])) != row["type"]
    ]
    required = [
        f"{row['table_name']}.{row['column_name']}: required"
        for row in new_columns
        if row["table_name"] in tables
        and row["required"]
        and not known.get((row["table_name"], row["column_name"]), False)
    ]
    added = [
        f"{row['table_name']}: {row['rule']}"
        for row in new_rules
        if row["table_name"] in tables and row not in rules and row["rule"].split()[0] not in WIDENED
    ]
    return changed + required + added
