"""Verification of the database after a run.

The tests drop the unique indexes on leases, because most violations could not be created otherwise.
"""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from bench import pool
from devstack.testing import NewDatabase
from sandbox_broker.migrate import migrate

SANDBOXES, LEASES = 10, 3


@pytest.fixture(scope="module")
async def database_without_unique_leases(new_database: NewDatabase) -> AsyncIterator[asyncpg.Connection]:
    async with new_database() as url:
        await migrate(url)
        connection = await asyncpg.connect(url)
        await connection.execute("DROP INDEX leases_one_per_sandbox, leases_one_per_holder")
        yield connection
        await connection.close()


@pytest.fixture
async def database(database_without_unique_leases: asyncpg.Connection) -> asyncpg.Connection:
    """Database with ten sandboxes, three of them leased, and no violation."""
    await pool.fill(database_without_unique_leases, SANDBOXES)
    await pool.insert_leases(database_without_unique_leases, "student", LEASES)
    return database_without_unique_leases


async def find_problems(database: asyncpg.Connection, **counts: int) -> tuple[str, ...]:
    return await pool.find_problems(database, **{"sandboxes": SANDBOXES, "confirmed": LEASES, **counts})


async def test_a_partly_leased_pool_has_no_problems(database: asyncpg.Connection) -> None:
    assert await find_problems(database) == ()
    assert await pool.count_allocations(database) == LEASES


async def test_a_released_sandbox_may_have_any_status_of_the_deletion(database: asyncpg.Connection) -> None:
    await database.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")
    statuses = "(ARRAY['pending_deletion', 'deletion_failed', 'deleted'])[row_number]"
    await database.execute(f"""
        UPDATE sandboxes s SET status = {statuses}
        FROM (SELECT sandbox_id, row_number() OVER () FROM leases) l WHERE l.sandbox_id = s.sandbox_id
    """)
    assert await find_problems(database) == ()
    assert await pool.count_ended_leases(database, "student") == LEASES


async def test_purged_records_are_not_reported_as_missing(database: asyncpg.Connection) -> None:
    await database.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")
    await database.execute("DELETE FROM sandboxes WHERE status = 'allocated'")
    assert await find_problems(database, purged=LEASES) == ()
    assert await find_problems(database) == (f"{LEASES} sandbox records are missing or unexpected",)


SECOND_LEASE_FOR_STUDENT_1 = """
    INSERT INTO leases (sandbox_id, holder, expires_at)
    SELECT sandbox_id, 'student-1', now() FROM leases WHERE holder = 'student-2'
"""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(
            SECOND_LEASE_FOR_STUDENT_1, "sandboxes or students have more than one lease", id="second lease"
        ),
        pytest.param(
            f"UPDATE leases SET ended_at = now(), end_reason = 'student' WHERE holder = 'student-2';"
            f"{SECOND_LEASE_FOR_STUDENT_1}; UPDATE leases SET holder = 'student-4' WHERE lease_id > {LEASES}",
            "sandboxes were allocated again after use",
            id="allocated again",
        ),
        pytest.param(
            "DELETE FROM leases WHERE holder = 'student-1'",
            "sandboxes are allocated without a lease, or leased but not allocated",
            id="allocated without lease",
        ),
        pytest.param(
            "UPDATE sandboxes SET status = 'available'",
            "sandboxes are allocated without a lease, or leased but not allocated",
            id="leased and available",
        ),
        pytest.param(
            "UPDATE leases SET ended_at = now(), end_reason = 'student'; UPDATE sandboxes SET status = 'available'",
            "sandboxes have a status that does not match their use",
            id="used and available",
        ),
        pytest.param(
            "UPDATE sandboxes SET status = 'pending_deletion' WHERE status = 'available'",
            "sandboxes have a status that does not match their use",
            id="pending deletion without use",
        ),
        pytest.param(
            "UPDATE sandboxes SET status = 'stale' WHERE status = 'available'",
            "sandboxes have a status that does not match their use",
            id="stale",
        ),
        pytest.param("DELETE FROM leases", "confirmed leases are missing", id="missing lease"),
        pytest.param(SECOND_LEASE_FOR_STUDENT_1, "leases were not confirmed to a client", id="unconfirmed lease"),
        pytest.param(
            "DELETE FROM sandboxes WHERE status = 'available'",
            "sandbox records are missing or unexpected",
            id="missing sandboxes",
        ),
    ],
)
async def test_each_violation_is_reported(database: asyncpg.Connection, change: str, problem: str) -> None:
    await database.execute(change)
    assert problem in {found.split(" ", 1)[1] for found in await find_problems(database)}


async def test_cut_off_requests_may_have_left_unconfirmed_leases(database: asyncpg.Connection) -> None:
    assert await find_problems(database, confirmed=LEASES - 1, cut_off=1) == ()
    assert await find_problems(database, confirmed=LEASES - 2, cut_off=1) == (
        "1 leases were not confirmed to a client",
    )


async def test_names_cycle_through_the_prefixes(database: asyncpg.Connection) -> None:
    await pool.fill(database, SANDBOXES, prefixes=2)
    counts = await database.fetch("SELECT available_stem, count(*) FROM sandboxes GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in counts] == [("lab0-", 5), ("lab1-", 5)]


async def test_leases_with_a_wrong_prefix_are_counted(database: asyncpg.Connection) -> None:
    await pool.fill(database, SANDBOXES, prefixes=2)
    await pool.insert_leases(database, "student", LEASES)
    await database.execute("UPDATE leases SET track_name = 'lab1-'")
    lab0_leases = await database.fetchval(
        "SELECT count(*) FROM leases JOIN sandboxes USING (sandbox_id) WHERE name LIKE 'lab0-%'"
    )
    assert await pool.count_wrong_prefixes(database) == lab0_leases > 0
