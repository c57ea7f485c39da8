"""The broker on a restored backup, as docs/runbook.md says: nobody gets what is in use, and the rest goes on."""

import csv
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from devstack import postgres
from devstack.postgres import PrivatePostgres
from devstack.processes import run
from devstack.testing import NewVhost
from tests.integration.stack import ROOT, Stack, eventually, running

pytest_plugins = ("devstack.fixtures",)

pytestmark = pytest.mark.timeout(400)

AFTER_RESTORE = ROOT / "deploy" / "postgres" / "after_restore.sql"
OVER = {"lease.released", "lease.expired", "lease.ended"}


class Logs:
    """Of the allocator, as JSON."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def take(self, service: str, line: str) -> None:
        if service == "allocator" and line.startswith("{"):
            self.lines.append(json.loads(line))

    def since(self, timestamp: str, events: set[str], *fields: str) -> list[list[Any]]:
        lines = (line for line in self.lines if line["event"] in events and line["timestamp"] >= timestamp)
        return [[line.get(field) for field in fields] for line in lines]


@pytest.fixture
def logs() -> Logs:
    return Logs()


@pytest.fixture
async def server(postgres_binaries: None) -> AsyncIterator[PrivatePostgres]:
    """Of the same version as pg_dump."""
    async with PrivatePostgres() as server:
        yield server


@pytest.fixture
async def stack(server: PrivatePostgres, new_vhost: NewVhost, logs: Logs) -> AsyncIterator[Stack]:
    settings = {"LOG_FORMAT": "json", "LOG_LEVEL": "INFO"}
    async with (
        new_vhost() as amqp_url,
        running(server.url, amqp_url, settings=settings, on_line=logs.take) as stack,
    ):
        await stack.fill(20)
        yield stack


async def call(program: str, *arguments: str | Path) -> str:
    binaries = postgres.binaries()
    assert binaries is not None
    code, said = await run([binaries / program, *arguments])
    assert code == 0, said
    return said


async def lease(stack: Stack, student: str) -> str:
    response = await stack.allocate(student)
    assert response.status_code in (200, 201), response.text
    return str(response.json()["sandbox_id"])


async def release_and_delete(stack: Stack, sandbox_id: str, student: str) -> None:
    assert (await stack.release(sandbox_id, student)).status_code == 200
    await eventually(stack.nothing_pending)


async def restart_on(stack: Stack, database_url: str) -> None:
    for service in ("gateway", "allocator"):
        await stack.processes[service].stop()
    stack.environment["DATABASE_URL"] = database_url
    for service in ("allocator", "gateway"):
        await stack.start_service(service)


def write(path: Path, rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


async def test_what_was_leased_since_the_backup_is_leased_to_nobody_else(
    stack: Stack, server: PrivatePostgres, logs: Logs, tmp_path: Path
) -> None:
    before = await lease(stack, "before")
    over = await lease(stack, "over")
    since = (await stack.database.fetchval("SELECT now() AT TIME ZONE 'UTC'")).isoformat()
    await call("pg_dump", "--format=custom", f"--file={tmp_path / 'broker.dump'}", server.url)
    after = await lease(stack, "after")
    come_and_gone = await lease(stack, "come and gone")
    await release_and_delete(stack, come_and_gone, "come and gone")
    await release_and_delete(stack, over, "over")
    again = await lease(stack, "over")
    await stack.control("POST", "accounts", {"count": 1, "name_prefix": "new-"})
    await stack.sync()
    created = str((await stack.allocate("creative", X_Sandbox_Name_Prefix="new-")).json()["sandbox_id"])

    await stack.processes["allocator"].stop()
    restored_url = server.url.removesuffix("/postgres") + "/restored"
    await call("createdb", f"--maintenance-db={server.url}", "restored")
    await call("pg_restore", "--exit-on-error", "--no-owner", f"--dbname={restored_url}", tmp_path / "broker.dump")
    granted = logs.since(since, {"lease.granted"}, "sandbox_id", "holder", "track_name", "timestamp")
    assert [row[0] for row in granted] == [after, come_and_gone, again, created]
    files = {
        "granted": write(tmp_path / "granted.csv", granted),
        "released": write(tmp_path / "released.csv", logs.since(since, OVER, "sandbox_id", "timestamp")),
    }
    variables = [part for name, path in files.items() for part in ("-v", f"{name}={path}")]
    for _ in range(2):
        await call("psql", restored_url, *variables, "-v", "lab_hours=4", "-f", AFTER_RESTORE)
    await restart_on(stack, restored_url)

    assert await lease(stack, "before") == before
    assert await lease(stack, "after") == after
    assert await lease(stack, "over") == again
    await eventually(stack.nothing_pending)
    assert (await stack.sync(force="true")).status_code == 200
    everybody_else = {await lease(stack, f"new-{number}") for number in range((await stack.stats())["available"])}
    assert not everybody_else & {before, over, after, come_and_gone, again, created}
    assert (await stack.allocate("too late")).status_code == 409
    assert (await story(stack, over))["status"] == (await story(stack, come_and_gone))["status"] == "deleted"
    assert (await stack.release(after, "after")).status_code == 200
    [leak] = (await stack.admin("GET", "leaks")).json()["leaks"]
    assert leak["sandbox_id"] == created


async def story(stack: Stack, sandbox_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()
    return found
