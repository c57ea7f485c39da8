"""What a running broker is asked over HTTP: is it ready, fill the pool, what is in it."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from devstack.errors import CannotRun

READY_SEC = 30.0
_BETWEEN_TRIES_SEC = 0.05
_SYNC_SEC = 120.0


async def wait_until_ready(urls: Mapping[str, str]) -> None:
    """Returns when every URL has answered 200; raises CannotRun with the answers of those that did not."""
    answers = dict.fromkeys(urls, "nothing yet")

    async def ask(client: httpx.AsyncClient, name: str, url: str) -> None:
        while True:
            try:
                response = await client.get(url)
            except httpx.HTTPError as error:
                answers[name] = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code == 200:
                    del answers[name]
                    return
                answers[name] = f"{response.status_code} {response.text[:300]}".strip()
            await asyncio.sleep(_BETWEEN_TRIES_SEC)

    try:
        async with asyncio.timeout(READY_SEC), _client() as client:
            await asyncio.gather(*(ask(client, name, url) for name, url in urls.items()))
    except TimeoutError:
        late = "; ".join(f"{name} answers: {answer}" for name, answer in answers.items())
        raise CannotRun(f"not ready within {READY_SEC:.0f} s: {late}", status=1) from None


async def fill_pool(gateway: str, admin_token: str, *, force: bool) -> str | None:
    """Runs a sync. None when it was done, else what stood in its way."""
    async with _client(admin_token, timeout=_SYNC_SEC) as client:
        try:
            response = await client.post(f"{gateway}/v1/admin/sync", params={"force": "true"} if force else None)
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}".strip()
    return None if response.is_success else f"{response.status_code} {response.text[:300]}"


async def fetch_counts(gateway: str, admin_token: str) -> dict[str, Any] | None:
    """The counts per state; None when they cannot be had."""
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
    # A proxy in the environment is for the world outside, not for this machine.
    return httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=False)
