"""What pages of other origins may do in a browser: nothing, unless CORS_ALLOWED_ORIGINS lists their origin."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.errors import ApiError
from gateway.web import headers
from gateway.web.request_middleware import Envelope

ANY = "*"

_METHODS = ["GET", "HEAD", "POST"]
_READ = [
    *("Authorization", "X-Request-ID"),
    *(headers.STUDENT, headers.STUDENT_OLD, headers.TRACK, headers.PREFIX, headers.KEY),
]
_EXPOSED = [
    *("X-Request-ID", "Retry-After", "Deprecation", "Location", "WWW-Authenticate"),
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
]
_ORIGIN = re.compile(
    r"(?P<site>(?P<scheme>https?)://([a-z0-9._\-]+|\[[0-9a-f:.]+\]))(?::(?P<port>[1-9][0-9]{0,4}))?", re.ASCII
)
_USUAL_PORTS = {"http": "80", "https": "443"}
"""That browsers leave out."""


def origins(listed: str) -> list[str]:
    """From a comma-separated list, as browsers write them. Raises ValueError."""
    found = [_origin(part.strip()) for part in listed.split(",") if part.strip()]
    if ANY in found and len(found) > 1:
        raise ValueError(f"{ANY} allows every origin: it must stand alone")
    return found


def _origin(given: str) -> str:
    if given == ANY:
        return ANY
    parts = _ORIGIN.fullmatch(given.lower())
    if parts is None or int(parts["port"] or 0) > 65535:
        raise ValueError(f"{given!r} is no origin like https://labs.example.com, with nothing behind it")
    usual = parts["port"] in (None, _USUAL_PORTS[parts["scheme"]])
    return parts["site"] if usual else parts[0]


class Cors(CORSMiddleware):
    """Starlette's. It stands outside of all else, so that a page can read our refusals too. A preflight needs no
    token and does not count against the rate limit: a page could not read why it was refused.

    Never with credentials: who asks is told by a token that the page itself sends, not by what the browser keeps.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=allowed,
            allow_methods=_METHODS,
            allow_headers=_READ,
            expose_headers=_EXPOSED,
        )
        self._preflight = Envelope(self._answer, endpoint="preflight", limited=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope)
        if scope["method"] == "OPTIONS" and "Origin" in given and "Access-Control-Request-Method" in given:
            await self._preflight(scope, receive, send)
        else:
            await self.simple_response(scope, receive, send, request_headers=given)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self.preflight_response(Headers(scope=scope))
        if response.status_code != 200:
            raise ApiError("CORS_REFUSED", f"{bytes(response.body).decode()}. See CORS_ALLOWED_ORIGINS.")
        await response(scope, receive, send)
