"""Helpers of the simulator's tests: clients with and without a network, and requests to both APIs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette

from csp_simulator.app import DEFAULT_TOKEN, create_app
from csp_simulator.testing import serving

LISTING = "/v2/current_user/accounts"
HEADERS = {"Authorization": f"Token {DEFAULT_TOKEN}"}
PATIENCE_SEC = 60.0


@asynccontextmanager
async def connect_in_process(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://csp", headers=HEADERS
    ) as client:
        yield client


@asynccontextmanager
async def serve_and_connect(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a simulator and yield a client over TCP, because only a real connection can hang or break."""
    async with (
        serving(create_app(**options)) as url,
        httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=PATIENCE_SEC, verify=False) as client,
    ):
        yield client


async def set_behaviour(csp: httpx.AsyncClient, **switches: object) -> None:
    (await csp.patch("/_control/behaviour", json=switches)).raise_for_status()


async def fetch_records(csp: httpx.AsyncClient) -> list[Any]:
    records: list[Any] = (await csp.get(LISTING)).raise_for_status().json()["results"]
    return records


async def fetch_sandboxes(csp: httpx.AsyncClient) -> list[dict[str, Any]]:
    return [r for r in await fetch_records(csp) if (r["account_type"], r["state"]) == ("sandbox", "active")]


def get_external_id(account: dict[str, Any]) -> str:
    return str(account["id"]).removeprefix("identity/accounts/")


def get_account_path(account: dict[str, Any]) -> str:
    return f"/v2/sandbox/accounts/{get_external_id(account)}"


async def fetch_calls(csp: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    ended: list[dict[str, Any]] = (await csp.get("/_control/calls", params=query)).json()["calls"]
    return ended


async def fetch_running_calls(csp: httpx.AsyncClient) -> list[dict[str, Any]]:
    running: list[dict[str, Any]] = (await csp.get("/_control/calls")).json()["running"]
    return running
