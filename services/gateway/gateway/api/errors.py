"""Error responses of the API: one body for every code of the table in error_table.py."""

from collections.abc import Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from gateway.api.error_table import ERRORS
from sandbox_broker.contract.replies import Parameters, Refused

MAX_QUOTED = 200
"""Longest part of a path in a message, in characters."""


class ApiError(Exception):
    """Error that the gateway turns into the response of its code. Any code below a route may raise it."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        parameters: Parameters | None = None,
        fields: Sequence[Mapping[str, str]] | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Without a `message` the table words the `parameters`. `retry_after` (seconds) replaces its value."""
        self.code = code
        self.message = message or ERRORS[code].word(parameters or {})
        super().__init__(self.message)
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
    if refusal.parameters is None:  # an older sender states the facts in the message
        return ApiError(refusal.code, refusal.message)
    return ApiError(refusal.code, parameters=refusal.parameters)


def internal_error() -> ApiError:
    return ApiError("INTERNAL_ERROR")


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
