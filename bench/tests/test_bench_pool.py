"""What is found wrong with a pool after a run. The constraints of the tables are dropped: nothing relies on them
here, and most of what is looked for could not be made with them."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from bench import pool
from devstack.testing import NewDatabase
from sandbox_broker.migrate import migrate

SANDBOXES, LEASES = 10, 3


@pytest.fixture(scope="module")
async def lax_database(new_database: NewDatabase) -> AsyncIterator[asyncpg.Connection]:
    async with new_database() as url:
        await migrate(url)
        connection = await asyncpg.connect(url)
        await connection.execute("DROP INDEX leases_one_per_sandbox, leases_one_per_holder")
        yield connection
        await connection.close()


@pytest.fixture
async def database(lax_database: asyncpg.Connection) -> asyncpg.Connection:
    """With ten sandboxes, three of them leased, and nothing wrong."""
    await pool.fill(lax_database, SANDBOXES)
    await pool.lease(lax_database, "student", LEASES)
    return lax_database


async def problems(database: asyncpg.Connection, **told: int) -> tuple[str, ...]:
    return await pool.problems(database, **{"sandboxes": SANDBOXES, "promised": LEASES, **told})


async def test_nothing_is_wrong_with_a_pool_of_which_some_is_leased(database: asyncpg.Connection) -> None:
    assert await problems(database) == ()
    assert await pool.allocations(database) == LEASES


async def test_what_was_released_may_be_anywhere_on_its_way_out(database: asyncpg.Connection) -> None:
    await database.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")
    states = "(ARRAY['pending_deletion', 'deletion_failed', 'deleted'])[row_number]"
    await database.execute(f"""
        UPDATE sandboxes s SET status = {states}
        FROM (SELECT sandbox_id, row_number() OVER () FROM leases) l WHERE l.sandbox_id = s.sandbox_id
    """)
    assert await problems(database) == ()
    assert await pool.ended(database, "student") == LEASES


async def test_records_that_were_purged_are_not_missed(database: asyncpg.Connection) -> None:
    await database.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")
    await database.execute("DELETE FROM sandboxes WHERE status = 'allocated'")
    assert await problems(database, purged=LEASES) == ()
    assert await problems(database) == (f"{LEASES} sandboxes are missing, or too many",)


LEASE_OF_HOLDER_2 = """
    INSERT INTO leases (sandbox_id, holder, expires_at)
    SELECT sandbox_id, 'student-1', now() FROM leases WHERE holder = 'student-2'
"""


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(LEASE_OF_HOLDER_2, "leases of one sandbox or one student are more than one", id="two leases"),
        pytest.param(
            f"UPDATE leases SET ended_at = now(), end_reason = 'student' WHERE holder = 'student-2';"
            f"{LEASE_OF_HOLDER_2}; UPDATE leases SET holder = 'student-4' WHERE lease_id > {LEASES}",
            "sandboxes were handed out again",
            id="handed out again",
        ),
        pytest.param(
            "DELETE FROM leases WHERE holder = 'student-1'", "sandboxes and leases disagree", id="no lease"
        ),
        pytest.param(
            "UPDATE sandboxes SET status = 'available'", "sandboxes and leases disagree", id="leased, available"
        ),
        pytest.param(
            "UPDATE leases SET ended_at = now(), end_reason = 'student'; UPDATE sandboxes SET status = 'available'",
            "sandboxes are in a state that they should not be in",
            id="used, available",
        ),
        pytest.param(
            "UPDATE sandboxes SET status = 'pending_deletion' WHERE status = 'available'",
            "sandboxes are in a state that they should not be in",
            id="never used, to be deleted",
        ),
        pytest.param(
            "UPDATE sandboxes SET status = 'stale' WHERE status = 'available'",
            "sandboxes are in a state that they should not be in",
            id="stale",
        ),
        pytest.param("DELETE FROM leases", "promised leases are missing", id="promised, not there"),
        pytest.param(LEASE_OF_HOLDER_2, "leases were promised to nobody", id="there, promised to nobody"),
        pytest.param(
            "DELETE FROM sandboxes WHERE status = 'available'", "sandboxes are missing, or too many", id="gone"
        ),
    ],
)
async def test_what_is_wrong_is_named(database: asyncpg.Connection, change: str, found: str) -> None:
    await database.execute(change)
    assert found in {problem.split(" ", 1)[1] for problem in await problems(database)}


async def test_as_many_as_were_cut_off_may_have_a_lease_unknown_to_them(database: asyncpg.Connection) -> None:
    assert await problems(database, promised=LEASES - 1, cut_off=1) == ()
    assert await problems(database, promised=LEASES - 2, cut_off=1) == ("1 leases were promised to nobody",)


async def test_names_begin_with_prefixes_in_turn(database: asyncpg.Connection) -> None:
    await pool.fill(database, SANDBOXES, prefixes=2)
    counts = await database.fetch("SELECT available_stem, count(*) FROM sandboxes GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in counts] == [("lab0-", 5), ("lab1-", 5)]


async def test_a_lease_of_another_prefix_than_its_track_is_found(database: asyncpg.Connection) -> None:
    await pool.fill(database, SANDBOXES, prefixes=2)
    await pool.lease(database, "student", LEASES)
    await database.execute("UPDATE leases SET track_name = 'lab1-'")
    of_lab0 = await database.fetchval(
        "SELECT count(*) FROM leases JOIN sandboxes USING (sandbox_id) WHERE name LIKE 'lab0-%'"
    )
    assert await pool.elsewhere(database) == of_lab0 > 0
