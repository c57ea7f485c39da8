"""What the gateway does when the far side is silent or not there at all.

The queues have a single active consumer, so these gateways have them to themselves.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import Command, RecordJob, SyncPool
from sandbox_broker.contract.replies import Purged, Reply

from .gateway_harness import ADMIN, STUDENT, Cable, FarSide, Gateway, detail, running, say_nothing, say_yes, until

AT_ONCE_SEC = 4
"""Less than the 5 s after which the gateway gives up waiting."""


@pytest.fixture
async def hasty(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    """A gateway that waits for a second at most."""
    async with running(amqp_url, database_url=database_url, allocate_timeout_sec=1, admin_wait_sec=1) as gateway:
        yield gateway


@pytest.mark.parametrize(
    ("path", "code"),
    [("/v1/allocate", "ALLOCATION_TIMEOUT"), ("/v1/sandboxes/1/mark-for-deletion", "RELEASE_TIMEOUT")],
)
async def test_no_answer_in_time_is_504_and_may_be_asked_again(hasty: Gateway, path: str, code: str) -> None:
    hasty.allocator.answer = say_nothing
    started = time.monotonic()
    response = await hasty.client.post(path, headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (504, code)
    assert detail(response)["retry_after"]
    assert time.monotonic() - started >= 1
    assert hasty.app.state.context.allocator.in_flight == 0
    hasty.reset()
    assert (await hasty.client.post(path, headers=STUDENT)).status_code in (200, 201)


async def test_nobody_who_consumes_is_503_at_once(amqp_url: str, database_url: str) -> None:
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


async def test_a_lost_rabbitmq_is_503_at_once_and_comes_back(amqp_url: str, database_url: str) -> None:
    far_side = FarSide(topology.ALLOCATOR_COMMANDS, answer=say_nothing)
    async with (
        Cable.to(amqp_url) as cable,
        running(cable.url, database_url=database_url, far_sides=False) as gateway,
        far_side.consuming(amqp_url),
    ):
        await gateway.present()
        in_flight = asyncio.create_task(gateway.allocate())
        await until(lambda: far_side.commands)
        await cable.pull()
        response = await in_flight  # not after its 5 s
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


async def test_a_sync_that_takes_long_becomes_a_job(hasty: Gateway) -> None:
    hasty.syncer.answer = say_nothing
    response = await hasty.client.post("/v1/admin/sync", headers=ADMIN)
    assert response.status_code == 202
    (begun,), (asked,) = hasty.maintenance.commands, hasty.syncer.commands
    assert isinstance(begun, RecordJob)
    assert isinstance(asked, SyncPool)
    assert (begun.kind, begun.state, begun.job_id) == ("sync", "running", asked.job_id)
    path = f"/v1/admin/jobs/{asked.job_id}"
    assert response.json() == {"status": "running", "job_id": str(asked.job_id), "job_url": path}
    assert response.headers["Location"] == path


async def test_a_purge_without_an_end_tells_how_far_it_came(hasty: Gateway) -> None:
    async def purge(_: Command) -> Reply:
        return Purged(count=500)

    hasty.maintenance.answer = purge
    response = await hasty.client.post("/v1/admin/bulk-delete?status=stale", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (504, "MAINTENANCE_TIMEOUT")


async def test_a_sync_without_a_csp_syncer_is_503(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        response = await gateway.client.post("/v1/admin/sync", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "SYNCER_UNAVAILABLE")


async def test_a_gateway_that_stops_leaves_no_task_behind(amqp_url: str, database_url: str) -> None:
    before = Counter(task.get_name() for task in asyncio.all_tasks())
    async with running(amqp_url, database_url=database_url) as gateway:
        await gateway.allocate()
    await until(lambda: not Counter(task.get_name() for task in asyncio.all_tasks()) - before)


async def test_an_allocator_that_has_just_come_is_asked_at_once(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        await gateway.absent()
        async with FarSide(topology.ALLOCATOR_COMMANDS).consuming(amqp_url):
            assert (await gateway.allocate()).status_code == 201


async def test_who_waits_is_told_at_once_that_the_allocator_has_gone(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        allocator = gateway.app.state.context.allocator
        async with FarSide(topology.ALLOCATOR_COMMANDS, say_nothing).consuming(amqp_url):
            await gateway.present()
            waiting = asyncio.create_task(gateway.allocate())
            await until(lambda: allocator.in_flight == 1)
        gone = time.monotonic()
        response = await waiting
        assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
        assert time.monotonic() - gone < AT_ONCE_SEC
