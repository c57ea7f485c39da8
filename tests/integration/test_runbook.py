"""The statements of docs/runbook.md, read from the page and run as it says."""

import asyncio
import re

import asyncpg

from tests.integration.stack import ROOT, Stack, eventually

PAGE = (ROOT / "docs" / "runbook.md").read_text()


def statement(pattern: str) -> str:
    """The one that begins so, to the end of its block or of its backquotes."""
    [found] = re.findall(rf"(?:`|```sql\n *)({pattern}[^`]*?);?\s*`", PAGE)
    return str(found)


async def test_who_holds_the_database_up_is_found_and_ended(stack: Stack) -> None:
    blocker = await asyncpg.connect(stack.environment["DATABASE_URL"])
    try:
        await blocker.execute("BEGIN; LOCK TABLE sandboxes")
        asking = asyncio.create_task(stack.allocate("ada"))

        async def found() -> bool:
            sessions = await stack.database.fetch(statement("SELECT pid, application_name"))
            blocking = {pid for session in sessions for pid in session["blocked_by"]}
            return blocker.get_server_pid() in blocking & {session["pid"] for session in sessions}

        await eventually(found)
        terminate = statement(r"SELECT pg_terminate_backend\(").replace("PID", str(blocker.get_server_pid()))
        assert await stack.database.fetchval(terminate)
        assert (await asking).status_code == 201
    finally:
        blocker.terminate()


async def test_the_indexes_of_the_promises_are_repaired_with_the_allocator_stopped(stack: Stack) -> None:
    held = (await stack.allocate("ada")).json()["sandbox_id"]
    await stack.processes["allocator"].stop()
    for index in ("leases_one_per_sandbox", "leases_one_per_holder"):
        await stack.database.execute(statement("REINDEX INDEX CONCURRENTLY").replace("…", index))
    await stack.start_service("allocator")
    again = await stack.allocate("ada")
    assert (again.status_code, again.json()["sandbox_id"]) == (200, held)


async def test_used_sandboxes_that_somebody_made_available_are_deleted(stack: Stack) -> None:
    used = (await stack.allocate("ada")).json()["sandbox_id"]
    assert (await stack.release(used, "ada")).status_code == 200
    await eventually(stack.nothing_pending)
    await stack.database.execute(
        "UPDATE sandboxes SET status = 'available', status_since = '2000-01-01' WHERE sandbox_id = $1", used
    )
    assert (await stack.allocate("bob")).status_code == 500
    await stack.database.execute(statement(r"UPDATE sandboxes[^`]*sandbox_id IN"))
    assert (await stack.allocate("bob")).status_code == 201
    await eventually(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == 1


async def test_a_restore_without_logs_deletes_what_may_be_in_use(stack: Stack) -> None:
    await stack.fill(5)
    await stack.processes["allocator"].stop()
    await stack.database.execute(statement(r"UPDATE sandboxes[^`]*status = 'available'(?=`)"))
    await stack.start_service("allocator")
    await eventually(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == len(await stack.deletions()) == 5
    await stack.control("POST", "accounts", {"count": 1})
    assert (await stack.sync()).status_code == 200
    assert (await stack.allocate("ada")).status_code == 201
