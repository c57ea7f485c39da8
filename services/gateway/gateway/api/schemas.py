"""Request and response bodies of the API, and their descriptions in the OpenAPI document."""

import uuid
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from gateway.api.errors import ERRORS
from sandbox_broker.contract.types import JobKind, JobState, SandboxStatus

SandboxId = Annotated[str, Field(examples=["2012224"], description="the csp_id of CSP, as text")]
Name = Annotated[str, Field(examples=["sandbox-1"])]
ExternalId = Annotated[
    str, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"], description="the UUID of the account in CSP")
]
SfdcAccount = Annotated[str | None, Field(examples=["0014X00002nYyZ0QAK", None])]
TrackName = Annotated[str | None, Field(examples=["dns-basics", None], description="the name of the lab")]
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
        description="the cursor of the next page; null on the last page. A page may have less than `limit` entries",
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
    allocated_to_track: Holder = Field(description="the student's id (the field keeps its old name)")
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
    missing: Count = Field(description="allocated sandboxes that CSP no longer lists; a student still holds them")


class StatsGroup(BaseModel):
    value: str = Field(examples=["dns-basics"], description="the track, or the part of the names before the number")
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
        description="ordered by value; sandboxes that were never leased, or without a track, are in no track group"
    )
    cursor: Cursor


class SandboxSummary(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    sfdc_account_id: SfdcAccount
    status: SandboxStatus
    status_since: UnixSeconds
    missing_since: MaybeSeconds = Field(description="since when CSP no longer lists a sandbox that a student holds")
    holder: Holder | None = Field(description="the id of the student with the current or latest lease")
    track_name: TrackName
    allocated_at: MaybeSeconds
    expires_at: MaybeSeconds
    deletion_requested_at: MaybeSeconds
    deletion_attempts: Count
    deletion_error: str | None = Field(
        examples=["CSP answered 500", None], description="the error of the latest attempt"
    )


class SandboxPage(BaseModel):
    sandboxes: list[SandboxSummary]
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor


Actor = Literal["csp", "student", "administrator", "broker"]


class Transition(BaseModel):
    at: UnixSeconds
    event: str = Field(examples=["sandbox.allocated"])
    status: SandboxStatus = Field(description="the status after the event")
    by: Actor = Field(description="the actor that caused the event")
    reason: str | None = Field(examples=["expired", None])
    holder: Holder | None
    track_name: TrackName
    error: str | None = Field(examples=["CSP answered 500", None])
    request_id: str | None = Field(
        examples=["5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11", None],
        description="the id of the request that caused the deletion, for a search in the logs",
    )


class SandboxStory(SandboxSummary):
    deletion_reason: Literal["student", "expired", "admin"] | None
    deletion_due_at: MaybeSeconds = Field(description="the earliest time of the next deletion attempt")
    deleted_at: MaybeSeconds
    services_error: str | None = Field(
        examples=[None], description="the error of the clean-up of its NIOSXaaS services before its deletion"
    )
    idempotency_key: str | None = Field(examples=[None], description="the idempotency key of its allocation")
    ended_at: MaybeSeconds = Field(description="end of the lease")
    end_reason: EndReason
    end_note: str | None = Field(examples=["student left", None], description="the reason from the administrator")
    history: list[Transition] = Field(description="the newest 500 transitions, oldest first")


class Allocation(BaseModel):
    lease_id: Annotated[int, Field(examples=[815])]
    sandbox_id: SandboxId
    name: str | None = Field(examples=["sandbox-1"], description="null after the purge of the sandbox's record")
    external_id: str | None = Field(
        examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"],
        description="null after the purge of the sandbox's record",
    )
    holder: Holder
    track_name: TrackName
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    ended_at: MaybeSeconds = Field(description="null for an active lease")
    duration_sec: Annotated[int, Field(examples=[5400], description="until now for an active lease")]
    end_reason: EndReason
    end_note: str | None = Field(examples=["student left", None], description="the reason from the administrator")


class Allocations(BaseModel):
    allocations: list[Allocation]
    count: Count = Field(description="number of entries on this page")
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
    reopened: Count = Field(description="deleted sandboxes that CSP still lists; they are deleted again")
    leaked: Count = Field(default=0, description="accounts that CSP lists and the pool does not contain")


class SandboxName(BaseModel):
    sandbox_id: SandboxId
    name: Name


class Change(BaseModel):
    count: Count
    examples: list[SandboxName] = Field(description="at most 20")


class HeldSync(BaseModel):
    listing_id: ListingId
    begun_at: UnixSeconds
    held_at: UnixSeconds
    reason: str = Field(examples=["The listing is empty."])
    stale: Change = Field(description="available sandboxes that are not in the listing")
    missing: Change = Field(description="allocated sandboxes that are not in the listing; they would be flagged")
    moved: Change = Field(description="sandboxes with another account in the listing")
    discovered: Change
    restored: Change


class SyncState(BaseModel):
    applied: AppliedSync | None = Field(description="the latest applied listing")
    held: HeldSync | None = Field(
        description="the newest listing if it is held, and the changes that it would make"
    )


class Leak(BaseModel):
    sandbox_id: SandboxId
    external_id: ExternalId
    name: Name
    kind: Literal["unknown", "deleted", "missing"] = Field(
        description="`unknown`: CSP lists it, and the pool does not contain it. `deleted`: CSP lists it, and it is "
        "deleted in the pool. `missing`: a student holds it, and CSP does not list it"
    )
    since: int | None = Field(examples=[1728054123, None], description="Unix seconds; null if unknown")


class Leaks(BaseModel):
    leaks: list[Leak]
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor
    listed_at: int | None = Field(
        examples=[1728054123, None],
        description="time of the compared listing in Unix seconds; null before the first one",
    )


DeadLetterId = Annotated[uuid.UUID, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])]
QueueName = Annotated[str, Field(examples=["allocator.commands"])]


class DeadLetterSummary(BaseModel):
    dead_letter_id: DeadLetterId
    died_at: UnixSeconds
    service: str = Field(examples=["allocator"], description="the service that could not process the message")
    queue: QueueName = Field(description="the queue in which the message died")
    reason: str = Field(examples=["It is no envelope of commands: Invalid JSON"])
    commands: list[str] = Field(examples=[["ReleaseSandbox"]], description="the types of all readable commands")
    size: Annotated[int, Field(examples=[212], description="bytes")]


class DeadLetterPage(BaseModel):
    dead_letters: list[DeadLetterSummary]
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor


class DeadLetter(DeadLetterSummary):
    message_id: str | None = Field(examples=["1c8d6f0c7f4b4e9d8a55e0a4d1c7b9aa", None])
    correlation_id: str | None = Field(examples=["f3a94f5be9c1466c8c9c34a5a3b7f0d2", None])
    content_type: str | None = Field(examples=["application/json", None])
    payload: str = Field(
        examples=['{"commands":[{"type":"ReleaseSandbox"}]}'],
        description="the first 64 KiB of the message",
    )
    encoding: Literal["utf-8", "base64"] = Field(description="the encoding of `payload`")


class DeadLetterReplayed(BaseModel):
    status: Literal["replayed"] = "replayed"
    dead_letter_id: DeadLetterId
    queue: QueueName
    published: bool = Field(examples=[True], description="false if no command was left to replay")
    skipped: Count = Field(
        description="allocations that were not replayed, because their students have had a sandbox since"
    )


class DeadLetterDropped(BaseModel):
    status: Literal["dropped"] = "dropped"
    dead_letter_id: DeadLetterId


class QueueStatus(BaseModel):
    queue: QueueName
    service: str = Field(examples=["allocator"], description="the service that consumes the queue")
    messages: MaybeCount = Field(
        description="waiting messages; null while RabbitMQ does not respond for this queue"
    )
    consumers: MaybeCount = Field(
        description="active and standby consumers; null while RabbitMQ does not respond for this queue"
    )
    problem: str | None = Field(
        examples=[None, "no answer in 0.3 s"], description="null if RabbitMQ responds for this queue"
    )


ServiceState = Literal["up", "partly", "down", "unknown"]


class ServiceStatus(BaseModel):
    service: str = Field(examples=["reaper"])
    state: ServiceState = Field(
        description="derived from the consumers of its queues. `partly`: some queues have no consumer. `unknown`: "
        "RabbitMQ is down, or responds for none of its queues"
    )


class PartStatus(BaseModel):
    state: Literal["up", "down", "unknown"] = Field(
        description="`unknown`: no answer yet, which a busy machine can cause. "
        "`down`: it refused, or has not answered for 5 s"
    )
    problem: str | None = Field(examples=[None, "no answer in 0.3 s"])


class CspStatus(BaseModel):
    """State of CSP according to the records of the broker. The gateway sends no request to CSP."""

    listed_at: MaybeSeconds = Field(description="start of the latest applied listing")
    unfinished_since: MaybeSeconds = Field(
        description="start of a newer listing that is incomplete: a sync is running, or CSP did not respond"
    )
    held: bool = Field(
        examples=[False],
        description="true if the newest listing waits for an administrator, see GET /v1/admin/sync",
    )
    pending_since: MaybeSeconds = Field(description="time of the oldest pending deletion request")
    failing: Count = Field(description="pending deletions that have failed at least once")
    error: str | None = Field(
        examples=["CSP answered 500", None], description="the error of the latest such failure"
    )


class Status(BaseModel):
    checked_at: UnixSeconds
    rabbitmq: PartStatus
    database: PartStatus
    services: list[ServiceStatus]
    queues: list[QueueStatus] | None = Field(description="null while RabbitMQ does not respond")
    pool: Stats | None = Field(description="null while the database does not respond, like all fields below")
    csp: CspStatus | None
    dead_letters: Count | None
    other_broker_at: UnixSeconds | None = Field(
        description="last time that an allocator of another broker used the database, null after ten minutes"
    )


class Purge(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: Count
    duration_ms: Milliseconds


class RestoreConfirmed(BaseModel):
    changed: bool = Field(
        description="false if the broker knew no newer lease, or the restore was confirmed before", examples=[True]
    )


class Cleanup(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: Count
    failed: Count = Field(description="failed attempts; the reaper retries them automatically")
    duration_ms: Milliseconds


class Job(BaseModel):
    job_id: JobId
    kind: JobKind
    state: JobState = Field(description="`held`: a sync that an administrator has to force")
    progress: dict[str, int] = Field(examples=[{"deleted": 12, "failed": 0}])
    result: dict[str, int | str] | None = Field(
        examples=[None, {"deleted": 40, "failed": 0}], description="null while the job is `running`"
    )
    started_at: UnixSeconds
    updated_at: UnixSeconds


class JobRunning(BaseModel):
    """Response to a request if its job takes longer than ADMIN_WAIT_SEC."""

    status: Literal["running"] = "running"
    job_id: JobId
    job_url: str = Field(examples=["/v1/admin/jobs/af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])


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
    for code in codes:
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
        if spec.status == HTTPStatus.UNAUTHORIZED:
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


JOB_RUNNING: dict[str, Any] = {
    "model": JobRunning,
    "description": "The job is still running. Get its state from the path in `Location`.",
    "headers": {"Location": {"description": "path of the job", "schema": {"type": "string"}}},
}


def describe_header(description: str, type_: str = "string") -> dict[str, Any]:
    """Return the OpenAPI entry of a response header."""
    return {"description": description, "schema": {"type": type_}}
