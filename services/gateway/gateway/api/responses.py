"""Error responses in the OpenAPI document, and the descriptions of headers."""

from typing import Any

from pydantic import BaseModel, Field

from gateway.api.error_table import ERRORS
from gateway.api.schemas.access import AccessPending
from gateway.api.schemas.actions import JobRunning
from gateway.api.schemas.track import Waiting


class FieldProblem(BaseModel):
    field: str = Field(examples=["limit"])
    problem: str = Field(examples=["Input should be less than or equal to 500"])


class ErrorDetail(BaseModel):
    code: str = Field(examples=["POOL_EXHAUSTED"])
    message: str = Field(examples=["No available sandboxes in pool"], description="the fact, then the action")
    request_id: str = Field(examples=["5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11"])
    retry_after: int | None = Field(default=None, examples=[30], description="seconds")
    fields: list[FieldProblem] | None = None


class Error(BaseModel):
    detail: ErrorDetail


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route for its OpenAPI entry, by status."""
    entries: dict[int | str, dict[str, Any]] = {}
    for code in dict.fromkeys(codes):
        spec = ERRORS[code]
        entry = entries.setdefault(
            spec.status,
            {
                "model": Error,
                "description": "",
                "headers": {},
                "content": {"application/json": {"examples": {}}},
            },
        )
        entry["description"] = f"{entry['description']}\n\n`{code}`: {spec.meaning}. {spec.advice}".lstrip()
        entry["content"]["application/json"]["examples"][code] = {"summary": spec.meaning, "value": _example(code)}
        if spec.retry_after is not None:
            entry["headers"]["Retry-After"] = describe_header("seconds until a retry can succeed", "integer")
        if code == "UNAUTHORIZED":
            entry["headers"]["WWW-Authenticate"] = describe_header("always `Bearer`")
    return entries | {"default": {"model": Error, "description": "Any other error has the same body."}}


def _example(code: str) -> dict[str, Any]:
    detail = ErrorDetail(
        code=code,
        message=f"{ERRORS[code].meaning}.",
        request_id="5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11",
        retry_after=ERRORS[code].retry_after,
        fields=[FieldProblem(field="limit", problem="Input should be less than or equal to 500")]
        if code == "INVALID_REQUEST"
        else None,
    )
    return Error(detail=detail).model_dump(exclude_none=True)


STUDENT_WAITING: dict[str, Any] = {
    "model": Waiting,
    "description": "No sandbox is available, and the student waits in line (`Prefer: respond-async`). Repeat the "
    "same request after `retry_after` seconds. Each repetition keeps the place.",
    "headers": {
        "Retry-After": {"description": "seconds until the next request", "schema": {"type": "integer"}},
        "Preference-Applied": {"description": "`respond-async`", "schema": {"type": "string"}},
    },
}

ACCESS_PENDING: dict[str, Any] = {
    "model": AccessPending,
    "description": "The broker is creating the login. Repeat the request after `retry_after` seconds.",
    "headers": {"Retry-After": {"description": "seconds until the next request", "schema": {"type": "integer"}}},
}

JOB_RUNNING: dict[str, Any] = {
    "model": JobRunning,
    "description": "The job is still running. Get its state from the path in `Location`.",
    "headers": {"Location": {"description": "path of the job", "schema": {"type": "string"}}},
}


def describe_header(description: str, type_: str = "string") -> dict[str, Any]:
    """Return the OpenAPI entry of a response header."""
    return {"description": description, "schema": {"type": type_}}
