"""HTTP client of the admin API, with the token of the signed-in person."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

from console import metrics
from console.live_feed import LiveFeed

TIMEOUT_SEC = 10.0
ACTION_TIMEOUT_SEC = 35.0
"""Longer than the gateway's own limit for an admin request (ADMIN_WAIT_SEC)."""


@dataclass
class ApiProblem(Exception):
    """The gateway refused a request, or did not answer."""

    status: int
    """0 without an answer."""
    code: str
    message: str
    request_id: str | None = None

    @property
    def is_outage(self) -> bool:
        return self.status == 0 or self.status >= 500


class Api:
    """Admin API for one person."""

    def __init__(self, client: httpx2.AsyncClient, token: str, feed: LiveFeed | None = None) -> None:
        """`feed` shares answers between the open pages of the token."""
        self._client = client
        self._feed = feed
        self._headers = {"Authorization": f"Bearer {token}"}

    async def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON body. Parameters with the value None or "" are left out. Raises ApiProblem."""
        if self._feed is None:
            return await self._request("GET", path, parameters, TIMEOUT_SEC)
        key = (path, tuple(sorted(parameters.items(), key=str)))
        return await self._feed.share(key, lambda: self._request("GET", path, parameters, TIMEOUT_SEC))

    async def act(self, method: str, path: str, body: Any = None, **parameters: Any) -> Any:
        """Send an action, with `body` as JSON. Return the JSON body, or None without one. Raises ApiProblem."""
        try:
            return await self._request(method, path, parameters, ACTION_TIMEOUT_SEC, body)
        finally:
            if self._feed is not None:
                self._feed.forget_answers()

    async def _request(
        self, method: str, path: str, parameters: dict[str, Any], timeout_sec: float, body: Any = None
    ) -> Any:
        query = {name: value for name, value in parameters.items() if value not in (None, "")}
        try:
            response = await self._client.request(
                method, f"/v1/admin/{path}", params=query, headers=self._headers, timeout=timeout_sec, json=body
            )
        except httpx2.HTTPError as error:
            metrics.GATEWAY_ERRORS.inc()
            raise ApiProblem(
                0,
                "GATEWAY_UNREACHABLE",
                f"The gateway does not answer ({type(error).__name__}). Try again shortly.",
            ) from error
        if response.status_code >= 500:
            metrics.GATEWAY_ERRORS.inc()
        try:
            answer: Any = response.json() if response.content else None
            if response.is_success:
                return answer
            detail = answer["detail"]
            raise ApiProblem(response.status_code, detail["code"], detail["message"], detail.get("request_id"))
        except (ValueError, KeyError, TypeError) as error:
            raise ApiProblem(
                response.status_code, "OTHER_API", "The answer did not come from the broker's gateway."
            ) from error


def quote_segment(value: str) -> str:
    """Escape text for use as one segment of a URL path."""
    return quote(value, safe="")
