"""The record of calls."""

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from csp_simulator import calls as module
from csp_simulator.app import create_app

from .simulator_harness import LISTING, behave, calls, client_of, eventually, running


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(accounts=2)) as client:
        yield client


async def test_calls_are_recorded_in_the_order_they_ended(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_latency_sec=0.1)
    await asyncio.gather(csp.get(LISTING), csp.delete("/v2/sandbox/accounts/none"))
    await csp.get(LISTING, headers={"Authorization": "Token no"})
    await csp.get("/v2/nothing")
    await csp.get("/api/nothing")
    await csp.get("/healthz")
    await csp.get("/_control/calls")
    assert [(c["seq"], c["method"], c["path"], c["status"]) for c in await calls(csp)] == [
        (1, "DELETE", "/v2/sandbox/accounts/none", 404),
        (2, "GET", LISTING, 200),
        (3, "GET", LISTING, 401),
        (4, "GET", "/v2/nothing", 404),
        (5, "GET", "/api/nothing", 404),
    ]


async def test_a_call_has_its_begin_and_end_on_both_clocks(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_latency_sec=0.1)
    at, begun = time.time(), time.monotonic()
    await csp.get(LISTING)
    ended_at, ended = time.time(), time.monotonic()
    (call,) = await calls(csp)
    assert at <= call["at"] < call["ended_at"] <= ended_at
    assert begun <= call["begun"] <= call["ended"] - 0.099
    assert call["ended"] <= ended
    assert call["duration_ms"] == pytest.approx((call["ended"] - call["begun"]) * 1000, abs=0.01)


async def test_a_call_that_runs_is_seen_before_it_ends(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_latency_sec=30)
    before = time.monotonic()
    call = asyncio.create_task(csp.get(LISTING))
    await eventually(lambda: running(csp))
    seen = await running(csp)
    assert [(c["method"], c["path"]) for c in seen] == [("GET", LISTING)]
    assert before <= seen[0]["begun"] <= time.monotonic()
    assert await calls(csp) == []
    call.cancel()
    await asyncio.wait([call])
    assert await running(csp) == []
    assert [c["status"] for c in await calls(csp)] == [None]


async def test_calls_can_be_filtered_and_cleared(csp: httpx.AsyncClient) -> None:
    await csp.get(LISTING)
    await csp.delete("/v2/sandbox/accounts/none")
    await csp.get("/v2/nothing")

    async def seqs(**query: str) -> list[int]:
        return [call["seq"] for call in await calls(csp, **query)]

    assert await seqs(method="delete") == [2]
    assert await seqs(path_contains="current_user") == [1]
    assert await seqs(method="GET", path_contains="none") == []
    assert await seqs(status="404") == [2, 3]
    assert await seqs(status="404", method="GET") == [3]
    assert await seqs(after_seq="1") == [2, 3]
    assert (await csp.delete("/_control/calls")).status_code == 204
    assert await seqs() == []
    await csp.get(LISTING)
    assert await seqs() == [4]


@pytest.mark.parametrize("query", ["status=x", "after_seq=x"])
async def test_a_filter_that_makes_no_sense_is_refused(csp: httpx.AsyncClient, query: str) -> None:
    response = await csp.get(f"/_control/calls?{query}")
    assert (response.status_code, response.json()) == (400, {"error": "status and after_seq must be integers"})


async def test_only_the_last_calls_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 3)
    async with client_of(create_app(accounts=0)) as csp:
        for _ in range(5):
            await csp.get(LISTING)
        assert [call["seq"] for call in await calls(csp)] == [3, 4, 5]
