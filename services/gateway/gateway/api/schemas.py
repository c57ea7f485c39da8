"""The bodies of the API, as the OpenAPI document shows them."""

import uuid
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from gateway.api.errors import KINDS
from sandbox_broker.contract.types import JobKind, JobState, SandboxStatus

SandboxId = Annotated[str, Field(examples=["2012224"], description="CSP's csp_id, as text")]
Name = Annotated[str, Field(examples=["sandbox-1"])]
ExternalId = Annotated[
    str, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"], description="the account's UUID in CSP")
]
SfdcAccount = Annotated[str | None, Field(examples=["0014X00002nYyZ0QAK", None])]
TrackName = Annotated[str | None, Field(examples=["dns-basics", None], description="the lab")]
UnixSeconds = Annotated[int, Field(examples=[1728054123], description="Unix seconds")]
Milliseconds = Annotated[int, Field(examples=[1250])]
Count = Annotated[int, Field(examples=[12])]
MaybeCount = Annotated[int | None, Field(examples=[12, None])]
Holder = Annotated[str, Field(examples=["inst-student-1-abc"])]
MaybeSeconds = Annotated[int | None, Field(examples=[1728054123, None])]
EndReason = Annotated[
    Literal["student", "expired", "admin"] | None,
    Field(examples=["student", None], description="why the lease ended"),
]
Cursor = Annotated[
    str | None,
    Field(
        examples=["2vYx8hZk3nRbMjAxMjIyNCJd", None],
        description="for the next page; null on the last. A page may hold less than `limit` and have one",
    ),
]
ListingId = Annotated[int, Field(examples=[4711])]
JobId = Annotated[uuid.UUID, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])]


class Lease(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    sfdc_account_id: SfdcAccount


class Release(BaseModel):
    sandbox_id: SandboxId
    status: SandboxStatus
    deletion_requested_at: UnixSeconds


class Sandbox(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    status: SandboxStatus
    allocated_to_track: Holder = Field(description="the student's id (the field has its old name)")
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    track_name: TrackName
    sfdc_account_id: SfdcAccount


class Stats(BaseModel):
    total: Count
    available: Count
    allocated: Count
    pending_deletion: Count
    deletion_failed: Count
    stale: Count
    deleted: Count
    missing: Count = Field(description="of the allocated: CSP no longer lists them, and a student has them still")


class StatsGroup(BaseModel):
    value: str = Field(examples=["dns-basics"], description="the track, or what the names have before their number")
    total: Count
    available: Count
    allocated: Count
    pending_deletion: Count
    deletion_failed: Count
    stale: Count
    deleted: Count


class GroupedStats(Stats):
    by: Literal["track_name", "name_prefix"]
    groups: list[StatsGroup] = Field(
        description="by value; a sandbox that was never leased, or without a track, is in no track's group"
    )
    cursor: Cursor


class SandboxSummary(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    sfdc_account_id: SfdcAccount
    status: SandboxStatus
    status_since: UnixSeconds
    missing_since: MaybeSeconds = Field(description="a student holds it, and CSP no longer lists it")
    holder: Holder | None = Field(description="the student who has or had it")
    track_name: TrackName
    allocated_at: MaybeSeconds
    expires_at: MaybeSeconds
    deletion_requested_at: MaybeSeconds
    deletion_attempts: Count
    deletion_error: str | None = Field(examples=["CSP answered 500", None], description="of the last attempt")


class SandboxPage(BaseModel):
    sandboxes: list[SandboxSummary]
    count: Count = Field(description="on this page")
    cursor: Cursor


Actor = Literal["csp", "student", "administrator", "broker"]


class Transition(BaseModel):
    at: UnixSeconds
    event: str = Field(examples=["sandbox.allocated"])
    status: SandboxStatus = Field(description="the state that it came to")
    by: Actor = Field(description="who caused it")
    reason: str | None = Field(examples=["expired", None])
    holder: Holder | None
    track_name: TrackName
    error: str | None = Field(examples=["CSP answered 500", None])
    request_id: str | None = Field(
        examples=["5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11", None],
        description="of the request that asked for the deletion; the logs tell the rest of its story",
    )


class SandboxStory(SandboxSummary):
    deletion_reason: Literal["student", "expired", "admin"] | None
    deletion_due_at: MaybeSeconds = Field(description="not tried before")
    deleted_at: MaybeSeconds
    services_error: str | None = Field(
        examples=[None], description="what went wrong with the services inside it, before its deletion"
    )
    idempotency_key: str | None = Field(examples=[None], description="that it was allocated with")
    ended_at: MaybeSeconds = Field(description="the lease")
    end_reason: EndReason
    end_note: str | None = Field(
        examples=["student left", None], description="what the administrator gave as a reason"
    )
    history: list[Transition] = Field(description="the oldest first; of very many the newest 500")


class Allocation(BaseModel):
    lease_id: Annotated[int, Field(examples=[815])]
    sandbox_id: SandboxId
    name: str | None = Field(examples=["sandbox-1"], description="null once the sandbox's record has been purged")
    external_id: str | None = Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"], description="likewise")
    holder: Holder
    track_name: TrackName
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    ended_at: MaybeSeconds = Field(description="null while it lasts")
    duration_sec: Annotated[int, Field(examples=[5400], description="until now, while it lasts")]
    end_reason: EndReason
    end_note: str | None = Field(
        examples=["student left", None], description="what the administrator gave as a reason"
    )


class Allocations(BaseModel):
    allocations: list[Allocation]
    count: Count = Field(description="on this page")
    cursor: Cursor


class Sync(BaseModel):
    status: Literal["completed"] = "completed"
    synced: Count = Field(description="active sandbox accounts in CSP")
    marked_stale: Count
    restored: Count
    duration_ms: Milliseconds


class AppliedSync(BaseModel):
    listing_id: ListingId
    begun_at: UnixSeconds
    applied_at: UnixSeconds
    synced: Count = Field(description="active sandbox accounts in CSP")
    discovered: Count
    restored: Count
    marked_stale: Count
    reopened: Count = Field(description="CSP had deleted them and still lists them: they are deleted again")
    leaked: Count = Field(default=0, description="listed by CSP, and not in the pool")


class SandboxName(BaseModel):
    sandbox_id: SandboxId
    name: Name


class Change(BaseModel):
    count: Count
    examples: list[SandboxName] = Field(description="20 at most")


class HeldSync(BaseModel):
    listing_id: ListingId
    begun_at: UnixSeconds
    held_at: UnixSeconds
    reason: str = Field(examples=["The listing is empty."])
    stale: Change = Field(description="available ones that it lacks")
    missing: Change = Field(description="allocated ones that it lacks: they would be flagged")
    moved: Change = Field(description="those that have another account in it")
    discovered: Change
    restored: Change


class SyncState(BaseModel):
    applied: AppliedSync | None = Field(description="the last listing that was applied")
    held: HeldSync | None = Field(description="the newest listing, while it is held: what it would change")


class Leak(BaseModel):
    sandbox_id: SandboxId
    external_id: ExternalId
    name: Name
    kind: Literal["unknown", "deleted", "missing"] = Field(
        description="`unknown` and `deleted`: in CSP, but not known or deleted here; "
        "`missing`: held by a student, but gone from CSP"
    )
    since: int | None = Field(examples=[1728054123, None], description="Unix seconds; null where it is unknown")


class Leaks(BaseModel):
    leaks: list[Leak]
    count: Count = Field(description="on this page")
    cursor: Cursor
    listed_at: int | None = Field(
        examples=[1728054123, None], description="Unix seconds: the listing compared with; null before the first"
    )


DeadLetterId = Annotated[uuid.UUID, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])]
QueueName = Annotated[str, Field(examples=["allocator.commands"])]


class DeadLetterSummary(BaseModel):
    dead_letter_id: DeadLetterId
    died_at: UnixSeconds
    service: str = Field(examples=["allocator"], description="which could not process it")
    queue: QueueName = Field(description="that it died in")
    reason: str = Field(examples=["It is no envelope of commands: Invalid JSON"])
    commands: list[str] = Field(
        examples=[["ReleaseSandbox"]], description="their types, as far as they can be read"
    )
    size: Annotated[int, Field(examples=[212], description="bytes")]


class DeadLetterPage(BaseModel):
    dead_letters: list[DeadLetterSummary]
    count: Count = Field(description="on this page")
    cursor: Cursor


class DeadLetter(DeadLetterSummary):
    message_id: str | None = Field(examples=["1c8d6f0c7f4b4e9d8a55e0a4d1c7b9aa", None])
    correlation_id: str | None = Field(examples=["f3a94f5be9c1466c8c9c34a5a3b7f0d2", None])
    content_type: str | None = Field(examples=["application/json", None])
    payload: str = Field(
        examples=['{"commands":[{"type":"ReleaseSandbox"}]}'],
        description="of what is larger than 64 KiB the beginning",
    )
    encoding: Literal["utf-8", "base64"] = Field(description="of `payload`")


class DeadLetterReplayed(BaseModel):
    status: Literal["replayed"] = "replayed"
    dead_letter_id: DeadLetterId
    queue: QueueName
    published: bool = Field(examples=[True], description="false: nothing was left of it")
    skipped: Count = Field(description="allocations left out, because their students have had a sandbox since")


class DeadLetterDropped(BaseModel):
    status: Literal["dropped"] = "dropped"
    dead_letter_id: DeadLetterId


class QueueStatus(BaseModel):
    queue: QueueName
    messages: MaybeCount = Field(description="that wait; null while RabbitMQ does not answer about this queue")
    consumers: MaybeCount = Field(description="those that stand by included; null as above")
    problem: str | None = Field(
        examples=[None, "no answer in 0.3 s"], description="null if RabbitMQ answers about this queue"
    )


ServiceState = Literal["up", "partly", "down", "unknown"]


class ServiceStatus(BaseModel):
    service: str = Field(examples=["reaper"])
    state: ServiceState = Field(
        description="by the consumers of its queues; `partly`: some of them have none; `unknown`: RabbitMQ is "
        "down, or does not answer about any of its queues"
    )


class PartStatus(BaseModel):
    state: Literal["up", "down"]
    problem: str | None = Field(examples=[None, "no answer in 0.3 s"])


class CspStatus(BaseModel):
    """What our records tell of CSP; it is not asked."""

    listed_at: MaybeSeconds = Field(description="the listing that was applied last was begun then")
    unfinished_since: MaybeSeconds = Field(
        description="a newer one was begun then and is not there yet: it is being fetched, or CSP did not answer"
    )
    held: bool = Field(
        examples=[False], description="the newest one waits for an administrator: GET /v1/admin/sync"
    )
    pending_since: MaybeSeconds = Field(description="the oldest pending deletion was asked for then")
    failing: Count = Field(description="pending deletions that have failed at least once")
    error: str | None = Field(examples=["CSP answered 500", None], description="of the newest such failure")


class Status(BaseModel):
    checked_at: UnixSeconds
    rabbitmq: PartStatus
    database: PartStatus
    services: list[ServiceStatus]
    queues: list[QueueStatus] | None = Field(description="null while RabbitMQ does not answer")
    pool: Stats | None = Field(description="null while the database does not answer, like all below")
    csp: CspStatus | None
    dead_letters: Count | None


class Purge(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: Count
    duration_ms: Milliseconds


class Cleanup(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: Count
    failed: Count = Field(description="attempts; they are repeated later, by themselves")
    duration_ms: Milliseconds


class Job(BaseModel):
    job_id: JobId
    kind: JobKind
    state: JobState = Field(description="`held`: a sync that waits for an administrator to force it")
    progress: dict[str, int] = Field(examples=[{"deleted": 12, "failed": 0}])
    result: dict[str, int | str] | None = Field(
        examples=[None, {"deleted": 40, "failed": 0}], description="once it is no longer `running`"
    )
    started_at: UnixSeconds
    updated_at: UnixSeconds


class JobRunning(BaseModel):
    """The answer to whoever started a job that takes longer than they are kept waiting."""

    status: Literal["running"] = "running"
    job_id: JobId
    job_url: str = Field(examples=["/v1/admin/jobs/af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])


class FieldProblem(BaseModel):
    field: str = Field(examples=["limit"])
    problem: str = Field(examples=["Input should be less than or equal to 500"])


class ErrorDetail(BaseModel):
    code: str = Field(examples=["POOL_EXHAUSTED"])
    message: str = Field(examples=["No available sandboxes in pool"], description="what to do next")
    request_id: str = Field(examples=["5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11"])
    retry_after: int | None = Field(default=None, examples=[30], description="seconds")
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
