"""Admin routes whose far side is slow or away."""

from collections.abc import AsyncIterator

import pytest

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow

from .gateway_harness import ADMIN, FarSide, Gateway, detail, running, say_nothing

SANDBOX_ROUTES = ["/v1/admin/sandboxes/7/release?reason=gone", "/v1/admin/sandboxes/7/retry-deletion"]


@pytest.fixture
async def impatient(amqp_url: str, clean_database: str) -> AsyncIterator[Gateway]:
    """One that waits for an answer for a moment only."""
    async with running(amqp_url, database_url=clean_database, admin_wait_sec=0.5) as gateway:
        yield gateway


async def test_one_that_takes_longer_is_a_job_to_ask_after(impatient: Gateway) -> None:
    impatient.reaper.answer = say_nothing
    response = await impatient.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert response.status_code == 202
    (asked,) = impatient.reaper.commands
    assert isinstance(asked, CleanUpNow)
    url = f"/v1/admin/jobs/{asked.job_id}"
    assert response.headers["Location"] == url
    assert response.json() == {"status": "running", "job_id": str(asked.job_id), "job_url": url}


async def test_a_job_is_not_begun_while_the_allocator_is_silent(impatient: Gateway) -> None:
    impatient.maintenance.answer = say_nothing
    response = await impatient.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
    assert impatient.reaper.commands == []


@pytest.mark.parametrize("route", SANDBOX_ROUTES)
async def test_no_answer_in_time_is_504(impatient: Gateway, route: str) -> None:
    impatient.maintenance.answer = say_nothing
    response = await impatient.client.post(route, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (504, "MAINTENANCE_TIMEOUT")


async def test_a_service_that_is_not_there_is_503_at_once(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, far_sides=False) as gateway:
        codes = [
            detail(await gateway.client.post(route, headers=ADMIN))["code"]
            for route in ("/v1/admin/cleanup", *SANDBOX_ROUTES)
        ]
        assert codes == ["REAPER_UNAVAILABLE", "ALLOCATOR_UNAVAILABLE", "ALLOCATOR_UNAVAILABLE"]
        async with FarSide(topology.REAPER_COMMANDS).consuming(amqp_url):
            response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
            assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
