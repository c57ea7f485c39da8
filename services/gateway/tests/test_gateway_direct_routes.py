"""Direct routes: which requests bypass the framework, and how the middleware around them treats them."""

import pytest
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send

from gateway.main import DIRECT_ROUTES
from gateway.web.direct_routes import DirectRoutes

from .gateway_harness import STUDENT, TRACK, client, create_app_without_servers, detail

DIRECT = ("POST", "/direct")


async def dispatch(scope: Scope) -> str:
    """Return which application gets the scope."""
    called: list[str] = []

    async def app(_: Scope, __: Receive, ___: Send) -> None:
        called.append("app")

    async def handler(_: Scope, __: Receive, ___: Send) -> None:
        called.append("handler")

    async def receive() -> dict[str, object]:
        raise AssertionError

    async def send(_: object) -> None:
        raise AssertionError

    await DirectRoutes(app, {DIRECT: handler})(scope, receive, send)
    (name,) = called
    return name


@pytest.mark.parametrize(
    ("method", "path", "called"),
    [
        (*DIRECT, "handler"),
        ("GET", "/direct", "app"),
        ("post", "/direct", "app"),
        ("POST", "/direct/", "app"),
        ("POST", "/Direct", "app"),
        ("POST", "/", "app"),
    ],
)
async def test_only_the_exact_method_and_path_bypass_the_framework(method: str, path: str, called: str) -> None:
    assert await dispatch({"type": "http", "method": method, "path": path}) == called


async def test_the_lifespan_goes_to_the_framework() -> None:
    assert await dispatch({"type": "lifespan"}) == "app"


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
