"""Tests of the gateway while a service does not reply or is down.

The queues have a single active consumer, so each test uses its own gateway and consumers.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from devstack.conditions import wait_until
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import AllocateSandbox, Command, RecordJob, SyncPool
from sandbox_broker.contract.replies import Purged, Reply

from .gateway_harness import ADMIN, LEASE, STUDENT, Cable, FarSide, Gateway, detail, running, say_nothing, say_yes

AT_ONCE_SEC = 4
"""Less than the 5 s of the request timeout."""


@pytest.fixture
async def gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    """Gateway with request timeouts of 1 s."""
    async with running(amqp_url, database_url=database_url, allocate_timeout_sec=1, admin_wait_sec=1) as gateway:
        yield gateway


@pytest.mark.parametrize(
    ("path", "code"),
    [("/v1/allocate", "ALLOCATION_TIMEOUT"), ("/v1/sandboxes/1/mark-for-deletion", "RELEASE_TIMEOUT")],
)
async def test_missing_reply_returns_504_and_a_retry_succeeds(gateway: Gateway, path: str, code: str) -> None:
    gateway.allocator.answer = say_nothing
    started = time.monotonic()
    response = await gateway.client.post(path, headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (504, code)
    assert detail(response)["retry_after"]
    assert time.monotonic() - started >= 1
    assert gateway.app.state.context.allocator.in_flight == 0
    gateway.reset()
    assert (await gateway.client.post(path, headers=STUDENT)).status_code in (200, 201)


async def test_queue_without_consumers_returns_503_at_once(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        for path in ("/v1/allocate", "/v1/sandboxes/1/mark-for-deletion"):
            started = time.monotonic()
            response = await gateway.client.post(path, headers=STUDENT)
            assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
            assert detail(response)["retry_after"]
            assert time.monotonic() - started < AT_ONCE_SEC
        async with FarSide(topology.ALLOCATOR_COMMANDS).consuming(amqp_url):
            await gateway.present()
            assert (await gateway.allocate()).status_code == 201
        await gateway.absent()
        assert (await gateway.allocate()).status_code == 503


async def test_lost_rabbitmq_returns_503_at_once_until_it_is_back(amqp_url: str, database_url: str) -> None:
    far_side = FarSide(topology.ALLOCATOR_COMMANDS, answer=say_nothing)
    async with (
        Cable.to(amqp_url) as cable,
        running(cable.url, database_url=database_url, far_sides=False) as gateway,
        far_side.consuming(amqp_url),
    ):
        await gateway.present()
        in_flight = asyncio.create_task(gateway.allocate())
        await wait_until(lambda: far_side.commands)
        await cable.pull()
        response = await in_flight  # before its timeout of 5 s
        assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
        for method, path, headers in (
            ("POST", "/v1/allocate", STUDENT),
            ("POST", "/v1/sandboxes/1/mark-for-deletion", STUDENT),
            ("POST", "/v1/admin/sync", ADMIN),
            ("GET", "/readyz", {}),
        ):
            started = time.monotonic()
            response = await gateway.client.request(method, path, headers=headers)
            assert response.status_code == 503
            assert time.monotonic() - started < AT_ONCE_SEC
        checks = json.loads(response.text)["checks"]
        assert checks["database"] == "ok"
        assert checks["queue"] != "ok"
        assert (await gateway.client.get("/healthz")).status_code == 200
        await cable.plug_in()
        far_side.answer = say_yes
        await gateway.present()
        assert (await gateway.allocate()).status_code == 201


async def test_slow_sync_returns_202_with_the_job(gateway: Gateway) -> None:
    gateway.syncer.answer = say_nothing
    response = await gateway.client.post("/v1/admin/sync", headers=ADMIN)
    assert response.status_code == 202
    (job,), (command,) = gateway.maintenance.commands, gateway.syncer.commands
    assert isinstance(job, RecordJob)
    assert isinstance(command, SyncPool)
    assert (job.kind, job.state, job.job_id) == ("sync", "running", command.job_id)
    path = f"/v1/admin/jobs/{command.job_id}"
    assert response.json() == {"status": "running", "job_id": str(command.job_id), "job_url": path}
    assert response.headers["Location"] == path


async def test_purge_that_does_not_end_returns_504(gateway: Gateway) -> None:
    async def purge(_: Command) -> Reply:
        return Purged(count=500)

    gateway.maintenance.answer = purge
    response = await gateway.client.post("/v1/admin/bulk-delete?status=stale", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (504, "MAINTENANCE_TIMEOUT")


async def test_sync_without_a_csp_syncer_returns_503(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        response = await gateway.client.post("/v1/admin/sync", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "SYNCER_UNAVAILABLE")


async def test_stopped_gateway_leaves_no_tasks(amqp_url: str, database_url: str) -> None:
    before = Counter(task.get_name() for task in asyncio.all_tasks())
    async with running(amqp_url, database_url=database_url) as gateway:
        await gateway.allocate()
    await wait_until(lambda: not Counter(task.get_name() for task in asyncio.all_tasks()) - before)


async def test_request_after_the_start_of_an_allocator_succeeds(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        await gateway.absent()
        async with FarSide(topology.ALLOCATOR_COMMANDS).consuming(amqp_url):
            assert (await gateway.allocate()).status_code == 201


@pytest.mark.parametrize("was_present", [True, False])
async def test_a_late_count_of_consumers_fails_no_later_request(
    amqp_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch, was_present: bool
) -> None:
    """The allocator starts after RabbitMQ has counted the consumers, and before the gateway gets the count."""
    counted, late, handled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def reply_after_the_count(_: Command) -> Reply:
        await handled.wait()
        return LEASE

    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        allocator, publisher = gateway.app.state.context.allocator, gateway.app.state.context.publisher
        await wait_until(lambda: publisher.connected and gateway.app.state.context.rpc_client.connected)
        count_consumers = publisher.count_consumers

        async def count_late(queue: str, *, timeout_sec: float) -> int:
            consumers: int = await count_consumers(queue, timeout_sec=timeout_sec)
            counted.set()
            await late.wait()
            handled.set()
            return consumers

        monkeypatch.setattr(publisher, "count_consumers", count_late)
        await counted.wait()
        monkeypatch.setattr(publisher, "count_consumers", count_consumers)
        allocator._present = was_present
        far_side = FarSide(topology.ALLOCATOR_COMMANDS, reply_after_the_count)
        async with far_side.consuming(amqp_url):
            command = AllocateSandbox(request_id="request", holder="student-1")
            request = asyncio.create_task(allocator.request(command, timeout_sec=60))
            await asyncio.sleep(0)  # so that the request waits for the allocator, or for the count
            late.set()
            assert await request == LEASE


async def test_pending_request_fails_at_once_when_the_allocator_stops(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        allocator = gateway.app.state.context.allocator
        async with FarSide(topology.ALLOCATOR_COMMANDS, say_nothing).consuming(amqp_url):
            await gateway.present()
            waiting = asyncio.create_task(gateway.allocate())
            await wait_until(lambda: allocator.in_flight == 1)
        stopped = time.monotonic()
        response = await waiting
        assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
        assert time.monotonic() - stopped < AT_ONCE_SEC
