"""HTTP requests to a running broker: readiness, sync of the pool, counts of the pool."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from devstack.errors import CannotRun

READY_SEC = 30.0
_BETWEEN_TRIES_SEC = 0.05
_SYNC_SEC = 120.0


async def wait_until_ready(urls: Mapping[str, str]) -> None:
    """Wait until every URL responds with 200. Raises CannotRun with the last response of each other URL."""
    last_responses = dict.fromkeys(urls, "no response yet")

    async def poll(client: httpx.AsyncClient, name: str, url: str) -> None:
        while True:
            try:
                response = await client.get(url)
            except httpx.HTTPError as error:
                last_responses[name] = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code == 200:
                    del last_responses[name]
                    return
                last_responses[name] = f"{response.status_code} {response.text[:300]}".strip()
            await asyncio.sleep(_BETWEEN_TRIES_SEC)

    try:
        async with asyncio.timeout(READY_SEC), _client() as client:
            await asyncio.gather(*(poll(client, name, url) for name, url in urls.items()))
    except TimeoutError:
        failures = "; ".join(f"{name} responds: {response}" for name, response in last_responses.items())
        raise CannotRun(f"not ready within {READY_SEC:.0f} s: {failures}", status=1) from None


async def fill_pool(gateway: str, admin_token: str, *, force: bool) -> str | None:
    """Fill the pool by a sync. Return None, or the reason of a failure."""
    async with _client(admin_token, timeout=_SYNC_SEC) as client:
        try:
            response = await client.post(f"{gateway}/v1/admin/sync", params={"force": "true"} if force else None)
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}".strip()
    return None if response.is_success else f"{response.status_code} {response.text[:300]}"


async def fetch_counts(gateway: str, admin_token: str) -> dict[str, Any] | None:
    """Return the number of sandboxes by state, or None if the request fails."""
    async with _client(admin_token) as client:
        try:
            response = await client.get(f"{gateway}/v1/admin/stats")
            response.raise_for_status()
            counts = response.json()
        except (httpx.HTTPError, ValueError):
            return None
    return counts if isinstance(counts, dict) else None


def _client(token: str | None = None, *, timeout: float = 5.0) -> httpx.AsyncClient:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    # No proxy of the environment, because all requests stay on this machine.
    return httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=False)
