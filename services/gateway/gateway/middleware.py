"""What every request gets, whatever route it goes to or misses: an id, security headers, a size limit, one log
line, one observation, and our own error body when something breaks."""

import re
import time
import uuid
from collections import deque
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import errors, metrics
from gateway.errors import ApiError

MAX_BODY = 64 * 1024

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
    # The docs page needs its own scripts and styles, the inline style attributes that Swagger UI sets, and
    # the data: images in its style sheet.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}

log = structlog.get_logger()


class Envelope:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        method = scope["method"]
        if method == "HEAD":  # GET without its body, which the server leaves out
            scope = {**scope, "method": "GET"}
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_decorated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if scope["state"].get("deprecated"):
                    headers["Deprecation"] = "true"
                for name, value in _SECURITY_HEADERS.items():
                    headers[name] = value
                if scope["path"].startswith("/v1"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._app(scope, await _limited(scope, receive), send_decorated)
        except ApiError as error:  # raised outside any route: the body was too large
            await errors.response(error, request_id)(scope, receive, send_decorated)
        except Exception:
            log.exception("request.failed", request_id=request_id)
            if status:
                raise  # too late for another answer: the server cuts the connection
            await errors.response(errors.internal(), request_id)(scope, receive, send_decorated)
        finally:
            seconds = time.perf_counter() - started
            endpoint = getattr(scope.get("route"), "path", "unknown")
            known_method = method if method in _METHODS else "other"
            metrics.REQUEST_LATENCY.labels(known_method, endpoint, status).observe(seconds)
            if scope["path"].startswith("/v1"):
                log.info(
                    "request.handled",
                    request_id=request_id,
                    method=method,
                    path=quote(scope["path"], errors="replace"),
                    status=status,
                    duration_ms=round(seconds * 1000, 1),
                )


async def _limited(scope: Scope, receive: Receive) -> Receive:
    """Refuses a body by its announced length. One that announces none is read here up to the limit: most routes
    never look at theirs."""
    headers = Headers(scope=scope)
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY:
        raise _too_large()
    if "transfer-encoding" not in headers:
        return receive
    messages: deque[Message] = deque()
    received, more = 0, True
    while more:
        message = await receive()
        messages.append(message)
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise _too_large()
        more = message.get("more_body", False)

    async def receive_again() -> Message:
        return messages.popleft() if messages else await receive()

    return receive_again


def _too_large() -> ApiError:
    return ApiError("PAYLOAD_TOO_LARGE", f"The body is larger than {MAX_BODY} bytes. No route here needs one.")
