"""GET /v1/admin/status: it answers whatever is down, and says what that is."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import asyncpg
import pytest

from devstack.postgres import PrivatePostgres
from gateway.queries import status as status_module
from gateway.queries.status import Look
from sandbox_broker.contract import topology
from sandbox_broker.migrate import migrate

from .gateway_harness import ADMIN, Cable, Gateway, running, until


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no part that is down."""
    monkeypatch.setattr(status_module, "PART_SEC", 10)


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


async def status(gateway: Gateway) -> dict[str, Any]:
    response = await gateway.client.get("/v1/admin/status", headers=ADMIN)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def services(found: dict[str, Any]) -> dict[str, str]:
    return {entry["service"]: entry["state"] for entry in found["services"]}


async def test_services_are_told_by_the_consumers_of_their_queues(
    clean_queues: str, database: asyncpg.Connection, clean_database: str
) -> None:
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        found = await status(gateway)
        assert services(found) == {"allocator": "down", "csp-syncer": "down", "reaper": "down"}
        assert {entry["queue"] for entry in found["queues"]} == {queue.name for queue in topology.QUEUES}
        # Somebody who consumes some of the allocator's queues.
        async with gateway.allocator.consuming(clean_queues), gateway.maintenance.consuming(clean_queues):
            found = await status(gateway)
    assert services(found) == {"allocator": "partly", "csp-syncer": "down", "reaper": "down"}
    commands = {"queue": "allocator.commands", "messages": 0, "consumers": 1, "problem": None}
    assert commands in found["queues"]
    up = {"state": "up", "problem": None}
    assert (found["rabbitmq"], found["database"]) == (up, up)


async def test_it_shows_the_pool_and_what_is_known_of_csp(
    clean_queues: str, database: asyncpg.Connection, clean_database: str
) -> None:
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        found = await status(gateway)
        assert found["csp"] == {
            "listed_at": None,
            "unfinished_since": None,
            "held": False,
            "pending_since": None,
            "failing": 0,
            "error": None,
        }
        assert (found["pool"]["total"], found["dead_letters"]) == (0, 0)
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
            """
        )
        found = await status(gateway)
        assert found["csp"] == {
            "listed_at": 1000,
            "unfinished_since": 2000,
            "held": False,
            "pending_since": 3000,
            "failing": 1,
            "error": "CSP answered 500",
        }
        assert (found["pool"]["total"], found["pool"]["available"], found["dead_letters"]) == (4, 1, 1)
        await database.execute("UPDATE csp_listings SET held_at = now() WHERE applied_at IS NULL")
        csp = (await status(gateway))["csp"]
        assert (csp["held"], csp["unfinished_since"]) == (True, None)
        await database.execute("UPDATE csp_listings SET applied_at = now() WHERE held_at IS NOT NULL")  # forced
        csp = (await status(gateway))["csp"]
        assert (csp["held"], csp["listed_at"]) == (False, 2000)


async def test_a_queue_that_does_not_answer_is_named(
    clean_queues: str, clean_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        Cable.to(clean_queues) as cable,
        running(cable.url, database_url=clean_database, far_sides=False) as gateway,
    ):
        await status(gateway)  # opens the channels
        monkeypatch.setattr(status_module, "PART_SEC", 2)
        cable.silence(topology.EXPIRY_TICKS.name)
        found = await status(gateway)
        cable.answer()
    silent = {
        "queue": topology.EXPIRY_TICKS.name,
        "messages": None,
        "consumers": None,
        "problem": "no answer in 2 s",
    }
    assert [entry for entry in found["queues"] if entry["problem"]] == [silent]
    assert found["rabbitmq"] == {"state": "up", "problem": None}
    assert services(found)["reaper"] == "down", "the other queues of the reaper say so"


async def test_a_queue_that_is_missing_is_named(clean_queues: str, clean_database: str) -> None:
    async with running(clean_queues, database_url=clean_database, far_sides=False) as gateway:
        async with await aio_pika.connect(clean_queues) as connection, connection.channel() as channel:
            await channel.queue_delete(topology.REAPER_EVENTS.name)
        found = await status(gateway)
    (missing,) = [entry for entry in found["queues"] if entry["problem"]]
    assert missing["queue"] == topology.REAPER_EVENTS.name
    assert "NOT_FOUND" in missing["problem"]
    assert found["rabbitmq"]["state"] == "up"


async def test_without_rabbitmq_the_rest_is_told(clean_queues: str, clean_database: str) -> None:
    async with (
        Cable.to(clean_queues) as cable,
        running(cable.url, database_url=clean_database, far_sides=False) as gateway,
    ):
        await cable.pull()
        await until(lambda: not gateway.app.state.context.publisher.connected)
        found = await status(gateway)
        assert found["rabbitmq"]["state"] == "down"
        assert "not connected" in found["rabbitmq"]["problem"]
        assert set(services(found).values()) == {"unknown"}
        assert found["queues"] is None
        assert (found["database"]["state"], found["pool"]["total"]) == ("up", 0)


async def test_without_the_database_the_rest_is_told(clean_queues: str) -> None:
    async with running(clean_queues, far_sides=False) as gateway:
        found = await status(gateway)
        assert found["database"]["state"] == "down"
        assert "refused" in found["database"]["problem"] or "Connect call failed" in found["database"]["problem"]
        assert (found["pool"], found["csp"], found["dead_letters"]) == (None, None, None)
        assert found["rabbitmq"]["state"] == "up"


async def test_a_database_that_hangs_is_not_waited_for(clean_queues: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with PrivatePostgres() as server:
        await migrate(server.url)
        async with running(clean_queues, database_url=server.url, far_sides=False) as gateway:
            assert (await status(gateway))["database"]["state"] == "up"
            backends = await _backends(server.url)
            assert server.process is not None
            for pid in (server.process.pid, *backends):
                os.kill(pid, signal.SIGSTOP)
            try:
                monkeypatch.setattr(status_module, "PART_SEC", 0.2)
                for _ in range(3):
                    found = await status(gateway)
                    assert found["database"] == {"state": "down", "problem": "no answer in 0.2 s"}
                    assert gateway.app.state.context.engine.pool.checkedout() <= 1
            finally:
                for pid in (server.process.pid, *backends):
                    os.kill(pid, signal.SIGCONT)
            monkeypatch.setattr(status_module, "PART_SEC", 10)
            assert (await status(gateway))["database"]["state"] == "up"


async def _backends(url: str) -> list[int]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        return [row["pid"] for row in rows]
    finally:
        await connection.close()


async def test_a_part_that_hangs_has_one_look_at_it_however_often_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status_module, "PART_SEC", 0.01)
    begun = 0
    answers = asyncio.Event()

    async def hang() -> str:
        nonlocal begun
        begun += 1
        await answers.wait()
        return str(uuid.UUID(int=begun))

    look = Look(hang)
    assert await asyncio.gather(*(look.see() for _ in range(10))) == ["no answer in 0.01 s"] * 10
    assert await look.see() == "no answer in 0.01 s"
    assert begun == 1
    answers.set()
    monkeypatch.setattr(status_module, "PART_SEC", 10)
    assert await look.see() == str(uuid.UUID(int=1))
    assert await look.see() == str(uuid.UUID(int=2))
