"""/healthz, /readyz and /metrics."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.observability import health
from sandbox_broker.observability.health import Check

from .shared_harness import TcpProxy, assert_no_leaks, open_tcp_proxy


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
async def database_proxy(clean_database: str) -> AsyncIterator[TcpProxy]:
    async with open_tcp_proxy(clean_database, 5432) as line:
        yield line


async def get(path: str, **checks: Check) -> httpx.Response:
    app = Starlette(routes=health.routes(checks))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        return await client.get(path)


async def well() -> str | None:
    return None


async def ill() -> str | None:
    return "not connected to RabbitMQ"


async def hangs() -> str | None:
    await asyncio.Event().wait()
    return None


async def test_healthz_ignores_the_checks() -> None:
    assert (await get("/healthz", queue=ill)).status_code == 200


async def test_a_service_is_ready_when_all_checks_pass() -> None:
    answer = await get("/readyz", queue=well, database=well)
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "checks": {"queue": "ok", "database": "ok"}}


async def test_a_stopping_service_is_not_ready() -> None:
    app = Starlette(routes=health.routes({"queue": well}))
    app.state.stopping = True
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        answer = await client.get("/readyz")
        assert (await client.get("/healthz")).status_code == 200
    assert (answer.status_code, answer.json()["detail"]["code"]) == (503, "NOT_READY")
    assert answer.headers["Retry-After"] == str(answer.json()["detail"]["retry_after"])


async def test_readyz_names_the_failed_check() -> None:
    answer = await get("/readyz", queue=ill, database=well)
    assert answer.status_code == 503
    body = answer.json()
    assert body["checks"] == {"queue": "not connected to RabbitMQ", "database": "ok"}
    assert body["detail"]["code"] == "NOT_READY"
    assert "queue: not connected to RabbitMQ" in body["detail"]["message"]
    assert body["detail"]["request_id"]
    assert answer.headers["retry-after"] == str(body["detail"]["retry_after"])


async def test_a_hanging_check_fails_after_its_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_TIMEOUT_SEC", 0.05)
    async with asyncio.timeout(30):
        answer = await get("/readyz", queue=hangs, database=hangs, other=well)
    assert answer.status_code == 503
    assert answer.json()["checks"] == {
        "queue": "no answer in 0.05 s",
        "database": "no answer in 0.05 s",
        "other": "ok",
    }


async def test_metrics_have_the_format_of_prometheus() -> None:
    answer = await get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "python_info" in answer.text


async def test_an_unresponsive_database_fails_the_check_until_it_answers_again(
    database_proxy: TcpProxy,
) -> None:
    engine = connections.create_engine(Primary(database_proxy.url), pool_size=1, max_overflow=0)

    async def database() -> str | None:
        return await connections.check_connection(engine)

    try:
        assert (await get("/readyz", database=database)).status_code == 200
        database_proxy.pause()
        async with asyncio.timeout(30):
            answer = await get("/readyz", database=database)
        assert answer.status_code == 503
        database_proxy.reset()
        database_proxy.resume()
        assert (await get("/readyz", database=database)).status_code == 200
    finally:
        await engine.dispose()
