"""The bodies of the API, as the OpenAPI document shows them."""

import uuid
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, Field

from gateway.errors import KINDS
from sandbox_broker.messages import JobKind, JobState, SandboxStatus


class Lease(BaseModel):
    sandbox_id: str = Field(examples=["2012224"], description="CSP's csp_id, as text")
    name: str = Field(examples=["sandbox-1"])
    external_id: str = Field(
        examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"], description="the account's UUID in CSP"
    )
    allocated_at: int = Field(examples=[1728054123], description="Unix seconds")
    expires_at: int = Field(examples=[1728068523], description="Unix seconds")
    sfdc_account_id: str | None


class Release(BaseModel):
    sandbox_id: str
    status: SandboxStatus
    deletion_requested_at: int = Field(description="Unix seconds")


class Sandbox(BaseModel):
    sandbox_id: str
    name: str
    external_id: str
    status: SandboxStatus
    allocated_to_track: str = Field(description="the student's id (the field has its old name)")
    allocated_at: int = Field(description="Unix seconds")
    expires_at: int = Field(description="Unix seconds")
    track_name: str | None
    sfdc_account_id: str | None


class Stats(BaseModel):
    total: int
    available: int
    allocated: int
    pending_deletion: int
    deletion_failed: int
    stale: int
    deleted: int
    missing: int = Field(description="of the allocated: CSP no longer lists them, and a student has them still")


class Sync(BaseModel):
    status: Literal["completed"] = "completed"
    synced: int = Field(description="active sandbox accounts in CSP")
    marked_stale: int
    restored: int
    duration_ms: int


class AppliedSync(BaseModel):
    listing_id: int
    begun_at: int = Field(description="Unix seconds")
    applied_at: int = Field(description="Unix seconds")
    synced: int = Field(description="active sandbox accounts in CSP")
    discovered: int
    restored: int
    marked_stale: int
    reopened: int = Field(description="CSP had deleted them and still lists them: they are deleted again")
    leaked: int = Field(default=0, description="listed by CSP, and not in the pool")


class SandboxName(BaseModel):
    sandbox_id: str
    name: str


class Change(BaseModel):
    count: int
    examples: list[SandboxName] = Field(description="20 at most")


class HeldSync(BaseModel):
    listing_id: int
    begun_at: int = Field(description="Unix seconds")
    held_at: int = Field(description="Unix seconds")
    reason: str
    stale: Change = Field(description="available ones that it lacks")
    missing: Change = Field(description="allocated ones that it lacks: they would be flagged")
    moved: Change = Field(description="those that have another account in it")
    discovered: Change
    restored: Change


class SyncState(BaseModel):
    applied: AppliedSync | None = Field(description="the last listing that was applied")
    held: HeldSync | None = Field(description="the newest listing, while it is held: what it would change")


class Leak(BaseModel):
    sandbox_id: str
    external_id: str
    name: str
    kind: Literal["unknown", "deleted", "missing"] = Field(
        description="`unknown` and `deleted`: in CSP, but not known or deleted here; "
        "`missing`: held by a student, but gone from CSP"
    )
    since: int | None = Field(description="Unix seconds; null where it is unknown")


class Leaks(BaseModel):
    leaks: list[Leak]
    count: int = Field(description="on this page")
    cursor: str | None = Field(description="for the next page; null on the last")
    listed_at: int | None = Field(description="Unix seconds: the listing compared with; null before the first")


class Purge(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: int
    duration_ms: int


class Cleanup(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: int
    failed: int = Field(description="attempts; they are repeated later, by themselves")
    duration_ms: int


class Job(BaseModel):
    job_id: uuid.UUID
    kind: JobKind
    state: JobState = Field(description="`held`: a sync that waits for an administrator to force it")
    progress: dict[str, int]
    result: dict[str, int | str] | None = Field(description="once it is no longer `running`")
    started_at: int = Field(description="Unix seconds")
    updated_at: int = Field(description="Unix seconds")


class JobRunning(BaseModel):
    """The answer to whoever started a job that takes longer than they are kept waiting."""

    status: Literal["running"] = "running"
    job_id: uuid.UUID
    job_url: str = Field(examples=["/v1/admin/jobs/af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])


class FieldProblem(BaseModel):
    field: str
    problem: str


class ErrorDetail(BaseModel):
    code: str
    message: str
    request_id: str
    retry_after: int | None = Field(default=None, description="seconds")
    fields: list[FieldProblem] | None = None


class Error(BaseModel):
    detail: ErrorDetail


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """What a route may answer besides success, for its OpenAPI entry."""
    entries: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = KINDS[code]
        entry = entries.setdefault(
            kind.status,
            {
                "model": Error,
                "description": "",
                "headers": {},
                "content": {"application/json": {"examples": {}}},
            },
        )
        entry["description"] = f"{entry['description']}\n\n`{code}`: {kind.meaning}. {kind.advice}".lstrip()
        entry["content"]["application/json"]["examples"][code] = {"summary": kind.meaning, "value": _example(code)}
        if kind.retry_after is not None:
            entry["headers"]["Retry-After"] = header("seconds until trying again can help", "integer")
        if kind.status == HTTPStatus.UNAUTHORIZED:
            entry["headers"]["WWW-Authenticate"] = header("always `Bearer`")
    return entries | {"default": {"model": Error, "description": "Any other error has the same body."}}


def _example(code: str) -> dict[str, Any]:
    detail = ErrorDetail(
        code=code,
        message=f"{KINDS[code].meaning}.",
        request_id="5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11",
        retry_after=KINDS[code].retry_after,
        fields=[FieldProblem(field="limit", problem="Input should be less than or equal to 500")]
        if code == "INVALID_REQUEST"
        else None,
    )
    return Error(detail=detail).model_dump(exclude_none=True)


JOB_RUNNING: dict[str, Any] = {
    "model": JobRunning,
    "description": "It takes longer; ask after it at `Location`",
    "headers": {"Location": {"description": "the path of the job", "schema": {"type": "string"}}},
}


def header(description: str, kind: str = "string") -> dict[str, Any]:
    """A response header's OpenAPI entry."""
    return {"description": description, "schema": {"type": kind}}
