"""Record of calls."""

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from csp_simulator import calls as calls_module
from csp_simulator.app import create_app
from devstack.conditions import wait_until

from .simulator_harness import (
    LISTING,
    connect_in_process,
    fetch_calls,
    fetch_running_calls,
    set_behaviour,
)


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=2)) as client:
        yield client


async def test_calls_are_recorded_in_the_order_they_ended(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_latency_sec=0.1)
    await asyncio.gather(csp.get(LISTING), csp.delete("/v2/sandbox/accounts/none"))
    await csp.get(LISTING, headers={"Authorization": "Token no"})
    await csp.get("/v2/nothing")
    await csp.get("/api/nothing")
    await csp.get("/healthz")
    await csp.get("/_control/calls")
    assert [(c["seq"], c["method"], c["path"], c["status"]) for c in await fetch_calls(csp)] == [
        (1, "DELETE", "/v2/sandbox/accounts/none", 404),
        (2, "GET", LISTING, 200),
        (3, "GET", LISTING, 401),
        (4, "GET", "/v2/nothing", 404),
        (5, "GET", "/api/nothing", 404),
    ]


async def test_call_has_start_and_end_on_both_clocks(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_latency_sec=0.1)
    before, before_monotonic = time.time(), time.monotonic()
    await csp.get(LISTING)
    after, after_monotonic = time.time(), time.monotonic()
    (call,) = await fetch_calls(csp)
    assert before <= call["at"] < call["ended_at"] <= after
    assert before_monotonic <= call["begun"] <= call["ended"] - 0.099
    assert call["ended"] <= after_monotonic
    assert call["duration_ms"] == pytest.approx((call["ended"] - call["begun"]) * 1000, abs=0.01)


async def test_running_call_is_listed_until_it_ends(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_latency_sec=30)
    before = time.monotonic()
    call = asyncio.create_task(csp.get(LISTING))
    await wait_until(lambda: fetch_running_calls(csp))
    running = await fetch_running_calls(csp)
    assert [(c["method"], c["path"]) for c in running] == [("GET", LISTING)]
    assert before <= running[0]["begun"] <= time.monotonic()
    assert await fetch_calls(csp) == []
    call.cancel()
    await asyncio.wait([call])
    assert await fetch_running_calls(csp) == []
    assert [c["status"] for c in await fetch_calls(csp)] == [None]


async def test_calls_can_be_filtered_and_cleared(csp: httpx.AsyncClient) -> None:
    await csp.get(LISTING)
    await csp.delete("/v2/sandbox/accounts/none")
    await csp.get("/v2/nothing")

    async def fetch_seqs(**query: str) -> list[int]:
        return [call["seq"] for call in await fetch_calls(csp, **query)]

    assert await fetch_seqs(method="delete") == [2]
    assert await fetch_seqs(path_contains="current_user") == [1]
    assert await fetch_seqs(method="GET", path_contains="none") == []
    assert await fetch_seqs(status="404") == [2, 3]
    assert await fetch_seqs(status="404", method="GET") == [3]
    assert await fetch_seqs(after_seq="1") == [2, 3]
    assert (await csp.delete("/_control/calls")).status_code == 204
    assert await fetch_seqs() == []
    await csp.get(LISTING)
    assert await fetch_seqs() == [4]


@pytest.mark.parametrize("query", ["status=x", "after_seq=x"])
async def test_invalid_filter_is_refused(csp: httpx.AsyncClient, query: str) -> None:
    response = await csp.get(f"/_control/calls?{query}")
    assert (response.status_code, response.json()) == (400, {"error": "status and after_seq must be integers"})


async def test_oldest_calls_are_dropped_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "MAX_CALLS", 3)
    async with connect_in_process(create_app(accounts=0)) as csp:
        for _ in range(5):
            await csp.get(LISTING)
        assert [call["seq"] for call in await fetch_calls(csp)] == [3, 4, 5]
