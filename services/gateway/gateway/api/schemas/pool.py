"""Response bodies about the pool: counts, sandboxes and their history, leases, leaks."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import (
    ClaimedAt,
    Count,
    Cursor,
    EndReason,
    ExternalId,
    Holder,
    MaybeSeconds,
    Mode,
    Name,
    SandboxId,
    SfdcAccount,
    TrackName,
    UnixSeconds,
)
from sandbox_broker.contract.types import SandboxStatus


class Stats(BaseModel):
    total: Count
    available: Count
    allocated: Count
    pending_deletion: Count
    deletion_failed: Count
    stale: Count
    deleted: Count
    missing: Count = Field(description="allocated sandboxes that CSP no longer lists; a student still holds them")
    standby: Count = Field(description="allocated sandboxes whose standby lease is not claimed yet")
    on_hold: Count = Field(description="broken sandboxes that are not deleted yet, so that operators inspect them")


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


class PoolSample(BaseModel):
    at: UnixSeconds
    available: Count
    allocated: Count
    pending_deletion: Count
    deletion_failed: Count
    stale: Count
    waiting: Count = Field(description="students in the waiting line")


class PoolHistory(BaseModel):
    samples: list[PoolSample] = Field(description="oldest first, at most 300. A stopped allocator leaves a gap")
    step_sec: Annotated[int, Field(examples=[300], description="time between two samples")]


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


Actor = Literal["csp", "student", "administrator", "instruqt", "broker"]


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


class LeaseDetails(BaseModel):
    """Details of a lease. Without a lease, all are null."""

    mode: Mode | None
    claimed_at: ClaimedAt
    first_holder: str | None = Field(
        examples=[None, "hot-start-17"],
        description="the student id under which a standby lease was taken, if the claim gave it to another one",
    )
    extended_sec: Annotated[
        int | None, Field(examples=[0, 7200], description="all extensions by the student together")
    ]
    policy: str | None = Field(
        examples=["adventure", None], description="the policy of the lease; null: the defaults"
    )
    max_extension_sec: int | None = Field(
        examples=[14400, None], description="the limit of all extensions; null for a lease of an earlier version"
    )
    replaces: str | None = Field(
        examples=[None, "2012224"], description="the broken sandbox of the student that this one replaced"
    )
    replaced_by: str | None = Field(
        examples=[None, "2012225"], description="the sandbox that the student got instead of this broken one"
    )


class SandboxStory(SandboxSummary, LeaseDetails):
    deletion_reason: EndReason
    deletion_due_at: MaybeSeconds = Field(description="the earliest time of the next deletion attempt")
    deletion_hold_until: MaybeSeconds = Field(
        description="a broken sandbox is not deleted before this time, so that an operator can inspect it"
    )
    deleted_at: MaybeSeconds
    services_error: str | None = Field(
        examples=[None], description="the error of the clean-up of its NIOSXaaS services before its deletion"
    )
    idempotency_key: str | None = Field(examples=[None], description="the idempotency key of its allocation")
    ended_at: MaybeSeconds = Field(description="end of the lease")
    end_reason: EndReason
    end_note: str | None = Field(
        examples=["student left", None], description="the reason from the administrator, or of the replacement"
    )
    history: list[Transition] = Field(description="the newest 500 transitions, oldest first")


class Allocation(LeaseDetails):
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
    end_note: str | None = Field(
        examples=["student left", None], description="the reason from the administrator, or of the replacement"
    )


class Allocations(BaseModel):
    allocations: list[Allocation]
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor


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
