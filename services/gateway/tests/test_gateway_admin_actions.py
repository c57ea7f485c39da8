"""Tests of the admin routes for actions: clean-up, release of a sandbox, and retry of a deletion."""

import uuid
from collections.abc import AsyncIterator

import pytest

from sandbox_broker.contract.commands import CleanUpNow, EndLease, RecordJob, RetryDeletion

from .gateway_harness import ADMIN, TRACK, Gateway, detail, refuse, running

RELEASED = {"sandbox_id": "7", "status": "pending_deletion", "deletion_requested_at": 1728054200}
ROUTES = [
    "/v1/admin/cleanup",
    "/v1/admin/sandboxes/7/release?reason=gone",
    "/v1/admin/sandboxes/7/retry-deletion",
]


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, admin_wait_sec=5) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


async def test_clean_up_that_ends_in_time_returns_its_result(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert response.status_code == 200
    assert response.json() == {"status": "completed", "deleted": 3, "failed": 1, "duration_ms": 34}
    (job,), (command,) = gateway.maintenance.commands, gateway.reaper.commands
    assert isinstance(job, RecordJob)
    assert isinstance(command, CleanUpNow)
    assert (job.kind, job.state, job.job_id) == ("cleanup", "running", command.job_id)
    assert command.request_id == response.headers["X-Request-ID"]


@pytest.mark.parametrize(
    ("code", "status"), [("CSP_UNAVAILABLE", 502), ("ALLOCATOR_UNAVAILABLE", 503), ("INTERNAL_ERROR", 500)]
)
async def test_refused_clean_up_returns_the_status_of_its_code(gateway: Gateway, code: str, status: int) -> None:
    gateway.reaper.answer = refuse(code)
    response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (status, code)


async def test_job_without_a_record_is_not_started(gateway: Gateway) -> None:
    gateway.maintenance.answer = refuse("ALLOCATOR_UNAVAILABLE")
    response = await gateway.client.post("/v1/admin/cleanup", headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
    assert gateway.reaper.commands == []


async def test_release_passes_the_reason_to_the_allocator(gateway: Gateway) -> None:
    response = await gateway.client.post(
        "/v1/admin/sandboxes/7/release", headers=ADMIN, params={"reason": "schüler left"}
    )
    assert (response.status_code, response.json()) == (200, RELEASED)
    (command,) = gateway.maintenance.commands
    assert isinstance(command, EndLease)
    assert (command.sandbox_id, command.note) == ("7", "schüler left")


@pytest.mark.parametrize("parameters", [{}, {"reason": " "}, {"reason": "a" * 501}, {"reason": "a\0b"}])
async def test_release_without_a_valid_reason_returns_400(gateway: Gateway, parameters: dict[str, str]) -> None:
    response = await gateway.client.post("/v1/admin/sandboxes/7/release", headers=ADMIN, params=parameters)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")
    assert gateway.maintenance.commands == []


async def test_retry_of_a_failed_deletion(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/admin/sandboxes/7/retry-deletion", headers=ADMIN)
    assert (response.status_code, response.json()) == (200, RELEASED)
    (command,) = gateway.maintenance.commands
    assert isinstance(command, RetryDeletion)
    assert command.sandbox_id == "7"


@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.parametrize(
    ("code", "status"),
    [("SANDBOX_NOT_FOUND", 404), ("NOT_ALLOCATED", 409), ("NOT_DELETION_FAILED", 409)],
)
async def test_refusal_returns_the_status_of_its_code(gateway: Gateway, route: str, code: str, status: int) -> None:
    gateway.maintenance.answer = refuse(code, "do something else")
    response = await gateway.client.post(route, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (status, code)
    assert detail(response)["message"] == "do something else"


@pytest.mark.parametrize("route", ROUTES[1:])
async def test_invalid_sandbox_id_returns_404(gateway: Gateway, route: str) -> None:
    response = await gateway.client.post(route.replace("/7/", f"/{'7' * 200}/"), headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (404, "SANDBOX_NOT_FOUND")
    assert gateway.maintenance.commands == []


@pytest.mark.parametrize("route", [*ROUTES, f"/v1/admin/jobs/{uuid.UUID(int=7)}"])
async def test_track_token_returns_403(gateway: Gateway, route: str) -> None:
    method = "GET" if "/jobs/" in route else "POST"
    response = await gateway.client.request(method, route, headers=TRACK)
    assert (response.status_code, detail(response)["code"]) == (403, "FORBIDDEN")
