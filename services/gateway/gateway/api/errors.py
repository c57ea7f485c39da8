"""Every error the API answers with: one table from code to HTTP status, one body for all.

docs/errors.md and the OpenAPI document are made from the table.

A message says what to do next. `retry_after` is given, in the body and as a header, wherever asking again can
help.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NoReturn

from starlette.responses import JSONResponse

from sandbox_broker.contract.replies import Refused, Reply
from sandbox_broker.observability import health


@dataclass(frozen=True, slots=True)
class Kind:
    status: int
    meaning: str
    advice: str
    """What the caller should do."""
    retry_after: int | None = None
    """Seconds."""


MAX_QUOTED = 200
"""Characters of a path in a message."""

AGAIN = "Try again after `retry_after` seconds."
SAME_AGAIN = "Ask again: it gives the same result, whether or not the first request was carried out."

KINDS: Mapping[str, Kind] = {
    "MISSING_SANDBOX_ID": Kind(
        400,
        "The X-Instruqt-Sandbox-ID header is missing or blank",
        "Send the student's own id (`INSTRUQT_PARTICIPANT_ID`) in it.",
    ),
    "INVALID_HEADER": Kind(
        400,
        "A header is too long, holds characters outside printable ASCII, or came twice",
        "Correct the header that the message names; 128 characters are allowed.",
    ),
    "INVALID_REQUEST": Kind(400, "A parameter is malformed", "Correct the parameters that `fields` names."),
    "INVALID_CURSOR": Kind(
        400,
        "The cursor is not of this listing with these filters",
        "Begin again without a cursor, and keep the filters while you follow those that you are given.",
    ),
    "MALFORMED_REQUEST": Kind(
        400,
        "The request is not valid HTTP/1.1, or its end is ambiguous; the connection closes",
        "Correct the client, or the proxy before the gateway. A repetition gets the same answer.",
    ),
    "UNAUTHORIZED": Kind(
        401, "No token, or an unknown one", "Send `Authorization: Bearer <token>`; ask the operator for a token."
    ),
    "FORBIDDEN": Kind(403, "The token is valid, but not for this route", "Use an admin token on admin routes."),
    "NOT_SANDBOX_OWNER": Kind(
        403,
        "Another student holds or held this sandbox",
        "Send the `X-Instruqt-Sandbox-ID` that it was allocated with.",
    ),
    "SANDBOX_NOT_FOUND": Kind(404, "No such sandbox", "Use the `sandbox_id` that the allocation returned."),
    "JOB_NOT_FOUND": Kind(404, "No such job", "Use the `job_id` that starting it has answered."),
    "DEAD_LETTER_NOT_FOUND": Kind(
        404, "No such dead letter", "Nothing is to be done: it was replayed or dropped, or never was one."
    ),
    "NOT_FOUND": Kind(
        404,
        "No such path",
        "Check the path. `/v1/docs` lists all of them, where the operator has not switched it off.",
    ),
    "METHOD_NOT_ALLOWED": Kind(
        405, "The path exists, but not with this method", "Use the method that the `Allow` header names."
    ),
    "POOL_EXHAUSTED": Kind(
        409,
        "Nothing in the pool is available",
        f"{AGAIN} If it stays, the operator has to provide more sandboxes.",
        retry_after=30,
    ),
    "IDEMPOTENCY_KEY_CONFLICT": Kind(
        409, "The key belongs to another student's lease", "Use a key of your own for each student."
    ),
    "NOT_ALLOCATED": Kind(409, "Nobody ever held this sandbox", "There is no lease to end: nothing is to be done."),
    "NOT_DELETION_FAILED": Kind(
        409, "Its deletion has not failed for good", "Nothing is to be done: it is still tried by itself."
    ),
    "NOT_REPLAYABLE": Kind(
        409,
        "The dead letter names a queue that is not for commands, or holds only commands that services repeat",
        "Look at it, and drop it.",
    ),
    "SYNC_HELD": Kind(
        409,
        "The listing looks wrong, and nothing was changed",
        "Look at `GET /v1/admin/sync`; if the listing is right, repeat with `force=true`.",
    ),
    "LISTING_OUTDATED": Kind(409, "Another sync overtook this one, and nothing was changed", AGAIN, retry_after=5),
    "CORS_REFUSED": Kind(
        400,
        "A page of another origin asks through a browser, and its origin, method or header is not allowed",
        "Add the origin to `CORS_ALLOWED_ORIGINS` if it may ask.",
    ),
    "PAYLOAD_TOO_LARGE": Kind(413, "The request body is larger than 64 KiB", "Send none: no route needs one."),
    "HEADERS_TOO_LARGE": Kind(
        431,
        "The request line and the header fields are longer than 16 KiB, or there are more than 100 fields",
        "Send fewer or shorter header fields.",
    ),
    "RATE_LIMITED": Kind(
        429,
        "Too many requests with this token for one student, or too many without a known token from this address",
        f"{AGAIN} It is what is left of the window.",
        retry_after=300,
    ),
    "INTERNAL_ERROR": Kind(
        500,
        "A fault of ours",
        "Try again; if it stays, tell the operator the `request_id`.",
        retry_after=5,
    ),
    "CSP_UNAVAILABLE": Kind(502, "CSP does not answer as it should", AGAIN, retry_after=60),
    "ALLOCATOR_UNAVAILABLE": Kind(
        503,
        "The queue or the allocator is down, or too many requests are in flight",
        f"{AGAIN} Nothing is lost.",
        retry_after=2,
    ),
    "SYNCER_UNAVAILABLE": Kind(503, "The queue or the csp-syncer is down", AGAIN, retry_after=5),
    "REAPER_UNAVAILABLE": Kind(503, "The queue or the reaper is down", AGAIN, retry_after=5),
    "DATABASE_UNAVAILABLE": Kind(503, "The database does not answer", AGAIN, retry_after=2),
    "NOT_READY": Kind(
        503,
        "`/readyz`: this process cannot work now; the message says why",
        "Send requests to another replica meanwhile.",
        retry_after=health.RETRY_AFTER_SEC,
    ),
    "STOPPING": Kind(
        503,
        "This process stops, and there was no answer in time; the request may still succeed",
        SAME_AGAIN,
        retry_after=1,
    ),
    "ALLOCATION_TIMEOUT": Kind(504, "No answer in time; the request may still succeed", SAME_AGAIN, retry_after=1),
    "RELEASE_TIMEOUT": Kind(504, "No answer in time; the request may still succeed", SAME_AGAIN, retry_after=1),
    "MAINTENANCE_TIMEOUT": Kind(
        504,
        "No answer in time; it may still be done",
        "Look whether it was done, and ask again if not: nothing is done twice.",
        retry_after=5,
    ),
}


class ApiError(Exception):
    """Raised anywhere below a route; becomes the response of its code."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fields: Sequence[Mapping[str, str]] | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after` (seconds) where it is not that of the table."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = fields
        self.headers = headers or {}
        self.retry_after = retry_after or KINDS[code].retry_after


def response(error: ApiError, state: MutableMapping[str, Any]) -> JSONResponse:
    """`state` is that of the request: it has the request's id, and keeps the code for the log."""
    kind = KINDS[error.code]
    state["code"] = error.code
    detail: dict[str, Any] = {"code": error.code, "message": error.message, "request_id": state["request_id"]}
    headers = dict(error.headers)
    if error.retry_after is not None:
        detail["retry_after"] = error.retry_after
        headers["Retry-After"] = str(error.retry_after)
    if error.fields:
        detail["fields"] = error.fields
    return JSONResponse({"detail": detail}, kind.status, headers)


def refuse(reply: Reply) -> NoReturn:
    """Raises the ApiError of a refusal. Any other reply that a route did not expect is a fault of ours."""
    if isinstance(reply, Refused) and reply.code in KINDS:
        raise ApiError(reply.code, reply.message)
    raise RuntimeError(f"unexpected answer: {reply!r}")


def internal() -> ApiError:
    return ApiError(
        "INTERNAL_ERROR",
        "Something went wrong on our side. Try again; if it stays, tell the operator this request_id.",
    )


def stopping() -> ApiError:
    return ApiError(
        "STOPPING", "This gateway stops, and there was no answer in time. The request may still succeed: ask again."
    )


def not_found(path: str, *, docs_enabled: bool) -> ApiError:
    hint = "See /v1/docs for what there is." if docs_enabled else "Check the path."
    return ApiError("NOT_FOUND", f"There is no {path[:MAX_QUOTED]} here. {hint}")


def not_on_this_port(path: str) -> ApiError:
    return ApiError("NOT_FOUND", f"There is no {path[:MAX_QUOTED]} on this port. Check the path and the port.")


def of_status(
    status: int, method: str, path: str, headers: Mapping[str, str] | None, *, docs_enabled: bool
) -> ApiError:
    """What the framework itself refuses: unknown paths and wrong methods."""
    if status == HTTPStatus.NOT_FOUND:
        return not_found(path, docs_enabled=docs_enabled)
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (headers or {}).get("Allow", "another method")
        return ApiError(
            "METHOD_NOT_ALLOWED", f"{path[:MAX_QUOTED]} takes {allowed}, not {method}.", headers=headers
        )
    return internal()
