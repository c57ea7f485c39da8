"""Tests of the read queries: sandboxes, pool statistics, jobs and readiness."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator

import asyncpg
import pytest

from gateway.api.errors import from_refusal
from sandbox_broker.contract.replies import Refused, refuse

from .gateway_harness import ADMIN, STUDENT, TRACK, Gateway, client, create_app_without_servers, detail, running

STATES = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        yield gateway


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


@pytest.fixture
def gateway(shared_gateway: Gateway, database: asyncpg.Connection) -> Gateway:
    return shared_gateway


async def add_sandbox(database: asyncpg.Connection, sandbox_id: str, status: str, holder: str | None = None) -> str:
    """Insert a sandbox and return its external id."""
    external_id = str(uuid.uuid4())
    await database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status) VALUES ($1, $2, $3, $4)",
        sandbox_id,
        external_id,
        f"sandbox-{sandbox_id}",
        status,
    )
    if holder is not None:
        await database.execute(
            "INSERT INTO leases (sandbox_id, holder, track_name, allocated_at, expires_at, ended_at, end_reason) "
            "VALUES ($1, $2, 'lab', to_timestamp(1728054123.9), to_timestamp(1728068523.9), $3, $4)",
            sandbox_id,
            holder,
            *((None, None) if status == "allocated" else (await database.fetchval("SELECT now()"), "student")),
        )
    return external_id


@pytest.mark.parametrize("status", ["allocated", "pending_deletion", "deleted"])
async def test_student_can_read_the_sandbox_also_after_its_release(
    gateway: Gateway, database: asyncpg.Connection, status: str
) -> None:
    external_id = await add_sandbox(database, "7", status, holder="student-1")
    response = await gateway.client.get("/v1/sandboxes/7", headers=STUDENT)
    assert response.status_code == 200
    assert response.json() == {
        "sandbox_id": "7",
        "name": "sandbox-7",
        "external_id": external_id,
        "status": status,
        "allocated_to_track": "student-1",
        "allocated_at": 1728054123,
        "expires_at": 1728068523,
        "track_name": "lab",
        "sfdc_account_id": None,
    }


@pytest.mark.parametrize(("status", "holder"), [("allocated", "student-2"), ("available", None)])
async def test_sandbox_of_another_student_or_without_a_lease_returns_403(
    gateway: Gateway, database: asyncpg.Connection, status: str, holder: str | None
) -> None:
    await add_sandbox(database, "7", status, holder)
    response = await gateway.client.get("/v1/sandboxes/7", headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (403, "NOT_SANDBOX_OWNER")
    assert "student-2" not in response.text


async def test_the_reason_and_the_events_of_a_newer_version_are_shown(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await add_sandbox(database, "7", "deleted", holder="student-1")
    rule = await database.fetchval(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'leases_end_reason'"
    )
    await database.execute("ALTER TABLE leases DROP CONSTRAINT leases_end_reason")
    try:
        await database.execute("UPDATE leases SET end_reason = 'class_over'")
        for event, data in (
            ("sandbox.allocated", {"holder": "student-1"}),
            ("lease.paused", {"reason": "lunch"}),
            ("sandbox.deletion_requested", {"reason": "class_over"}),
        ):
            await database.execute(
                "INSERT INTO outbox (type, subject, data) VALUES ($1, '7', $2)", event, json.dumps(data)
            )
        sandbox = (await gateway.client.get("/v1/admin/sandboxes/7", headers=ADMIN)).json()
        (allocation,) = (await gateway.client.get("/v1/admin/allocations", headers=ADMIN)).json()["allocations"]
    finally:
        await database.execute("DELETE FROM leases")
        await database.execute(f"ALTER TABLE leases ADD CONSTRAINT leases_end_reason {rule}")
    assert (sandbox["end_reason"], allocation["end_reason"]) == ("class_over", "class_over")
    assert [(step["event"], step["status"], step["by"], step["reason"]) for step in sandbox["history"]] == [
        ("sandbox.allocated", "allocated", "student", None),
        ("lease.paused", "allocated", "broker", "lunch"),
        ("sandbox.deletion_requested", "pending_deletion", "broker", "class_over"),
    ]


async def test_unknown_sandbox_returns_404(gateway: Gateway) -> None:
    response = await gateway.client.get("/v1/sandboxes/7", headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (404, "SANDBOX_NOT_FOUND")


async def test_stats_count_every_status(gateway: Gateway, database: asyncpg.Connection) -> None:
    empty = await gateway.client.get("/v1/admin/stats", headers=ADMIN)
    assert empty.json() == {"total": 0, "missing": 0, "standby": 0, "on_hold": 0, **dict.fromkeys(STATES, 0)}
    for number, status in enumerate(STATES):
        for copy in range(number + 1):
            await add_sandbox(database, f"{number}{copy}", status)
    response = await gateway.client.get("/v1/admin/stats", headers=ADMIN)
    counts = {status: number + 1 for number, status in enumerate(STATES)}
    others = {"missing": 0, "standby": 0, "on_hold": 0}
    assert response.json() == {"total": sum(counts.values()), **others, **counts}


async def test_stats_count_allocated_sandboxes_that_csp_no_longer_lists(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    for number, status in enumerate(("allocated", "allocated", "allocated", "pending_deletion")):
        await add_sandbox(database, str(number), status)
    await database.execute("UPDATE sandboxes SET missing_since = now() WHERE sandbox_id <> '0'")
    stats = (await gateway.client.get("/v1/admin/stats", headers=ADMIN)).json()
    assert (stats["total"], stats["allocated"], stats["missing"]) == (4, 3, 2)


async def test_readiness_requires_queue_and_database(gateway: Gateway) -> None:
    response = await gateway.client.get("/readyz")
    assert response.status_code == 200
    assert response.json()["checks"] == {"queue": "ok", "database": "ok"}


async def test_readiness_names_a_database_that_is_down(amqp_url: str) -> None:
    async with running(amqp_url, far_sides=False) as gateway:
        response = await gateway.client.get("/readyz")
        assert response.status_code == 503
        checks = response.json()["checks"]
        assert checks["queue"] == "ok"
        assert checks["database"] != "ok"


async def test_readiness_names_a_queue_that_is_down(database_url: str) -> None:
    async with client(create_app_without_servers(database_url=database_url)) as http:
        response = await http.get("/readyz")
    assert response.status_code == 503
    checks = response.json()["checks"]
    assert checks["database"] == "ok"
    assert checks["queue"] != "ok"


async def test_reads_without_a_database_return_503() -> None:
    async with client(create_app_without_servers()) as http:
        for path, headers in (("/v1/sandboxes/7", STUDENT), ("/v1/admin/stats", ADMIN)):
            response = await http.get(path, headers=headers)
            assert (response.status_code, detail(response)["code"]) == (503, "DATABASE_UNAVAILABLE")
            assert detail(response)["retry_after"]
        assert (await http.get("/v1/admin/stats", headers=TRACK)).status_code == 403


async def test_request_after_a_lost_database_connection_succeeds(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    assert (await gateway.client.get("/v1/admin/stats", headers=ADMIN)).status_code == 200
    await database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert (await gateway.client.get("/v1/admin/stats", headers=ADMIN)).status_code == 200


async def test_read_that_the_database_terminates_returns_503(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    assert (await gateway.client.get("/v1/admin/stats", headers=ADMIN)).status_code == 200
    async with database.transaction():
        await database.execute("LOCK sandboxes IN ACCESS EXCLUSIVE MODE")
        async with asyncio.TaskGroup() as group:
            read = group.create_task(gateway.client.get("/v1/admin/stats", headers=ADMIN))
            waiting = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock' AND pid <> pg_backend_pid()"
            )
            while not read.done() and not await database.fetch(waiting):
                await asyncio.wait([read], timeout=0.01)
    assert (read.result().status_code, detail(read.result())["code"]) == (503, "DATABASE_UNAVAILABLE")


async def add_job(database: asyncpg.Connection, state: str, silent_sec: int = 0) -> uuid.UUID:
    job_id = uuid.uuid4()
    await database.execute(
        "INSERT INTO jobs (job_id, kind, state, progress, started_at, updated_at) VALUES "
        "($1, 'cleanup', $2, '{\"deleted\": 3}', to_timestamp(1728054123.9), now() - $3 * interval '1 second')",
        job_id,
        state,
        silent_sec,
    )
    return job_id


async def test_job_includes_its_progress(gateway: Gateway, database: asyncpg.Connection) -> None:
    job_id = await add_job(database, "running")
    response = await gateway.client.get(f"/v1/admin/jobs/{job_id}", headers=ADMIN)
    assert response.status_code == 200
    job = response.json()
    assert job.pop("updated_at") > 1728054123
    assert job == {
        "job_id": str(job_id),
        "kind": "cleanup",
        "state": "running",
        "progress": {"deleted": 3},
        "result": None,
        "started_at": 1728054123,
    }


async def test_message_of_a_refused_job_is_worded_by_the_table(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    refused = refuse("SYNC_HELD", reason="CSP listed no sandbox at all")
    of_previous_version = Refused(code="SYNC_HELD", message="Nothing was changed.")
    for number, refusal in enumerate([refused, of_previous_version]):
        await database.execute(
            "INSERT INTO jobs (job_id, kind, state, progress, result) VALUES ($1, 'sync', 'held', '{}', $2)",
            uuid.UUID(int=number),
            json.dumps(refusal.to_job_result()),
        )
    first, second = [
        (await gateway.client.get(f"/v1/admin/jobs/{uuid.UUID(int=number)}", headers=ADMIN)).json()["result"]
        for number in range(2)
    ]
    assert first == {"code": "SYNC_HELD", "message": from_refusal(refused).message}
    assert first["message"].startswith("CSP listed no sandbox at all; nothing was changed.")
    assert second == {"code": "SYNC_HELD", "message": "Nothing was changed."}


@pytest.mark.parametrize(
    ("state", "silent_sec", "shown"),
    [("running", 100, "running"), ("running", 130, "failed"), ("completed", 100_000, "completed")],
)
async def test_job_whose_worker_stopped_reporting_has_failed(
    gateway: Gateway, database: asyncpg.Connection, state: str, silent_sec: int, shown: str
) -> None:
    job_id = await add_job(database, state, silent_sec)
    job = (await gateway.client.get(f"/v1/admin/jobs/{job_id}", headers=ADMIN)).json()
    assert job["state"] == shown
    assert (job["result"] or {}).get("message", "").startswith("The worker stopped reporting.") == (shown != state)


@pytest.mark.parametrize("job_id", ["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3", "nonsense"])
async def test_unknown_job_returns_404(gateway: Gateway, job_id: str) -> None:
    response = await gateway.client.get(f"/v1/admin/jobs/{job_id}", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (404, "JOB_NOT_FOUND")
