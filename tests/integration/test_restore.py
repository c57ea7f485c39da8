"""Restore of a backup as in docs/runbook.md: sandboxes in use are not allocated again, all others are usable."""

import csv
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from devstack import postgres
from devstack.conditions import wait_until
from devstack.postgres import PrivatePostgres
from devstack.processes import run
from devstack.testing import NewVhost
from tests.integration.ctl import run_brokerctl, wait_for_status
from tests.integration.stack import ROOT, Stack, run_stack

pytest_plugins = ("devstack.fixtures",)

pytestmark = pytest.mark.timeout(400)

AFTER_RESTORE = ROOT / "deploy" / "postgres" / "after_restore.sql"
ENDED_EVENTS = {"lease.released", "lease.expired", "lease.ended"}


class Logs:
    """Log lines of the allocator."""

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
    """PostgreSQL server of the same version as pg_dump."""
    async with PrivatePostgres() as server:
        yield server


@pytest.fixture
async def stack(server: PrivatePostgres, new_vhost: NewVhost, logs: Logs) -> AsyncIterator[Stack]:
    settings = {"LOG_FORMAT": "json", "LOG_LEVEL": "INFO"}
    async with (
        new_vhost() as amqp_url,
        run_stack(server.url, amqp_url, settings=settings, on_line=logs.take) as stack,
    ):
        await stack.fill(20)
        yield stack


async def run_postgres_program(program: str, *arguments: str | Path) -> str:
    binaries = postgres.find_binaries()
    assert binaries is not None
    code, output = await run([binaries / program, *arguments])
    assert code == 0, output
    return output


async def allocate(stack: Stack, student: str) -> str:
    response = await stack.allocate(student)
    assert response.status_code in (200, 201), response.text
    return str(response.json()["sandbox_id"])


async def release_and_delete(stack: Stack, sandbox_id: str, student: str) -> None:
    assert (await stack.release(sandbox_id, student)).status_code == 200
    await wait_until(stack.nothing_pending)


async def restart_with(stack: Stack, database_url: str) -> None:
    for service in ("gateway", "allocator"):
        await stack.processes[service].stop()
    stack.environment["DATABASE_URL"] = database_url
    for service in ("allocator", "gateway"):
        await stack.start_service(service)


def write_csv(path: Path, rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


async def test_sandboxes_leased_after_the_backup_are_not_leased_again(
    stack: Stack, server: PrivatePostgres, logs: Logs, tmp_path: Path
) -> None:
    before = await allocate(stack, "before")
    released_later = await allocate(stack, "returning")
    since = (await stack.database.fetchval("SELECT now() AT TIME ZONE 'UTC'")).isoformat()
    await run_postgres_program("pg_dump", "--format=custom", f"--file={tmp_path / 'broker.dump'}", server.url)
    after = await allocate(stack, "after")
    short_lease = await allocate(stack, "short visit")
    await release_and_delete(stack, short_lease, "short visit")
    await release_and_delete(stack, released_later, "returning")
    second_lease = await allocate(stack, "returning")
    await stack.control("POST", "accounts", {"count": 1, "name_prefix": "new-"})
    await stack.sync()
    lease_of_new_account = str(
        (await stack.allocate("creative", X_Sandbox_Name_Prefix="new-")).json()["sandbox_id"]
    )

    await stack.processes["allocator"].stop()
    restored_url = server.url.removesuffix("/postgres") + "/restored"
    await run_postgres_program("createdb", f"--maintenance-db={server.url}", "restored")
    await run_postgres_program(
        "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={restored_url}", tmp_path / "broker.dump"
    )
    granted = logs.since(since, {"lease.granted"}, "sandbox_id", "holder", "track_name", "timestamp")
    assert [row[0] for row in granted] == [after, short_lease, second_lease, lease_of_new_account]
    files = {
        "granted": write_csv(tmp_path / "granted.csv", granted),
        "released": write_csv(
            tmp_path / "released.csv", logs.since(since, ENDED_EVENTS, "sandbox_id", "timestamp")
        ),
    }
    variables = [part for name, path in files.items() for part in ("-v", f"{name}={path}")]
    for _ in range(2):
        await run_postgres_program("psql", restored_url, *variables, "-v", "lab_hours=4", "-f", AFTER_RESTORE)
    await restart_with(stack, restored_url)

    assert await allocate(stack, "before") == before
    assert await allocate(stack, "after") == after
    assert await allocate(stack, "returning") == second_lease
    await wait_until(stack.nothing_pending)
    assert (await stack.sync(force="true")).status_code == 200
    other_sandboxes = {
        await allocate(stack, f"new-{number}") for number in range((await stack.stats())["available"])
    }
    assert not other_sandboxes & {before, released_later, after, short_lease, second_lease, lease_of_new_account}
    assert (await stack.allocate("too late")).status_code == 409
    assert (
        (await read_sandbox(stack, released_later))["status"]
        == (await read_sandbox(stack, short_lease))["status"]
        == "deleted"
    )
    assert (await stack.release(after, "after")).status_code == 200
    [leak] = (await stack.admin("GET", "leaks")).json()["leaks"]
    assert leak["sandbox_id"] == lease_of_new_account


async def test_a_restore_without_the_steps_leases_nothing_until_it_is_confirmed(
    stack: Stack, server: PrivatePostgres, tmp_path: Path
) -> None:
    before = await allocate(stack, "before")
    await run_postgres_program("pg_dump", "--format=custom", f"--file={tmp_path / 'broker.dump'}", server.url)
    after = {await allocate(stack, f"after-{number}") for number in range(5)}

    async def is_published() -> bool:
        return bool(await stack.database.fetchval("SELECT count(*) = 0 FROM outbox"))

    await wait_until(is_published)
    restored_url = server.url.removesuffix("/postgres") + "/restored"
    await run_postgres_program("createdb", f"--maintenance-db={server.url}", "restored")
    await run_postgres_program(
        "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={restored_url}", tmp_path / "broker.dump"
    )
    await restart_with(stack, restored_url)

    for student in ("before", "after-1", "new"):
        refused = await stack.allocate(student)
        assert (refused.status_code, refused.json()["detail"]["code"]) == (503, "DATABASE_BEHIND")

    await wait_for_status(
        stack, lambda status: "The database is an older backup without the newest lease" in status.out
    )
    metrics = (await stack.client.get(f"http://127.0.0.1:{stack.environment['ALLOCATOR_PORT']}/metrics")).text
    assert "broker_database_behind 1.0" in metrics
    await stack.processes["allocator"].stop()
    await stack.start_service("allocator")
    assert (await stack.allocate("new")).status_code == 503

    async with asyncpg.create_pool(restored_url, min_size=1, max_size=1) as restored:
        await restored.execute(
            "UPDATE sandboxes SET status = 'pending_deletion', deletion_requested_at = now(), "
            "deletion_due_at = now() WHERE status = 'available'"
        )
    await stack.control("POST", "accounts", {"count": 3, "name_prefix": "new-"})
    confirmed = await run_brokerctl(stack, "restore", "confirm", "--yes")
    assert confirmed.status == 0, confirmed.err
    assert "Now run brokerctl sync" in confirmed.out

    async def is_served() -> bool:
        return (await stack.allocate("before")).status_code == 200

    await wait_until(is_served)
    assert await allocate(stack, "before") == before
    assert (await stack.admin("GET", "status")).json()["database_behind_at"] is None
    assert (await stack.sync(force="true")).status_code == 200
    assert await allocate(stack, "new") not in after | {before}
    again = await run_brokerctl(stack, "restore", "confirm", "--yes", "--json")
    assert again.status == 0


async def read_sandbox(stack: Stack, sandbox_id: str) -> dict[str, Any]:
    sandbox: dict[str, Any] = (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()
    return sandbox
