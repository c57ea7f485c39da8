"""Errors of the API: one table from code to HTTP status, one response body for all.

docs/errors.md and the OpenAPI document are generated from the table.

A message states the fact, then the action. An error that a retry can resolve carries `retry_after`, in the body and
in the `Retry-After` header.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from sandbox_broker.contract.replies import Refused
from sandbox_broker.observability import health


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    status: int
    """HTTP status."""
    meaning: str
    """The fact, without a full stop."""
    advice: str
    """The action for the caller."""
    retry_after: int | None = None
    """Seconds."""


MAX_QUOTED = 200
"""Longest part of a path in a message, in characters."""

RETRY_LATER = "Try again after `retry_after` seconds."
RETRY_SAFELY = "Repeat the request. The result is the same whether or not the first request was carried out."

ERRORS: Mapping[str, ErrorSpec] = {
    "MISSING_SANDBOX_ID": ErrorSpec(
        400,
        "The X-Instruqt-Sandbox-ID header is missing or blank",
        "Send the student's own id (`INSTRUQT_PARTICIPANT_ID`) in this header.",
    ),
    "INVALID_HEADER": ErrorSpec(
        400,
        "A header is too long, contains characters outside printable ASCII, or was sent more than once",
        "Correct the header named in the message. A value has at most 128 characters.",
    ),
    "INVALID_REQUEST": ErrorSpec(400, "A parameter is invalid", "Correct the parameters in `fields`."),
    "INVALID_CURSOR": ErrorSpec(
        400,
        "The cursor is damaged, or belongs to another listing or to other filters",
        "Start again without a cursor, and keep the filters from page to page.",
    ),
    "MALFORMED_REQUEST": ErrorSpec(
        400,
        "The request is not valid HTTP/1.1, or its end is ambiguous; the gateway closes the connection",
        "Correct the client, or the proxy in front of the gateway. A retry fails in the same way.",
    ),
    "UNAUTHORIZED": ErrorSpec(
        401,
        "The token is missing or unknown",
        "Send `Authorization: Bearer <token>`. The operator issues tokens.",
    ),
    "FORBIDDEN": ErrorSpec(
        403, "The token is valid, but the route requires an admin token", "Send an admin token."
    ),
    "NOT_SANDBOX_OWNER": ErrorSpec(
        403,
        "Another student holds or held this sandbox",
        "Send the `X-Instruqt-Sandbox-ID` of the allocation request.",
    ),
    "SANDBOX_NOT_FOUND": ErrorSpec(
        404, "The sandbox does not exist", "Use the `sandbox_id` from the allocation response."
    ),
    "JOB_NOT_FOUND": ErrorSpec(
        404, "The job does not exist", "Use the `job_id` from the response that started the job."
    ),
    "DEAD_LETTER_NOT_FOUND": ErrorSpec(
        404,
        "The dead letter does not exist: it was replayed or dropped, or the id is wrong",
        "Check the id in `GET /v1/admin/dead-letters`. A replayed or dropped dead letter needs no action.",
    ),
    "NOT_FOUND": ErrorSpec(
        404,
        "The path does not exist",
        "Check the path. `/v1/docs` lists all paths, unless the operator disabled it.",
    ),
    "METHOD_NOT_ALLOWED": ErrorSpec(
        405, "The path does not support this method", "Use a method in the `Allow` header."
    ),
    "POOL_EXHAUSTED": ErrorSpec(
        409,
        "No sandbox is available in the pool",
        f"{RETRY_LATER} If the error persists, the operator has to add sandboxes to the pool.",
        retry_after=30,
    ),
    "IDEMPOTENCY_KEY_CONFLICT": ErrorSpec(
        409, "The idempotency key belongs to the lease of another student", "Use a different key for each student."
    ),
    "NOT_ALLOCATED": ErrorSpec(
        409, "The sandbox was never leased, so there is no lease to end", "No action is needed."
    ),
    "NOT_DELETION_FAILED": ErrorSpec(
        409,
        "The status of the sandbox is not `deletion_failed`",
        "No action is needed. The reaper retries pending deletions automatically.",
    ),
    "NOT_REPLAYABLE": ErrorSpec(
        409,
        "The queue of the dead letter does not carry commands, or services repeat its commands automatically",
        "Inspect the dead letter, then drop it.",
    ),
    "SYNC_HELD": ErrorSpec(
        409,
        "The listing looks wrong, so the broker holds the sync and changes nothing",
        "Check `GET /v1/admin/sync`. If the listing is right, repeat the sync with `force=true`.",
    ),
    "LISTING_OUTDATED": ErrorSpec(
        409, "A newer sync was applied first, so this one changed nothing", RETRY_LATER, retry_after=5
    ),
    "CORS_REFUSED": ErrorSpec(
        400,
        "A browser page of another origin sent the request, and its origin, method or header is not allowed",
        "Add the origin to `CORS_ALLOWED_ORIGINS` if its pages may call the API.",
    ),
    "PAYLOAD_TOO_LARGE": ErrorSpec(
        413, "The request body is larger than 64 KiB", "Send no body, because no route requires one."
    ),
    "HEADERS_TOO_LARGE": ErrorSpec(
        431,
        "The request line and the header fields are longer than 16 KiB, or there are more than 100 fields",
        "Send fewer or shorter header fields.",
    ),
    "RATE_LIMITED": ErrorSpec(
        429,
        "Too many requests with this token for one student, or without a known token from this address",
        f"{RETRY_LATER} The current window of the rate limit ends then.",
        retry_after=300,
    ),
    "INTERNAL_ERROR": ErrorSpec(
        500,
        "The broker failed unexpectedly",
        "Try again. If the error persists, send the `request_id` to the operator.",
        retry_after=5,
    ),
    "CSP_UNAVAILABLE": ErrorSpec(502, "CSP is down or sent an unexpected response", RETRY_LATER, retry_after=60),
    "ALLOCATOR_UNAVAILABLE": ErrorSpec(
        503,
        "RabbitMQ or the allocator is down, or too many requests are in flight",
        f"{RETRY_LATER} No data is lost.",
        retry_after=2,
    ),
    "SYNCER_UNAVAILABLE": ErrorSpec(503, "RabbitMQ or the csp-syncer is down", RETRY_LATER, retry_after=5),
    "REAPER_UNAVAILABLE": ErrorSpec(503, "RabbitMQ or the reaper is down", RETRY_LATER, retry_after=5),
    "DATABASE_UNAVAILABLE": ErrorSpec(503, "The database does not respond", RETRY_LATER, retry_after=2),
    "NOT_READY": ErrorSpec(
        503,
        "`/readyz`: this process cannot serve requests; the message gives the cause",
        "Send requests to another replica until the process is ready.",
        retry_after=health.RETRY_AFTER_SEC,
    ),
    "STOPPING": ErrorSpec(
        503,
        "The gateway is stopping and received no reply in time; the request may still succeed",
        RETRY_SAFELY,
        retry_after=1,
    ),
    "ALLOCATION_TIMEOUT": ErrorSpec(
        504, "The allocator did not reply in time; the request may still succeed", RETRY_SAFELY, retry_after=1
    ),
    "RELEASE_TIMEOUT": ErrorSpec(
        504, "The allocator did not reply in time; the request may still succeed", RETRY_SAFELY, retry_after=1
    ),
    "MAINTENANCE_TIMEOUT": ErrorSpec(
        504,
        "The allocator did not reply in time; the request may still succeed",
        "Check whether the change was made. If it was not, repeat the request: no change is made twice.",
        retry_after=5,
    ),
}


class ApiError(Exception):
    """Error that the gateway turns into the response of its code. Any code below a route may raise it."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fields: Sequence[Mapping[str, str]] | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after` (seconds) replaces the value of the table."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = fields
        self.headers = headers or {}
        self.retry_after = retry_after or ERRORS[code].retry_after


def build_response(error: ApiError, state: MutableMapping[str, Any]) -> JSONResponse:
    """Return the response, and keep the code for the log in `state`, the request's state with its id."""
    spec = ERRORS[error.code]
    state["code"] = error.code
    detail: dict[str, Any] = {"code": error.code, "message": error.message, "request_id": state["request_id"]}
    headers = dict(error.headers)
    if error.retry_after is not None:
        detail["retry_after"] = error.retry_after
        headers["Retry-After"] = str(error.retry_after)
    if error.fields:
        detail["fields"] = error.fields
    return JSONResponse({"detail": detail}, spec.status, headers)


def from_refusal(refusal: Refused) -> ApiError:
    """Return the error of a refusal. Raises RuntimeError for a code that is a defect of the broker."""
    if refusal.code not in ERRORS:
        raise RuntimeError(f"unexpected refusal: {refusal!r}")
    return ApiError(refusal.code, refusal.message)


def internal_error() -> ApiError:
    return ApiError(
        "INTERNAL_ERROR",
        "The broker failed unexpectedly. Try again. If the error persists, send this request_id to the operator.",
    )


def stopping_error() -> ApiError:
    return ApiError(
        "STOPPING",
        "This gateway is stopping and received no reply in time. The request may still succeed. Repeat it.",
    )


def not_found(path: str, *, docs_enabled: bool) -> ApiError:
    advice = "/v1/docs lists all paths." if docs_enabled else "Check the path."
    return ApiError("NOT_FOUND", f"{path[:MAX_QUOTED]} does not exist. {advice}")


def not_on_this_port(path: str) -> ApiError:
    return ApiError("NOT_FOUND", f"{path[:MAX_QUOTED]} does not exist on this port. Check the path and the port.")


def from_status(
    status: int, method: str, path: str, headers: Mapping[str, str] | None, *, docs_enabled: bool
) -> ApiError:
    """Return the error for a request that the framework refused: an unknown path or an unsupported method."""
    if status == HTTPStatus.NOT_FOUND:
        return not_found(path, docs_enabled=docs_enabled)
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (headers or {}).get("Allow", "another method")
        return ApiError(
            "METHOD_NOT_ALLOWED",
            f"{path[:MAX_QUOTED]} does not support {method}. Use {allowed}.",
            headers=headers,
        )
    return internal_error()
