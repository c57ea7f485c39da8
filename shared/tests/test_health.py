"""/healthz, /readyz and /metrics."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from sandbox_broker.database import connections
from sandbox_broker.observability import health
from sandbox_broker.observability.health import Check

from .shared_harness import Line, line_to, nothing_stays


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    async with nothing_stays():
        yield


@pytest.fixture
async def database_line(clean_database: str) -> AsyncIterator[Line]:
    async with line_to(clean_database, 5432) as line:
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


async def test_a_process_that_answers_is_alive_whatever_it_depends_on() -> None:
    assert (await get("/healthz", queue=ill)).status_code == 200


async def test_it_is_ready_when_all_is_well() -> None:
    answer = await get("/readyz", queue=well, database=well)
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "checks": {"queue": "ok", "database": "ok"}}


async def test_it_is_not_ready_while_it_stops_whatever_the_checks_say() -> None:
    app = Starlette(routes=health.routes({"queue": well}))
    app.state.stopping = True
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        answer = await client.get("/readyz")
        assert (await client.get("/healthz")).status_code == 200
    assert (answer.status_code, answer.json()["detail"]["code"]) == (503, "NOT_READY")
    assert answer.headers["Retry-After"] == str(answer.json()["detail"]["retry_after"])


async def test_it_says_which_check_fails() -> None:
    answer = await get("/readyz", queue=ill, database=well)
    assert answer.status_code == 503
    body = answer.json()
    assert body["checks"] == {"queue": "not connected to RabbitMQ", "database": "ok"}
    assert body["detail"]["code"] == "NOT_READY"
    assert "queue: not connected to RabbitMQ" in body["detail"]["message"]
    assert body["detail"]["request_id"]
    assert answer.headers["retry-after"] == str(body["detail"]["retry_after"])


async def test_a_check_that_hangs_has_failed_and_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_TIMEOUT_SEC", 0.05)
    async with asyncio.timeout(30):
        answer = await get("/readyz", queue=hangs, database=hangs, other=well)
    assert answer.status_code == 503
    assert answer.json()["checks"] == {
        "queue": "no answer in 0.05 s",
        "database": "no answer in 0.05 s",
        "other": "ok",
    }


async def test_metrics_are_for_prometheus() -> None:
    answer = await get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "python_info" in answer.text


async def test_a_database_that_falls_silent_is_told_in_time_and_well_again_when_it_is_back(
    database_line: Line,
) -> None:
    engine = connections.create_engine(database_line.url, pool_size=1, max_overflow=0)

    async def database() -> str | None:
        return await connections.check_connection(engine)

    try:
        assert (await get("/readyz", database=database)).status_code == 200
        database_line.silence()
        async with asyncio.timeout(30):
            answer = await get("/readyz", database=database)
        assert answer.status_code == 503
        database_line.cut()
        database_line.speak()
        assert (await get("/readyz", database=database)).status_code == 200
    finally:
        await engine.dispose()
