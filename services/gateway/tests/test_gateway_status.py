"""Tests of GET /v1/admin/status: the report is complete and names each component that is down."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import asyncpg
import pytest

from devstack.conditions import wait_until
from devstack.postgres import PrivatePostgres
from gateway.queries import status as status_module
from gateway.queries.status import Probe, Problem
from sandbox_broker.contract import topology
from sandbox_broker.migrate import migrate

from .gateway_harness import ADMIN, Cable, Gateway, running


@pytest.fixture(autouse=True)
def long_probe_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes must not time out because the machine is busy."""
    monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 10)


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


async def get_status(gateway: Gateway) -> dict[str, Any]:
    response = await gateway.client.get("/v1/admin/status", headers=ADMIN)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def services(report: dict[str, Any]) -> dict[str, str]:
    return {entry["service"]: entry["state"] for entry in report["services"]}


async def test_service_state_follows_the_consumers_of_its_queues(
    clean_queues: str, database: asyncpg.Connection, clean_database: str
) -> None:
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        report = await get_status(gateway)
        assert services(report) == {
            "allocator": "down",
            "csp-syncer": "down",
            "provisioner": "down",
            "reaper": "down",
        }
        assert {entry["queue"] for entry in report["queues"]} == {queue.name for queue in topology.QUEUES}
        # Consume some of the queues of the allocator.
        async with gateway.allocator.consuming(clean_queues), gateway.maintenance.consuming(clean_queues):
            report = await get_status(gateway)
    assert services(report) == {
        "allocator": "partly",
        "csp-syncer": "down",
        "provisioner": "down",
        "reaper": "down",
    }
    commands = {
        "queue": "allocator.commands",
        "service": "allocator",
        "messages": 0,
        "consumers": 1,
        "problem": None,
    }
    assert commands in report["queues"]
    up = {"state": "up", "problem": None}
    assert (report["rabbitmq"], report["database"]) == (up, up)


async def test_report_includes_the_pool_and_the_recorded_state_of_csp(
    clean_queues: str, database: asyncpg.Connection, clean_database: str
) -> None:
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        report = await get_status(gateway)
        assert report["csp"] == {
            "listed_at": None,
            "unfinished_since": None,
            "held": False,
            "pending_since": None,
            "failing": 0,
            "error": None,
        }
        assert (report["pool"]["total"], report["dead_letters"], report["stopped_stock"]) == (0, 0, [])
        await database.execute(
            """
            INSERT INTO csp_listings (begun_at, applied_at, outcome)
                VALUES (to_timestamp(1000), to_timestamp(1001), '{}');
            INSERT INTO csp_listings (begun_at) VALUES (to_timestamp(2000));
            INSERT INTO sandboxes (sandbox_id, external_id, name, status, deletion_requested_at, deletion_attempts,
                deletion_error)
            VALUES ('1', 'a', 'a', 'available', NULL, 0, NULL),
                ('2', 'b', 'b', 'pending_deletion', to_timestamp(3000), 2, 'CSP answered 500'),
                ('3', 'c', 'c', 'pending_deletion', to_timestamp(4000), 0, NULL),
                ('4', 'd', 'd', 'deletion_failed', to_timestamp(500), 8, 'CSP answered 501');
            INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), 'q', 'why', '{}', NULL, NULL, NULL, '');
            INSERT INTO waiting (holder, command, ends_at) VALUES ('ann', '{}', now()), ('ben', '{}', now());
            INSERT INTO policies (name, document)
                VALUES ('lab', '{"name": "lab", "stock": {"name_prefix": "lab-", "min": 1, "max": 2}}');
            INSERT INTO stock_prefixes (name_prefix, next_number, stopped_at, stop_cause, stop_reason)
            VALUES ('lab-', 1, to_timestamp(5000), 'refused', 'quota'),
                ('without-rule-', 1, to_timestamp(5000), 'refused', 'quota');
            """
        )
        report = await get_status(gateway)
        assert report["csp"] == {
            "listed_at": 1000,
            "unfinished_since": 2000,
            "held": False,
            "pending_since": 3000,
            "failing": 1,
            "error": "CSP answered 500",
        }
        assert (report["pool"]["total"], report["pool"]["available"], report["dead_letters"]) == (4, 1, 1)
        assert report["waiting"] == 2
        assert report["stopped_stock"] == [
            {"name_prefix": "lab-", "stopped_at": 5000, "cause": "refused", "reason": "quota"}
        ]
        codes = [item["code"] for item in report["attention"]]
        assert codes[0] == "service_down"  # no service runs in this test
        assert {"stock_stopped", "deletions_failed", "deletions_failing", "dead_letters"} <= set(codes)
        await database.execute("UPDATE csp_listings SET held_at = now() WHERE applied_at IS NULL")
        csp = (await get_status(gateway))["csp"]
        assert (csp["held"], csp["unfinished_since"]) == (True, None)
        await database.execute("UPDATE csp_listings SET applied_at = now() WHERE held_at IS NOT NULL")  # forced
        csp = (await get_status(gateway))["csp"]
        assert (csp["held"], csp["listed_at"]) == (False, 2000)


async def test_report_names_a_stock_that_is_used_up_soon(
    clean_queues: str, database: asyncpg.Connection, clean_database: str
) -> None:
    await database.execute(
        """
        INSERT INTO policies (name, document)
            VALUES ('lab', '{"name": "lab", "stock": {"name_prefix": "lab-", "min": 1, "max": 9}}'),
                ('dns', '{"name": "dns", "stock": {"name_prefix": "dns-", "min": 1, "max": 9}}');
        INSERT INTO sandboxes (sandbox_id, external_id, name, status)
            VALUES ('1', 'a', 'lab-1', 'available'), ('2', 'b', 'lab-2', 'allocated'),
                ('3', 'c', 'dns-1', 'available');
        INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ('2', 'ann', now() + interval '4 hours');
        """
    )
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        (item,) = [item for item in (await get_status(gateway))["attention"] if item["code"] == "stock_low"]
    assert item["problem"] == "The stock of lab- is empty in 5 min"
    assert item["effect"] == "It loses 12 sandboxes an hour to new leases."


async def test_report_names_a_queue_without_an_answer(
    clean_queues: str, clean_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        Cable.to(clean_queues) as cable,
        running(cable.url, database_url=clean_database, far_sides=False) as gateway,
    ):
        await get_status(gateway)  # opens the channels
        monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 2)
        cable.silence(topology.EXPIRY_TICKS.name)
        report = await get_status(gateway)
        cable.answer()
    silent = {
        "queue": topology.EXPIRY_TICKS.name,
        "service": "reaper",
        "messages": None,
        "consumers": None,
        "problem": "no answer in 2 s",
    }
    assert [entry for entry in report["queues"] if entry["problem"]] == [silent]
    assert report["rabbitmq"] == {"state": "up", "problem": None}
    assert services(report)["reaper"] == "down", "the other queues of the reaper have no consumers"


async def test_report_names_a_missing_queue(clean_queues: str, clean_database: str) -> None:
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        async with await aio_pika.connect(clean_queues) as connection, connection.channel() as channel:
            await channel.queue_delete(topology.REAPER_EVENTS.name)
        report = await get_status(gateway)
    (missing,) = [entry for entry in report["queues"] if entry["problem"]]
    assert missing["queue"] == topology.REAPER_EVENTS.name
    assert "NOT_FOUND" in missing["problem"]
    assert report["rabbitmq"]["state"] == "up"


async def test_rabbitmq_without_an_answer_yet_is_not_down(
    clean_queues: str, clean_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        Cable.to(clean_queues) as cable,
        running(cable.url, database_url=clean_database, far_sides=False) as gateway,
    ):
        cable.silence(".")  # a part of every name
        monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 0.3)
        report = await get_status(gateway)
        cable.answer()
    assert report["rabbitmq"] == {"state": "unknown", "problem": "no answer in 0.3 s"}
    assert set(services(report).values()) == {"unknown"}


async def test_report_without_rabbitmq_is_complete_otherwise(clean_queues: str, clean_database: str) -> None:
    async with (
        Cable.to(clean_queues) as cable,
        running(cable.url, database_url=clean_database, far_sides=False) as gateway,
    ):
        await cable.pull()
        await wait_until(lambda: not gateway.app.state.context.publisher.connected)
        report = await get_status(gateway)
        assert report["rabbitmq"]["state"] == "down"
        assert "not connected" in report["rabbitmq"]["problem"]
        assert set(services(report).values()) == {"unknown"}
        assert report["queues"] is None
        assert (report["database"]["state"], report["pool"]["total"]) == ("up", 0)


async def test_report_without_the_database_is_complete_otherwise(clean_queues: str) -> None:
    async with running(clean_queues, far_sides=False) as gateway:
        report = await get_status(gateway)
        assert report["database"]["state"] == "down"
        assert "refused" in report["database"]["problem"] or "Connect call failed" in report["database"]["problem"]
        assert (report["pool"], report["csp"], report["dead_letters"]) == (None, None, None)
        assert report["rabbitmq"]["state"] == "up"


async def test_report_does_not_wait_for_a_database_that_hangs(
    clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with PrivatePostgres() as server:
        await migrate(server.url)
        async with running(clean_queues, database_url=server.url, far_sides=False) as gateway:
            assert (await get_status(gateway))["database"]["state"] == "up"
            backends = await _backends(server.url)
            assert server.process is not None
            for pid in (server.process.pid, *backends):
                os.kill(pid, signal.SIGSTOP)
            try:
                monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 0.2)
                monkeypatch.setattr(status_module, "DOWN_AFTER_SEC", 2)
                states: list[str] = []
                while not states or states[-1] == "unknown":
                    report = await get_status(gateway)
                    states.append(report["database"]["state"])
                    assert report["database"]["problem"] == "no answer in 0.2 s"
                    # One connection of each probe of the report, one of the refresh of tokens.
                    assert gateway.app.state.context.engine.pool.checkedout() <= 3
                assert (states[0], states[-1]) == ("unknown", "down")
            finally:
                for pid in (server.process.pid, *backends):
                    os.kill(pid, signal.SIGCONT)
            monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 10)
            assert (await get_status(gateway))["database"]["state"] == "up"


async def _backends(url: str) -> list[int]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        return [row["pid"] for row in rows]
    finally:
        await connection.close()


async def test_concurrent_probes_of_a_component_that_hangs_share_one_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 0.01)
    checks = 0
    may_finish = asyncio.Event()

    async def hang() -> str:
        nonlocal checks
        checks += 1
        await may_finish.wait()
        return str(uuid.UUID(int=checks))

    probe = Probe(hang)
    no_answer = Problem("unknown", "no answer in 0.01 s")
    assert await asyncio.gather(*(probe.run() for _ in range(10))) == [no_answer] * 10
    assert await probe.run() == no_answer
    assert checks == 1
    may_finish.set()
    monkeypatch.setattr(status_module, "PROBE_TIMEOUT_SEC", 10)
    assert await probe.run() == str(uuid.UUID(int=1))
    assert await probe.run() == str(uuid.UUID(int=2))
