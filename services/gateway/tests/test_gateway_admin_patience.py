"""Tests of admin routes while a service is slow or down."""

from collections.abc import AsyncIterator

import pytest

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow

from .gateway_harness import ADMIN, FarSide, Gateway, detail, running, say_nothing

SANDBOX_ROUTES = ["/v1/admin/sandboxes/7/release?reason=gone", "/v1/admin/sandboxes/7/retry-deletion"]


@pytest.fixture
async def gateway(amqp_url: str, clean_database: str) -> AsyncIterator[Gateway]:
    """Gateway with a short timeout for admin requests."""
    async with running(amqp_url, database_url=clean_database, admin_wait_sec=0.5) as gateway:
        yield gateway


async def test_slow_clean_up_returns_202_with_the_job(gateway: Gateway) -> None:
    gateway.reaper.answer = say_nothing
    response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert response.status_code == 202
    (command,) = gateway.reaper.commands
    assert isinstance(command, CleanUpNow)
    url = f"/v1/admin/jobs/{command.job_id}"
    assert response.headers["Location"] == url
    assert response.json() == {"status": "running", "job_id": str(command.job_id), "job_url": url}


async def test_job_is_not_started_while_the_allocator_does_not_reply(gateway: Gateway) -> None:
    gateway.maintenance.answer = say_nothing
    response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
    assert gateway.reaper.commands == []


@pytest.mark.parametrize("route", SANDBOX_ROUTES)
async def test_missing_reply_returns_504(gateway: Gateway, route: str) -> None:
    gateway.maintenance.answer = say_nothing
    response = await gateway.client.post(route, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (504, "MAINTENANCE_TIMEOUT")


async def test_service_without_consumers_returns_503_at_once(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        codes = [
            detail(await gateway.client.post(route, headers=ADMIN))["code"]
            for route in ("/v1/admin/cleanup", *SANDBOX_ROUTES)
        ]
        assert codes == ["REAPER_UNAVAILABLE", "ALLOCATOR_UNAVAILABLE", "ALLOCATOR_UNAVAILABLE"]
        async with FarSide(topology.REAPER_COMMANDS).consuming(amqp_url):
            response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
            assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
