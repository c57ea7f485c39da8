"""What the tests of the simulator have in common: a client of it, with or without a network between."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
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
async def client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://csp", headers=HEADERS
    ) as client:
        yield client


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that really connects: only so can a connection hang or break."""
    async with (
        serving(create_app(**options)) as url,
        httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=PATIENCE_SEC, verify=False) as client,
    ):
        yield client


async def behave(csp: httpx.AsyncClient, **switches: object) -> None:
    (await csp.patch("/_control/behaviour", json=switches)).raise_for_status()


async def results(csp: httpx.AsyncClient) -> list[Any]:
    found: list[Any] = (await csp.get(LISTING)).raise_for_status().json()["results"]
    return found


async def sandboxes(csp: httpx.AsyncClient) -> list[dict[str, Any]]:
    return [r for r in await results(csp) if (r["account_type"], r["state"]) == ("sandbox", "active")]


def external_id(account: dict[str, Any]) -> str:
    return str(account["id"]).removeprefix("identity/accounts/")


def path_of(account: dict[str, Any]) -> str:
    return f"/v2/sandbox/accounts/{external_id(account)}"


async def calls(csp: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await csp.get("/_control/calls", params=query)).json()["calls"]
    return found


async def running(csp: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await csp.get("/_control/calls")).json()["running"]
    return found


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(PATIENCE_SEC):
        while not await condition():  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(0.01)
