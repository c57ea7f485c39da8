"""Middleware for every request, also for unknown paths.

It sets the request id and the security headers, applies the limits of rate and size, writes one log line and one
metric, and turns any exception into the error body of the API.
"""

import asyncio
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from gateway.allocator_client import ClientDisconnected
from gateway.api import errors
from gateway.api.errors import ApiError
from gateway.web import rate_limit
from gateway.web.direct_routes import DirectRoutes
from gateway.web.headers import Fields, read_claimed_track, read_unchecked_holder
from gateway.web.rate_limit import RateLimitStatus
from sandbox_broker.observability import frequent_log, tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from gateway.context import Context

MAX_BODY = 64 * 1024
"""Bytes."""

_OPERATIONS_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes for the platform. They have no rate limit, because the platform polls them from one address. If OPS_PORT
is set, they are available on that port only."""

_SIGNED_PATHS = frozenset({"/v1/instruqt/events"})
"""Routes with a signature instead of a token. Only refused requests count, because one address sends the events of
all students."""

_CLIENT_CLOSED_REQUEST = 499
"""Status in the log and in metrics if the client disconnected before the response, as in nginx."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_NEEDLESSLY_ENCODED = re.compile(rb"%(?:2[DdEeFf]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")
"""A percent-encoded '/' or unreserved character of RFC 3986 (letter, digit, '-', '.', '_', '~')."""

MAX_LOGGED = 256
"""Longest part of a path, or of an id, in a log line, in characters."""

_MAX_PATHS = 500
"""Quoted paths in memory."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")

# The docs page needs scripts and styles of this origin, the inline style attributes of Swagger UI, and the data:
# images of its style sheet.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"strict-transport-security", b"max-age=31536000; includeSubDomains"),
    (b"content-security-policy", _CONTENT_SECURITY_POLICY.encode()),
]
NO_STORE = (b"cache-control", b"no-store")
_REVALIDATE = (b"cache-control", b"no-cache")
"""A cache may store the response, and revalidates it with its ETag before each use."""
_DEPRECATED = (b"deprecation", b"true")
_JSON = (b"content-type", b"application/json")

log = structlog.get_logger()


class RequestMiddleware:
    """Middleware around all routes, or around the single endpoint `endpoint`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoint: str | None = None,
        direct_routes: DirectRoutes = MappingProxyType({}),
        rate_limited: bool = True,
    ) -> None:
        """`app` gets all requests but those of `direct_routes`. With `rate_limited`, callers are identified and
        their requests count against the rate limit."""
        self._app = app
        self._endpoint = endpoint
        self._direct_routes = direct_routes
        self._rate_limited = rate_limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif tracing.should_sample() and scope["path"].startswith("/v1"):
            await self._trace(scope, receive, send)
        else:
            await self._handle(scope, receive, send)

    async def _trace(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        span = tracing.start(scope["method"], "server")
        with tracing.use_span(span):
            try:
                await self._handle(scope, receive, send)
            finally:
                if span is not None:
                    _annotate_span(span, state)
                    span.end()

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        method, path = scope["method"], scope["path"]
        fields = dict(scope["headers"])
        request_id = _choose_request_id(fields.get(b"x-request-id", b""))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["client"] = scope["app"].state.context.client_address(scope)
        if method == "HEAD":  # handled as GET, because the server omits the body
            scope = {**scope, "method": "GET"}
            state["is_head"] = True
        status = 0
        rate_limit_status = await self._count_request(scope, fields)

        async def send_decorated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                if rate_limit_status is not None:
                    headers += _rate_limit_headers(rate_limit_status)
                if "deprecated" in state:
                    headers.append(_DEPRECATED)
                if path.startswith("/v1"):
                    headers.append(_REVALIDATE if "revalidate" in state else NO_STORE)
                message = {**message, "headers": headers}
            await send(message)

        try:
            _check_early(scope, rate_limit_status)
            await self._pass_on(scope, fields, receive, send_decorated)
        except ApiError as error:  # raised outside the routes of FastAPI
            await errors.build_response(error, state)(scope, receive, send_decorated)
        except ClientDisconnected:
            status = _CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the server stops, and its time to drain has passed
            if status or not getattr(scope["app"].state, "stopping", False):
                raise
            await errors.build_response(errors.stopping_error(), state)(scope, receive, send_decorated)
        except Exception:  # the outermost layer: log the cause, and respond with the error body of the API
            log.exception("request.failed", request_id=request_id)
            if status:
                raise  # the response has started, so the server can only close the connection
            await errors.build_response(errors.internal_error(), state)(scope, receive, send_decorated)
        finally:
            self._record(scope, fields, method, status, time.perf_counter() - started)

    async def _pass_on(self, scope: Scope, fields: Fields, receive: Receive, send: Send) -> None:
        """Pass the request to the direct route, or to the application."""
        receive = await _limit_body(fields, receive)
        direct_route = self._direct_routes.get((scope["method"], scope["path"]))
        if direct_route is None:
            await self._app(scope, receive, send)
            return
        response = await direct_route(scope, fields)
        headers = [(b"content-length", b"%d" % len(response.body)), _JSON, *response.headers]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    def _record(self, scope: Scope, fields: Fields, method: str, status: int, seconds: float) -> None:
        """Record the metric of the request, and its log line if its path is in the API."""
        path, state = scope["path"], scope["state"]
        endpoint = self._endpoint or self._route_path(method, scope)
        known_method = method if method in METHODS else "other"
        if "is_stream" not in state:  # the duration of a stream is the choice of its client
            metrics.request_latency(known_method, endpoint, status).observe(seconds)
        state["outcome"] = (known_method, endpoint, status)
        if path.startswith("/v1"):
            frequent_log.info(
                "request.handled",
                request_id=state["request_id"],
                method=method,
                path=_quote(path[:MAX_LOGGED]),
                status=status,
                duration_ms=round(seconds * 1000, 1),
                client=state["client"].full,
                **_log_fields(state, fields),
            )

    def _route_path(self, method: str, scope: Scope) -> str:
        path: str = scope["path"]
        if (method, path) in self._direct_routes:
            return path
        return getattr(scope.get("route"), "path", "unknown")

    async def _count_request(self, scope: Scope, fields: Fields) -> RateLimitStatus | None:
        """Identify the caller, and count the request; None if no rate limit applies to it."""
        if not self._rate_limited:
            return None
        context: Context = scope["app"].state.context
        caller = scope["state"]["caller"] = await context.auth.identify(scope["headers"], fields)
        if context.rate_limits is None or scope["path"] in _OPERATIONS_PATHS | _SIGNED_PATHS:
            return None
        if caller.has_known_token:
            return context.rate_limits.students.hit(caller.token_hash + read_unchecked_holder(fields))
        return context.rate_limits.addresses.hit(scope["state"]["client"].counted)


def _annotate_span(span: "Span", state: Mapping[str, Any]) -> None:
    method, endpoint, status = state["outcome"]
    span.update_name(f"{method} {endpoint}")
    span.set_attributes(
        {
            "http.request.method": method,
            "http.route": endpoint,
            "http.response.status_code": status,
            **{f"broker.{name}": str(value) for name, value in state.get("ids", {}).items()},
            "broker.request_id": state["request_id"],
        }
    )
    if status >= 500:
        tracing.mark_failed(span, state.get("code", str(status)))


def _log_fields(state: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the ids that the route has read so far and the error code, for the log line of a request.

    Without a known token, no route reads the headers. The lab that the request claims to come from then helps to
    find a lab with an old token.
    """
    logged = {name: value[:MAX_LOGGED] for name, value in state.get("ids", {}).items()}
    if "code" in state:
        logged["code"] = state["code"]
    caller = state.get("caller")
    if caller is not None and caller.named is not None:
        logged["token"] = caller.actor
    if caller is not None and not caller.has_known_token and (track := read_claimed_track(fields)):
        logged["claimed_track"] = track
    return logged


@lru_cache(_MAX_PATHS)
def _quote(path: str) -> str:
    """Return a path for the log."""
    return quote(path, errors="replace")[:MAX_LOGGED]


def _check_early(scope: Scope, status: RateLimitStatus | None) -> None:
    """Raise ApiError for a request that no route may receive."""
    # Accept one spelling per path, because a proxy that compares paths byte by byte does not recognise
    # `/v1/%61dmin` as an admin route, and this server would.
    raw_path = scope.get("raw_path") or b""
    if b"%" in raw_path and _NEEDLESSLY_ENCODED.search(raw_path):
        message = (
            "The path contains percent-encoded characters that need no encoding. "
            "Send letters, digits, '-', '.', '_', '~' and '/' unencoded."
        )
        raise ApiError("NOT_FOUND", message)
    # Both ports serve this application, so separate the routes here.
    ops_port = scope["app"].state.context.settings.ops_port
    if ops_port is not None and (scope["server"][1] == ops_port) != (scope["path"] in _OPERATIONS_PATHS):
        raise errors.not_on_this_port(scope["path"])
    if status is not None and status.is_exceeded:
        raise rate_limit.build_error(status, known_token=scope["state"]["caller"].has_known_token)


def _rate_limit_headers(status: RateLimitStatus) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit", b"%d" % status.limit),
        (b"x-ratelimit-remaining", b"%d" % status.remaining),
        (b"x-ratelimit-reset", b"%d" % status.reset),
    ]


def _choose_request_id(sent: bytes) -> str:
    """Return the id that the client sent if it is well-formed, otherwise a new one."""
    return sent.decode("ascii") if _REQUEST_ID.fullmatch(sent) else _generate_uuid()


def _generate_uuid() -> str:
    """Return a random UUID (version 4). uuid.uuid4 takes three times as long, and most requests need one."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"


async def _limit_body(fields: Fields, receive: Receive) -> Receive:
    """Return a `receive` for a body of at most MAX_BODY bytes. Raises ApiError PAYLOAD_TOO_LARGE.

    The function reads a chunked body itself, because most routes never read their bodies.
    """
    content_length = fields.get(b"content-length", b"")
    if content_length.isdigit() and int(content_length) > MAX_BODY:
        raise _too_large()
    if b"transfer-encoding" not in fields:
        return receive
    messages: deque[Message] = deque()
    received, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        messages.append(message)
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise _too_large()
        more = message.get("more_body", False)

    async def receive_again() -> Message:
        return messages.popleft() if messages else await receive()

    return receive_again


def _too_large() -> ApiError:
    return ApiError(
        "PAYLOAD_TOO_LARGE",
        f"The body is larger than {MAX_BODY} bytes. Send a smaller one, or none if the route requires none.",
    )
