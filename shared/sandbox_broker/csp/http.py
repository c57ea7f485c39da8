"""HTTP client of CSP: one attempt per call, bounded in time and size, and the errors for unusable answers.

    CspError                 base class; `status` is the HTTP status, None without an answer
    ├── CspUnavailable       no usable answer, a retry can help; `retry_after` in seconds or None:
    │                        time-out, lost connection, 429, 5xx, any unknown status,
    │                        an HTML page, a listing that is not JSON or has no results,
    │                        a body over its bound or with an invalid encoding
    ├── CspUnauthorized      401 or 403: token, password or JWT are wrong, and a retry cannot help
    └── CspRefused           CSP refuses the request itself, for example because a quota or a licence is used up;
                             the message holds CSP's own reason, and a retry needs an operator first

Messages are one line, bounded, and never hold a token, a password or a JWT.
"""

import asyncio
import functools
import json
import re
import ssl
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
from prometheus_client import Histogram

from sandbox_broker.observability import tracing
from sandbox_broker.runtime.proxy import find_proxy

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
    "create_account": _MIB,
    "find_account": 4 * _MIB,
    "list_groups": _MIB,
    "create_user": _MIB,
    "find_user": _MIB,
    "set_password": _MIB,
    "delete_user": _MIB,
}
"""Bound of an answer's body by operation, in decoded bytes. An answer over it is CspUnavailable."""
MAX_RETRY_AFTER_SEC = 86_400.0

# Surrogates come from broken JSON escapes. The database can store neither them nor NUL.
UNSTORABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
EXTERNAL_ID = re.compile(_UUID)
ACCOUNT_ID = re.compile(f"identity/accounts/({_UUID})")

LATENCY = Histogram(
    "broker_csp_request_seconds",
    "Duration of CSP calls by operation and outcome: ok, not_found, unauthorized, refused, throttled, "
    "server_error, html, other, timeout, unreachable",
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


class CspRefused(CspError):
    pass


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Return the TLS context with the trusted authorities. It is cached, because loading takes 30 ms."""
    return httpx.create_ssl_context()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def is_html(self) -> bool:
        """Return whether the answer is an HTML page. Such a page comes from a proxy, because CSP answers with
        JSON."""
        declared = self.headers.get("Content-Type", "").lower().startswith("text/html")
        return declared or self.body[:MAX_EXCERPT].lstrip().startswith(b"<")

    def read_object(self) -> dict[str, Any] | None:
        """Return the body as a JSON object, None if it is not one."""
        try:
            document = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return document if isinstance(document, dict) else None


class CspHttp:
    """HTTP client with one attempt per call. It follows no redirects and stores no cookies."""

    def __init__(
        self,
        base_url: str,
        *,
        secrets: tuple[str, ...],
        headers: Mapping[str, str] | None = None,
        timeout_sec: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`secrets` are hidden in messages, `headers` are sent with every call, `transport` replaces the network in
        tests."""
        self._secrets = secrets
        self._timeout_sec = timeout_sec
        self._http = httpx.AsyncClient(
            base_url=base_url,
            # Only gzip, because _read_body decodes no other encoding.
            headers={"Accept": "application/json", "Accept-Encoding": "gzip", **(headers or {})},
            # No cookies, because they would connect independent calls.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=timeout_sec,
            follow_redirects=False,
            transport=transport,
            verify=_trusted(),
            # Not by httpx, which fails on a network in NO_PROXY.
            trust_env=False,
            proxy=find_proxy(base_url) if transport is None else None,
        )

    @property
    def base_url(self) -> httpx.URL:
        return self._http.base_url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ask(
        self,
        method: str,
        path: httpx.URL | str,
        *,
        operation: str,
        what: str,
        json: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> Answer:
        """Make one call, from connecting to the last byte of the answer, until `deadline` on the loop's clock (by
        default `timeout_sec` from now). `operation` is the label in metrics, `what` the name in messages.

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
            with tracing.child_span(
                f"CSP {operation}", "client", attributes={"http.request.method": method}
            ) as span:
                # httpx limits each read only, so an answer that arrives byte by byte would never end.
                async with (
                    asyncio.timeout_at(deadline),
                    self._http.stream(method, path, json=json, headers=headers) as response,
                ):
                    body = await self._read_body(response, what, MAX_BODY_BYTES[operation])
                    answer = Answer(response.status_code, response.headers, body)
                outcome = _outcome(answer, operation)
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
        # One buffer, because a list of single bytes would take 40 times the size of the body.
        body = bytearray()
        # Not through httpx's decoders: they decode a whole network chunk, and 64 KiB of gzip can hold 64 MiB.
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
        """Return the error for an unusable answer. `quote` adds the start of its body, with `hide` replaced."""
        message = f"CSP answered {what} with {answer.status}"
        if quote:
            message += f": {self.line(answer.body[: 100 * MAX_EXCERPT].decode(errors='replace'), hide)}"
        if answer.status in (401, 403):
            return CspUnauthorized(message, answer.status)
        return CspUnavailable(message, answer.status, _retry_after(answer.headers.get("Retry-After")))

    def line(self, text: str, hide: str = "") -> str:
        """Return the text as one bounded line with all secrets hidden."""
        # Hide secrets before cutting, because a cut secret would no longer match.
        for secret in filter(None, (*self._secrets, hide)):
            text = text.replace(secret, "***")
        clean = _JWT.sub("***", text)[: 10 * MAX_EXCERPT]
        line = " ".join(UNSTORABLE.sub(" ", clean).split())
        return line if len(line) <= MAX_EXCERPT else f"{line[:MAX_EXCERPT]}…"


def _outcome(answer: Answer, operation: str) -> str:
    if answer.is_html:
        return "html"
    status = answer.status
    if status == 403 and operation == "create_account":  # a quota or a licence: client.py raises CspRefused
        return "refused"
    if status in (401, 403):
        return "unauthorized"
    if status >= 500:
        return "server_error"
    return {200: "ok", 201: "ok", 202: "ok", 204: "ok", 404: "not_found", 429: "throttled"}.get(status, "other")


def _unusable(response: httpx.Response, what: str, problem: str) -> CspUnavailable:
    retry_after = _retry_after(response.headers.get("Retry-After"))
    return CspUnavailable(f"CSP answered {what} with {problem}", response.status_code, retry_after)


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or an HTTP date. None if it is invalid."""
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
    # In this form, "nan" and negative numbers give 0.
    return min(seconds, MAX_RETRY_AFTER_SEC) if seconds > 0 else 0.0
