"""Direct routes: which requests bypass the framework, and how the middleware around them treats them."""

import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.types import Scope

from gateway.api.schemas.track import Lease, StandbyLease
from gateway.main import DIRECT_ROUTES
from gateway.routes.track import render_lease
from gateway.web.direct_routes import DirectResponse
from gateway.web.headers import Fields
from gateway.web.request_middleware import RequestMiddleware
from sandbox_broker.contract.types import LeaseMode

from .gateway_harness import LEASE, STUDENT, TRACK, client, create_app_without_servers, detail

DIRECT = ("POST", "/direct")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """Return the gateway with a further direct route."""
    app = create_app_without_servers()

    async def handle(_: Scope, __: Fields) -> DirectResponse:
        return DirectResponse(200, b'{"answer":42}', [(b"x-own", b"1")])

    stack = app.build_middleware_stack()
    app.middleware_stack = RequestMiddleware(stack, direct_routes={**DIRECT_ROUTES, DIRECT: handle})
    return app


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        (*DIRECT, 200),
        ("GET", "/direct", 404),
        ("PUT", "/direct", 404),
        ("POST", "/direct/", 404),
        ("POST", "/Direct", 404),
        ("POST", "/", 404),
    ],
)
async def test_only_the_exact_method_and_path_bypass_the_framework(
    app: FastAPI, method: str, path: str, status: int
) -> None:
    async with client(app) as http:
        response = await http.request(method, path)
    assert response.status_code == status


async def test_a_direct_response_gets_the_headers_of_all_responses(app: FastAPI) -> None:
    async with client(app) as http:
        response = await http.request(*DIRECT)
    assert response.json() == {"answer": 42}
    expected = {"content-length": "13", "content-type": "application/json", "x-own": "1", "x-frame-options": "DENY"}
    assert response.headers.items() >= expected.items()
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path"), DIRECT_ROUTES)
async def test_the_route_in_the_openapi_document_never_runs(method: str, path: str) -> None:
    app = create_app_without_servers()
    assert method.lower() in app.openapi()["paths"][path]
    async with client(app) as http:
        response = await http.request(method, path, headers=STUDENT)
    # The documented route would fail with INTERNAL_ERROR.
    assert detail(response)["code"] == "ALLOCATOR_UNAVAILABLE"


@pytest.mark.parametrize("origins", ["", "*"])
@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"", 401),
        (TRACK, b"", 400),
        (STUDENT, b"", 503),
        (STUDENT, b"x" * 70_000, 413),
        ({**STUDENT, "X-Request-ID": "again"}, b"", 429),
    ],
)
async def test_every_response_to_a_direct_route_is_labelled_with_it(
    origins: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    """Also if the middleware refuses the request before the handler."""
    app = create_app_without_servers(cors_allowed_origins=origins, rate_limit="1/hour")
    labels = {"method": "POST", "endpoint": "/v1/allocate", "status": str(status)}

    def count() -> float:
        return REGISTRY.get_sample_value("broker_request_latency_seconds_count", labels) or 0

    async with client(app) as http:
        if status == 429:
            await http.post("/v1/allocate", headers=headers)
        before = count()
        response = await http.post("/v1/allocate", headers=headers, content=body)
    assert response.status_code == status
    assert count() == before + 1


@pytest.mark.parametrize("sfdc_account_id", [None, "001"])
@pytest.mark.parametrize(
    ("mode", "claimed_at", "model"),
    [("active", None, Lease), ("standby", None, StandbyLease), ("active", 7, StandbyLease)],
)
def test_a_lease_is_the_json_of_its_model(
    mode: LeaseMode, claimed_at: int | None, model: type[Lease], sfdc_account_id: str | None
) -> None:
    reply = LEASE.model_copy(
        update={"mode": mode, "claimed_at": claimed_at, "sfdc_account_id": sfdc_account_id, "name": 'l"äb'}
    )
    expected = model.model_validate(reply, from_attributes=True).model_dump_json()
    assert render_lease(reply).decode() == expected
