"""HTTP client of CSP: one attempt per call, bounded in time and size, and the errors of an unusable answer.

    CspError                 base; `status` is the HTTP status, None if there was no answer
    ├── CspUnavailable       no usable answer, another try can help; `retry_after` in seconds or None:
    │                        time-out, lost connection, 429, 5xx, any status not known here,
    │                        an HTML page, a listing that is not JSON or has no results,
    │                        a body over its bound, or one that cannot be decoded
    └── CspUnauthorized      401 or 403: token, password or JWT are wrong, and trying again cannot help

Messages are one line, bounded, and never hold a token, a password or a JWT.
"""

import asyncio
import functools
import re
import ssl
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
from prometheus_client import Histogram

from sandbox_broker.observability import tracing

MAX_EXCERPT = 200

_MIB = 1024 * 1024
MAX_BODY_BYTES: Mapping[str, int] = {
    # 100,000 accounts take 23 MiB (239 bytes a record, as CSP documents it), so records may be 2.8 times as long.
    # Parsing 64 MiB takes 300 MiB more, which fits the memory limit of the csp-syncer (512 MiB, deploy/k8s).
    "list_accounts": 64 * _MIB,
    "list_services": 4 * _MIB,
    "delete_account": _MIB,
    "sign_in": _MIB,
    "account_switch": _MIB,
    "current_user": _MIB,
    "delete_service": _MIB,
}
"""Bound of an answer's body by operation, in decoded bytes. An answer over it is CspUnavailable."""
MAX_RETRY_AFTER_SEC = 86_400.0

# Surrogates come from broken JSON escapes; neither they nor NUL can be stored in the database.
UNSTORABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
EXTERNAL_ID = re.compile(_UUID)
ACCOUNT_ID = re.compile(f"identity/accounts/({_UUID})")

LATENCY = Histogram(
    "broker_csp_request_seconds",
    "Calls of CSP by operation and outcome: ok, not_found, unauthorized, throttled, server_error, html, other, "
    "timeout, unreachable",
    ["operation", "outcome"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60),
)

_JWT = re.compile(r"eyJ[\w-]+\.[\w.-]+")


class CspError(Exception):
    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class CspUnavailable(CspError):
    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class CspUnauthorized(CspError):
    pass


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The authorities that may vouch for CSP. They take 30 ms to read, once a process."""
    return httpx.create_ssl_context()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def is_html(self) -> bool:
        """Whether a proxy wrote it, whatever the status says: CSP speaks JSON."""
        declared = self.headers.get("Content-Type", "").lower().startswith("text/html")
        return declared or self.body[:MAX_EXCERPT].lstrip().startswith(b"<")


class CspHttp:
    """Makes one attempt per call, follows no redirect and keeps no cookie."""

    def __init__(
        self,
        base_url: str,
        *,
        secrets: tuple[str, ...],
        headers: Mapping[str, str] | None = None,
        timeout_sec: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`secrets` are what no message may hold, `headers` go with every call, `transport` takes the place
        of the network."""
        self._secrets = secrets
        self._timeout_sec = timeout_sec
        self._http = httpx.AsyncClient(
            base_url=base_url,
            # gzip alone, because _read_body decodes no other encoding.
            headers={"Accept": "application/json", "Accept-Encoding": "gzip", **(headers or {})},
            # A cookie would tie calls together that have nothing to do with each other.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=timeout_sec,
            follow_redirects=False,
            transport=transport,
            verify=_trusted(),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        operation: str,
        what: str,
        json: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> Answer:
        """Make one call, `operation` in metrics and `what` in messages, until `deadline` on the loop's clock (by
        default `timeout_sec` from now), from connecting to the last byte of the answer.

        `operation` must be a key of MAX_BODY_BYTES. Raises CspUnavailable without an answer, and for a body that is
        over its bound or cannot be decoded. httpcore bounds the head of an answer to 100 KiB.
        """
        now = asyncio.get_running_loop().time()
        if deadline is None:
            deadline = now + self._timeout_sec
        if now >= deadline:
            raise CspUnavailable(f"no time was left for {what}")
        began, outcome = time.monotonic(), "other"
        try:
            with tracing.within(f"CSP {operation}", "client", attributes={"http.request.method": method}) as span:
                # httpx's own limits are for each read: an answer that drips in would never end.
                async with (
                    asyncio.timeout_at(deadline),
                    self._http.stream(method, path, json=json, headers=headers) as response,
                ):
                    body = await self._read_body(response, what, MAX_BODY_BYTES[operation])
                    answer = Answer(response.status_code, response.headers, body)
                outcome = _outcome(answer)
                if span is not None:
                    span.set_attributes({"http.response.status_code": answer.status, "broker.outcome": outcome})
                return answer
        except (TimeoutError, httpx.TimeoutException) as error:
            outcome = "timeout"
            raise CspUnavailable(f"CSP gave no answer to {what} within {self._timeout_sec:g} s") from error
        except httpx.HTTPError as error:
            outcome = "unreachable"
            reason = self.line(f"{type(error).__name__} {error}")
            raise CspUnavailable(f"{what} did not get through to CSP: {reason}") from error
        finally:
            LATENCY.labels(operation, outcome).observe(time.monotonic() - began)

    async def _read_body(self, response: httpx.Response, what: str, max_bytes: int) -> bytes:
        """Return the decoded body. Raises CspUnavailable past `max_bytes`, and if it cannot be decoded."""
        encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if encoding in ("gzip", "x-gzip") else None
        # One buffer, because the parts of a body that arrives byte by byte would take 40 times its size.
        body = bytearray()
        # httpx's own decoders decode a network chunk as a whole, and 64 KiB of gzip can hold 64 MiB.
        async for chunk in response.aiter_raw():
            if unzip is not None:
                try:
                    body += unzip.decompress(chunk, max_bytes + 1 - len(body))
                except zlib.error:
                    raise _unusable(response, what, "a body that is not valid gzip") from None
                if unzip.unused_data:
                    raise _unusable(response, what, "data after the end of its gzip body")
            elif encoding == "identity":
                body += chunk
            else:
                raise _unusable(response, what, f"a body in the encoding {self.line(encoding)}; gzip was offered")
            if len(body) > max_bytes:
                raise _unusable(response, what, f"more than {max_bytes} bytes")
        return bytes(body)

    def failure(self, answer: Answer, *, what: str, quote: bool = True, hide: str = "") -> CspError:
        """The error that an answer of no use stands for; `quote` shows the beginning of its body, except
        what is to `hide`."""
        message = f"CSP answered {what} with {answer.status}"
        if quote:
            message += f": {self.line(answer.body[: 100 * MAX_EXCERPT].decode(errors='replace'), hide)}"
        if answer.status in (401, 403):
            return CspUnauthorized(message, answer.status)
        return CspUnavailable(message, answer.status, _retry_after(answer.headers.get("Retry-After")))

    def line(self, text: str, hide: str = "") -> str:
        """What may be shown of a text, as one line."""
        # The secrets go first: cutting could leave a part of them that no longer matches.
        for secret in filter(None, (*self._secrets, hide)):
            text = text.replace(secret, "***")
        clean = _JWT.sub("***", text)[: 10 * MAX_EXCERPT]
        line = " ".join(UNSTORABLE.sub(" ", clean).split())
        return line if len(line) <= MAX_EXCERPT else f"{line[:MAX_EXCERPT]}…"


def _outcome(answer: Answer) -> str:
    if answer.is_html:
        return "html"
    status = answer.status
    if status in (401, 403):
        return "unauthorized"
    if status >= 500:
        return "server_error"
    return {200: "ok", 201: "ok", 202: "ok", 204: "ok", 404: "not_found", 429: "throttled"}.get(status, "other")


def _unusable(response: httpx.Response, what: str, found: str) -> CspUnavailable:
    retry_after = _retry_after(response.headers.get("Retry-After"))
    return CspUnavailable(f"CSP answered {what} with {found}", response.status_code, retry_after)


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait: the header is either that or an HTTP date; None if it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
            seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    # Written so that "nan" and negative numbers come out as 0.
    return min(seconds, MAX_RETRY_AFTER_SEC) if seconds > 0 else 0.0
