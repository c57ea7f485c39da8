"""Replies to commands."""

import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox_broker.contract.types import Message, SandboxStatus

RefusalCode = Literal[
    "ALLOCATOR_UNAVAILABLE",
    "CSP_UNAVAILABLE",
    "DEAD_LETTER_NOT_FOUND",
    "IDEMPOTENCY_KEY_CONFLICT",
    "INTERNAL_ERROR",
    "INVALID_COMMAND",
    "LISTING_OUTDATED",
    "NOT_ALLOCATED",
    "NOT_DELETION_FAILED",
    "NOT_REPLAYABLE",
    "NOT_SANDBOX_OWNER",
    "POOL_EXHAUSTED",
    "SANDBOX_NOT_FOUND",
    "SYNC_HELD",
]


class Refused(Message):
    """The command was understood and not done. `message` says why and what to do."""

    type: Literal["Refused"] = "Refused"
    code: RefusalCode
    message: str


class LeaseGranted(Message):
    type: Literal["LeaseGranted"] = "LeaseGranted"
    new: bool
    """False: the lease that this holder had already."""
    sandbox_id: str
    name: str
    external_id: str
    sfdc_account_id: str | None
    allocated_at: int
    expires_at: int


class SandboxReleased(Message):
    type: Literal["SandboxReleased"] = "SandboxReleased"
    sandbox_id: str
    status: SandboxStatus
    deletion_requested_at: int


class LeasesExpired(Message):
    type: Literal["LeasesExpired"] = "LeasesExpired"
    sandbox_ids: tuple[str, ...]


class DueDeletion(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    sandbox_id: str
    external_id: str
    name: str
    attempts: int
    missing: bool = False
    """CSP no longer lists it: there is nothing to delete."""
    request_id: str | None = None
    """Of the request that has asked for the deletion; None where time was up."""
    traceparent: str | None = None
    """The W3C trace context of that request, if it is traced."""


class DeletionsClaimed(Message):
    type: Literal["DeletionsClaimed"] = "DeletionsClaimed"
    deletions: tuple[DueDeletion, ...]
    on_duty: bool = True
    """False: another clean-up run is at work, so this one gets nothing."""
    next_in_sec: float | None = None
    """Without deletions: when asking again can give some, as things stand; None if nothing is pending."""


class DeletionsHurried(Message):
    type: Literal["DeletionsHurried"] = "DeletionsHurried"
    on_duty: bool = True
    hurried: int


class Recorded(Message):
    """`changed` is false where the work had been done before."""

    type: Literal["Recorded"] = "Recorded"
    changed: bool


class ListingBegun(Message):
    type: Literal["ListingBegun"] = "ListingBegun"
    listing_id: int


class ListingStaged(Message):
    type: Literal["ListingStaged"] = "ListingStaged"
    staged: int


class ListingApplied(Message):
    """`reopened`: CSP had deleted them and still lists them. `leaked`: CSP lists them, and they are not in the
    pool."""

    type: Literal["ListingApplied"] = "ListingApplied"
    synced: int
    discovered: int
    restored: int
    marked_stale: int
    reopened: int = 0
    leaked: int = 0


class SandboxesRefreshed(Message):
    """`last`: the last of those that were corrected, None where nothing was left to correct."""

    type: Literal["SandboxesRefreshed"] = "SandboxesRefreshed"
    last: str | None


class Purged(Message):
    type: Literal["Purged"] = "Purged"
    count: int


class DeadLetterReplayed(Message):
    type: Literal["DeadLetterReplayed"] = "DeadLetterReplayed"
    dead_letter_id: uuid.UUID
    queue: str
    published: bool
    """False: nothing was left of it."""
    skipped: int
    """Allocations in it whose students have had a sandbox since they asked."""


class CleanedUp(Message):
    type: Literal["CleanedUp"] = "CleanedUp"
    deleted: int
    failed: int
    """Attempts."""
    duration_ms: int


class PoolSynced(Message):
    type: Literal["PoolSynced"] = "PoolSynced"
    synced: int
    marked_stale: int
    restored: int
    duration_ms: int


Reply = Annotated[
    Refused
    | LeaseGranted
    | SandboxReleased
    | LeasesExpired
    | DeletionsClaimed
    | DeletionsHurried
    | CleanedUp
    | DeadLetterReplayed
    | Recorded
    | ListingBegun
    | ListingStaged
    | ListingApplied
    | SandboxesRefreshed
    | Purged
    | PoolSynced,
    Field(discriminator="type"),
]
