"""What every request gets, whatever route it goes to or misses: an id, security headers, the limits of rate and
size, one log line, one observation, and our own error body when something breaks."""

import asyncio
import re
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from gateway.allocator_client import ClientDisconnected
from gateway.api import errors
from gateway.api.errors import ApiError
from gateway.web.headers import Fields, student_as_sent
from gateway.web.rate_limit import Standing, exceeded
from sandbox_broker.observability import tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from gateway.context import Context

MAX_BODY = 64 * 1024

_OPERATIONS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes for the platform, which asks from one address and without end: not limited. On OPS_PORT only, if that is
set."""

_CLIENT_GONE = 499
"""In the log and in metrics, in place of a status that nobody has seen; nginx has made it known."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_NEEDLESSLY_ENCODED = re.compile(rb"%(?:2[DdEeFf]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")
"""A percent-encoded '/' or unreserved character of RFC 3986 (letter, digit, '-', '.', '_', '~')."""

MAX_LOGGED = 256
"""Characters of a path, or of an id in it, in one log line."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")

# The docs page needs its own scripts and styles, the inline style attributes that Swagger UI sets, and the data:
# images in its style sheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"strict-transport-security", b"max-age=31536000; includeSubDomains"),
    (b"content-security-policy", _POLICY.encode()),
]
NO_STORE = (b"cache-control", b"no-store")
_REVALIDATE = (b"cache-control", b"no-cache")
"""A cache may keep the response, and asks with its ETag before each use."""
_DEPRECATED = (b"deprecation", b"true")

log = structlog.get_logger()


class Envelope:
    """The outermost layer of the application, or of the one route `endpoint`."""

    def __init__(self, app: ASGIApp, *, endpoint: str | None = None, limited: bool = True) -> None:
        """`limited`: callers are identified, and their requests count against the rate limit."""
        self._app = app
        self._endpoint = endpoint
        self._limited = limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif tracing.begin() and scope["path"].startswith("/v1"):
            await self._trace(scope, receive, send)
        else:
            await self._handle(scope, receive, send)

    async def _trace(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        span = tracing.start(scope["method"], "server")
        with tracing.using(span):
            try:
                await self._handle(scope, receive, send)
            finally:
                if span is not None:
                    _describe(span, state)
                    span.end()

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        method, path = scope["method"], scope["path"]
        if method == "HEAD":  # GET without its body, which the server leaves out
            scope = {**scope, "method": "GET"}
        given = dict(scope["headers"])
        request_id = _request_id(given.get(b"x-request-id", b""))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0
        standing = self._standing(scope, given)

        async def send_decorated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                if standing is not None:
                    headers += _standing_headers(standing)
                if "deprecated" in state:
                    headers.append(_DEPRECATED)
                if path.startswith("/v1"):
                    headers.append(_REVALIDATE if "revalidate" in state else NO_STORE)
                message = {**message, "headers": headers}
            await send(message)

        try:
            _refuse_early(scope, standing)
            await self._app(scope, await _limited(given, receive), send_decorated)
        except ApiError as error:  # raised outside FastAPI's routes
            await errors.response(error, state)(scope, receive, send_decorated)
        except ClientDisconnected:
            status = _CLIENT_GONE
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            if status or not getattr(scope["app"].state, "stopping", False):
                raise
            await errors.response(errors.stopping(), state)(scope, receive, send_decorated)
        except Exception:  # the outermost layer: whatever broke gets our own error body, and the log all of it
            log.exception("request.failed", request_id=request_id)
            if status:
                raise  # too late for another answer: the server cuts the connection
            await errors.response(errors.internal(), state)(scope, receive, send_decorated)
        finally:
            self._record(scope, method, status, time.perf_counter() - started)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        """Observe the request, and write its log line if it is one of the API."""
        path, state = scope["path"], scope["state"]
        endpoint = self._endpoint or getattr(scope.get("route"), "path", "unknown")
        known_method = method if method in METHODS else "other"
        metrics.request_latency(known_method, endpoint, status).observe(seconds)
        state["outcome"] = (known_method, endpoint, status)
        if path.startswith("/v1"):
            log.info(
                "request.handled",
                request_id=state["request_id"],
                method=method,
                path=quote(path[:MAX_LOGGED], errors="replace")[:MAX_LOGGED],
                status=status,
                duration_ms=round(seconds * 1000, 1),
                **_told(state),
            )

    def _standing(self, scope: Scope, given: Fields) -> Standing | None:
        """Identify the caller, and count the request against the rate limit, if there is one for it."""
        if not self._limited:
            return None
        context: Context = scope["app"].state.context
        caller = scope["state"]["caller"] = context.auth.identify(scope["headers"], given)
        if context.limits is None or scope["path"] in _OPERATIONS:
            return None
        if caller.has_known_token:
            return context.limits.students.hit(caller.token_hash + student_as_sent(given))
        return context.limits.addresses.hit(context.client_address(scope))


def _describe(span: "Span", state: Mapping[str, Any]) -> None:
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
        tracing.failed(span, state.get("code", str(status)))


def _told(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the log also says of a request: who or what it was about, as far as the route came, and the code of its
    error."""
    fields = {name: value[:MAX_LOGGED] for name, value in state.get("ids", {}).items()}
    if "code" in state:
        fields["code"] = state["code"]
    return fields


def _refuse_early(scope: Scope, standing: Standing | None) -> None:
    """Raise ApiError for a request that no route may see."""
    # A path has one spelling. A proxy that compares paths byte by byte would not recognise `/v1/%61dmin` as an
    # admin route, while routing, limits and logs here would.
    raw_path = scope.get("raw_path") or b""
    if b"%" in raw_path and _NEEDLESSLY_ENCODED.search(raw_path):
        message = "Write letters, digits, '-', '.', '_', '~' and '/' in the path as they are, not percent-encoded."
        raise ApiError("NOT_FOUND", message)
    # Both ports lead to this application, so it keeps the routes for the platform and all others apart.
    ops_port = scope["app"].state.context.settings.ops_port
    if ops_port is not None and (scope["server"][1] == ops_port) != (scope["path"] in _OPERATIONS):
        raise errors.not_on_this_port(scope["path"])
    if standing is not None and standing.over:
        raise exceeded(standing, known_token=scope["state"]["caller"].has_known_token)


def _standing_headers(standing: Standing) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit", b"%d" % standing.limit),
        (b"x-ratelimit-remaining", b"%d" % standing.remaining),
        (b"x-ratelimit-reset", b"%d" % standing.reset),
    ]


def _request_id(given: bytes) -> str:
    return given.decode("ascii") if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


async def _limited(given: Mapping[bytes, bytes], receive: Receive) -> Receive:
    """Refuses a body by its announced length. One that announces none is read here up to the limit: most routes
    never look at theirs."""
    announced = given.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > MAX_BODY:
        raise _too_large()
    if b"transfer-encoding" not in given:
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
    return ApiError("PAYLOAD_TOO_LARGE", f"The body is larger than {MAX_BODY} bytes. No route here needs one.")
