"""Cross-origin resource sharing (CORS): browser pages of the origins in CORS_ALLOWED_ORIGINS may call the API."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.errors import ApiError
from gateway.web import headers
from gateway.web.request_middleware import RequestMiddleware

ANY_ORIGIN = "*"

_METHODS = ["GET", "HEAD", "POST"]
_REQUEST_HEADERS = [
    *("Authorization", "X-Request-ID"),
    *(headers.STUDENT, headers.STUDENT_OLD, headers.TRACK, headers.PREFIX, headers.KEY, headers.PREFER),
    *(headers.MODE, headers.NEW_HOLDER),
]
_RESPONSE_HEADERS = [
    *("X-Request-ID", "Retry-After", "Deprecation", "Location", "WWW-Authenticate", "Preference-Applied"),
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
]
_ORIGIN = re.compile(
    r"(?P<site>(?P<scheme>https?)://([a-z0-9._\-]+|\[[0-9a-f:.]+\]))(?::(?P<port>[1-9][0-9]{0,4}))?", re.ASCII
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
"""Ports that browsers omit from an origin."""


def parse_origins(listed: str) -> list[str]:
    """Return the origins of a comma-separated list, in the notation of browsers. Raises ValueError."""
    origins = [_normalize(part.strip()) for part in listed.split(",") if part.strip()]
    if ANY_ORIGIN in origins and len(origins) > 1:
        raise ValueError(f"{ANY_ORIGIN} allows every origin, so it must be the only entry")
    return origins


def _normalize(origin: str) -> str:
    if origin == ANY_ORIGIN:
        return ANY_ORIGIN
    parts = _ORIGIN.fullmatch(origin.lower())
    if parts is None or int(parts["port"] or 0) > 65535:
        raise ValueError(f"{origin!r} is not an origin like https://labs.example.com, without a path")
    has_default_port = parts["port"] in (None, _DEFAULT_PORTS[parts["scheme"]])
    return parts["site"] if has_default_port else parts[0]


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's CORS middleware, around RequestMiddleware: a page can therefore read error responses too.

    A preflight requires no token and does not count against the rate limit, because a page cannot read the reason
    for a refused preflight. Credentials of the browser are never allowed: a page sends a token of its own.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=allowed,
            allow_methods=_METHODS,
            allow_headers=_REQUEST_HEADERS,
            expose_headers=_RESPONSE_HEADERS,
        )
        self._preflight = RequestMiddleware(self._respond, endpoint="preflight", rate_limited=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_headers = Headers(scope=scope)
        if (
            scope["method"] == "OPTIONS"
            and "Origin" in request_headers
            and "Access-Control-Request-Method" in request_headers
        ):
            await self._preflight(scope, receive, send)
        else:
            await self.simple_response(scope, receive, send, request_headers=request_headers)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self.preflight_response(Headers(scope=scope))
        if response.status_code != 200:
            raise ApiError("CORS_REFUSED", f"{bytes(response.body).decode()}. Check CORS_ALLOWED_ORIGINS.")
        await response(scope, receive, send)
