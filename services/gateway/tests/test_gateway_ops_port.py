"""/healthz, /readyz and /metrics on a separate port (OPS_PORT)."""

import httpx
import pytest
from fastapi import FastAPI

from .gateway_harness import ADMIN, STUDENT, create_app_without_servers, detail

MAIN, OPS = 8080, 9100
OPERATIONS = (("/healthz", 200), ("/readyz", 503), ("/metrics", 200))


def client(app: FastAPI, port: int) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://gateway:{port}")


@pytest.mark.parametrize("origins", ["", "*"], ids=["", "cors"])
async def test_each_port_serves_only_its_own_routes(origins: str) -> None:
    app = create_app_without_servers(ops_port=OPS, cors_allowed_origins=origins)
    async with client(app, MAIN) as main, client(app, OPS) as ops:
        for path, status in OPERATIONS:
            assert (await ops.get(path)).status_code == status
            assert (await ops.head(path)).status_code == status
            for method in ("GET", "HEAD", "POST"):
                refusal = await main.request(method, path)
                assert refusal.status_code == 404
                assert refusal.headers["X-Content-Type-Options"] == "nosniff"
            refusal = await main.get(path, headers=ADMIN)
            assert (refusal.status_code, detail(refusal)["code"]) == (404, "NOT_FOUND")
            assert detail(refusal)["message"] == f"{path} does not exist on this port. Check the path and the port."
        for method, path, status in (
            ("POST", "/v1/allocate", 503),
            ("GET", "/v1/sandboxes/%00", 404),
            ("GET", "/v1/admin/jobs/x", 404),
            ("GET", "/v1/docs", 200),
            ("GET", "/v1/openapi.json", 200),
            ("GET", "/nope", 404),
        ):
            headers = {**STUDENT, **ADMIN}
            assert (await main.request(method, path, headers=headers)).status_code == status
            refusal = await ops.request(method, path, headers=headers)
            assert (refusal.status_code, detail(refusal)["code"]) == (404, "NOT_FOUND")
            assert "on this port" in detail(refusal)["message"]


@pytest.mark.parametrize("port", [MAIN, OPS])
async def test_without_ops_port_one_port_serves_all_routes(port: int) -> None:
    async with client(create_app_without_servers(), port) as http:
        for path, status in OPERATIONS:
            assert (await http.get(path)).status_code == status
        assert (await http.get("/v1/docs")).status_code == 200


async def test_ops_port_has_no_rate_limit() -> None:
    app = create_app_without_servers(ops_port=OPS, rate_limit="1/hour")
    async with client(app, OPS) as ops:
        for path, status in OPERATIONS * 3:
            assert (await ops.get(path)).status_code == status


async def test_the_openapi_document_has_only_the_routes_of_the_main_port() -> None:
    async with client(create_app_without_servers(ops_port=OPS), MAIN) as main:
        paths = (await main.get("/v1/openapi.json")).json()["paths"]
    assert "/v1/allocate" in paths
    assert not paths.keys() & {path for path, _ in OPERATIONS}
