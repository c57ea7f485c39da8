"""Edge of the console: security headers, request metrics, and the check of the signed-in person."""

import time
from typing import Annotated

import structlog
from fastapi import Depends, Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from console import metrics
from console.api_client import Api
from console.session import Person, is_csrf_valid, read_person
from console.settings import Role

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
OPERATIONS_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})

log = structlog.get_logger()


class NotSignedIn(Exception):
    """The page needs a person. The handler redirects to the sign-in."""


class Refused(Exception):
    """The request is refused with a page that has this status and text."""

    def __init__(self, status: int, title: str, text: str) -> None:
        super().__init__(title)
        self.status = status
        self.title = title
        self.text = text


class EdgeMiddleware:
    """Adds the security headers to every response, and records its metric and log line."""

    def __init__(self, app: ASGIApp, *, secure: bool) -> None:
        self._app = app
        self._headers = dict(SECURITY_HEADERS)
        if secure:
            self._headers["strict-transport-security"] = "max-age=31536000; includeSubDomains"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            endpoint = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - started
            if endpoint != "/events":  # its duration is the choice of the person
                metrics.PAGE_SECONDS.labels(scope["method"], endpoint, status).observe(seconds)
            if scope["path"] not in OPERATIONS_PATHS and not scope["path"].startswith("/static"):
                log.info(
                    "request.handled",
                    method=scope["method"],
                    path=scope["path"][:256],
                    status=status,
                    duration_ms=round(seconds * 1000, 1),
                )


def require_person(request: Request) -> Person:
    """Dependency of every page. Raises NotSignedIn."""
    person = read_person(request)
    if person is None:
        raise NotSignedIn
    return person


SignedIn = Annotated[Person, Depends(require_person)]


def get_api(request: Request, person: SignedIn) -> Api:
    return Api(request.app.state.http, person.token, request.app.state.feeds.find(person.token))


AdminApi = Annotated[Api, Depends(get_api)]


async def require_csrf(request: Request, person: SignedIn) -> None:
    """Dependency of every route that changes something. Raises Refused."""
    # Browsers send this header, and a page of another origin cannot change it.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise _forged()
    form = await request.form()
    if not is_csrf_valid(person, str(form.get("csrf", ""))):
        raise _forged()


def require_role(person: Person, role: Role) -> None:
    """Raises Refused. The gateway checks the role too."""
    if not person.has_role(role):
        raise Refused(
            403,
            "Your role does not permit this",
            f"It needs the role {role}, and you have the role {person.role}. Ask an administrator.",
        )


def _forged() -> Refused:
    return Refused(
        403,
        "The form was refused",
        "It did not come from a page of your present session. Open the page again, then repeat the action.",
    )
