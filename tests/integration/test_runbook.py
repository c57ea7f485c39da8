"""SQL statements of docs/runbook.md, read from the page and executed as described there."""

import asyncio
import re
from asyncio.subprocess import PIPE
from pathlib import Path

import asyncpg
import pytest

from devstack.conditions import wait_until
from tests.integration.stack import ROOT, Stack

PAGE = (ROOT / "docs" / "runbook.md").read_text()


def find_statement(pattern: str) -> str:
    """Return the statement that begins with the pattern, to the end of its code block."""
    [match] = re.findall(rf"(?:`|```sql\n *)({pattern}[^`]*?);?\s*`", PAGE)
    return str(match)


def find_commands(heading: str) -> str:
    """Return the first block of commands in the section."""
    [section] = re.findall(rf"^## {re.escape(heading)}\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    [commands, *_] = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(commands)


async def run_commands(commands: str, environment: dict[str, str], folder: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        "bash", "-ec", commands, env=environment, cwd=folder, stdout=PIPE, stderr=PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


@pytest.mark.parametrize(
    ("form", "shown"), [("total", '"total_size":54'), ("token", '"page_token":"page-16"'), ("header", "rel=")]
)
async def test_the_first_page_of_a_listing_is_shown(stack: Stack, tmp_path: Path, form: str, shown: str) -> None:
    await stack.control("PATCH", "behaviour", {"listing_page_size": 16, "listing_page_form": form})
    output = await run_commands(find_commands("A listing in pages"), stack.environment, tmp_path)
    assert '{"records":16' in output
    assert shown in output


async def test_a_blocking_session_is_found_and_terminated(stack: Stack) -> None:
    blocker = await asyncpg.connect(stack.environment["DATABASE_URL"])
    try:
        await blocker.execute("BEGIN; LOCK TABLE sandboxes")
        request = asyncio.create_task(stack.allocate("ada"))

        async def is_found() -> bool:
            sessions = await stack.database.fetch(find_statement("SELECT pid, application_name"))
            blocking = {pid for session in sessions for pid in session["blocked_by"]}
            return blocker.get_server_pid() in blocking & {session["pid"] for session in sessions}

        await wait_until(is_found)
        terminate = find_statement(r"SELECT pg_terminate_backend\(").replace("PID", str(blocker.get_server_pid()))
        assert await stack.database.fetchval(terminate)
        assert (await request).status_code == 201
    finally:
        blocker.terminate()


async def test_unique_indexes_are_rebuilt_while_the_allocator_is_stopped(stack: Stack) -> None:
    held = (await stack.allocate("ada")).json()["sandbox_id"]
    await stack.processes["allocator"].stop()
    for index in ("leases_one_per_sandbox", "leases_one_per_holder"):
        await stack.database.execute(find_statement("REINDEX INDEX CONCURRENTLY").replace("…", index))
    await stack.start_service("allocator")
    await wait_until(stack.serves_requests)
    response = await stack.allocate("ada")
    assert (response.status_code, response.json()["sandbox_id"]) == (200, held)


async def test_used_sandboxes_marked_available_by_mistake_are_deleted(stack: Stack) -> None:
    used = (await stack.allocate("ada")).json()["sandbox_id"]
    assert (await stack.release(used, "ada")).status_code == 200
    await wait_until(stack.nothing_pending)
    await stack.database.execute(
        "UPDATE sandboxes SET status = 'available', status_since = '2000-01-01' WHERE sandbox_id = $1", used
    )
    assert (await stack.allocate("bob")).status_code == 500
    await stack.database.execute(find_statement(r"UPDATE sandboxes[^`]*sandbox_id IN"))
    assert (await stack.allocate("bob")).status_code == 201
    await wait_until(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == 1


async def test_a_restore_without_logs_deletes_sandboxes_possibly_in_use(stack: Stack) -> None:
    await stack.fill(5)
    await stack.processes["allocator"].stop()
    await stack.database.execute(find_statement(r"UPDATE sandboxes[^`]*status = 'available'(?=`)"))
    await stack.start_service("allocator")
    await wait_until(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == len(await stack.deletions()) == 5
    await stack.control("POST", "accounts", {"count": 1})
    assert (await stack.sync()).status_code == 200
    assert (await stack.allocate("ada")).status_code == 201


async def test_the_allocators_of_the_database_are_listed(stack: Stack) -> None:
    query = find_statement("SELECT allocator_id, presence_queue")

    async def is_listed() -> bool:
        return bool(await stack.database.fetch(query))

    await wait_until(is_listed)
    newest, *_ = await stack.database.fetch(query)
    assert newest["other_broker_at"] is None
