"""Commands. A command asks the service that owns a thing to change it. Its name is in the imperative.

Every command names its reply after the arrow. All commands are frozen and carry a `version`: a receiver that does
not know the version refuses the command.
"""

import uuid
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox_broker.contract.types import (
    MAX_BIGINT,
    MAX_SEC,
    JobKind,
    JobState,
    Message,
    PrintableAscii,
    SandboxId,
    StorableText,
)


class _Command(Message):
    """The common ground of all commands."""

    request_id: str | None = None
    """Of the HTTP request, or the tick, that it is given for."""
    traceparent: str | None = None
    """The W3C trace context of that, if it is traced."""


class AllocateSandbox(_Command):
    """Lease a sandbox to `holder`, or give the one they hold. → LeaseGranted or Refused."""

    type: Literal["AllocateSandbox"] = "AllocateSandbox"
    request_id: str
    holder: PrintableAscii
    track_name: PrintableAscii | None = None
    name_prefix: PrintableAscii | None = None
    idempotency_key: PrintableAscii | None = None


class ReleaseSandbox(_Command):
    """The student is done: end the lease, have the sandbox deleted. → SandboxReleased or Refused."""

    type: Literal["ReleaseSandbox"] = "ReleaseSandbox"
    request_id: str
    sandbox_id: SandboxId
    holder: PrintableAscii


class ExpireLeases(_Command):
    """End at most `limit` leases that are overdue by more than `grace_sec`. → LeasesExpired."""

    type: Literal["ExpireLeases"] = "ExpireLeases"
    grace_sec: float = Field(ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class ClaimDeletions(_Command):
    """Take at most `limit` due deletions for `claim_sec`; a claim that is not answered in that time ends by
    itself. For as long no other clean-up run gets any. → DeletionsClaimed."""

    type: Literal["ClaimDeletions"] = "ClaimDeletions"
    run_id: uuid.UUID
    limit: int = Field(ge=1, le=1000)
    claim_sec: float = Field(gt=0, le=MAX_SEC)


class HurryDeletions(_Command):
    """Make at most `limit` pending deletions due now that would be tried later, those that this run has claimed
    excepted. Keeps other runs away like a claim. → DeletionsHurried."""

    type: Literal["HurryDeletions"] = "HurryDeletions"
    run_id: uuid.UUID
    limit: int = Field(ge=1, le=1000)
    claim_sec: float = Field(gt=0, le=MAX_SEC)


class EndCleanup(_Command):
    """The run has nothing in hand any more: another may begin. → Recorded."""

    type: Literal["EndCleanup"] = "EndCleanup"
    run_id: uuid.UUID


class RecordDeletion(_Command):
    """CSP deleted the sandbox, or no longer had it. `services_error` is what went wrong with the services inside
    it. → Recorded."""

    type: Literal["RecordDeletion"] = "RecordDeletion"
    sandbox_id: SandboxId
    services_error: StorableText | None = Field(default=None, max_length=500)


class RecordDeletionFailure(_Command):
    """CSP did not delete it. Counts for the claim that it belongs to, `attempts` being the count that came with
    it, so that a message delivered twice counts once; without `retry_in_sec` it was the last attempt.
    → Recorded."""

    type: Literal["RecordDeletionFailure"] = "RecordDeletionFailure"
    run_id: uuid.UUID
    sandbox_id: SandboxId
    attempts: int = Field(ge=0, le=1_000_000)
    error: StorableText = Field(max_length=500)
    retry_in_sec: float | None = Field(default=None, ge=0, le=MAX_SEC)
    services_error: StorableText | None = Field(default=None, max_length=500)


class EndLease(_Command):
    """An administrator ends a student's lease; `note` says why. → SandboxReleased or Refused."""

    type: Literal["EndLease"] = "EndLease"
    request_id: str
    sandbox_id: SandboxId
    note: StorableText = Field(min_length=1, max_length=500)


class RetryDeletion(_Command):
    """An administrator sends a failed deletion back to be tried anew. → SandboxReleased or Refused."""

    type: Literal["RetryDeletion"] = "RetryDeletion"
    request_id: str
    sandbox_id: SandboxId


class BeginListing(_Command):
    """A CSP listing is about to be fetched. → ListingBegun, whose id names it from then on."""

    type: Literal["BeginListing"] = "BeginListing"


class ListedAccount(BaseModel):
    """An active sandbox account, as CSP listed it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sandbox_id: SandboxId
    external_id: PrintableAscii
    name: StorableText = Field(min_length=1, max_length=500)
    sfdc_account_id: StorableText | None = None
    created_at: datetime | None = None


class StageListing(_Command):
    """A piece of a listing, kept aside until all of it is there. `unreadable` are sandboxes that CSP lists in
    records which lack what we need: nothing is learned of them but that they are there. → ListingStaged."""

    type: Literal["StageListing"] = "StageListing"
    listing_id: int = Field(ge=1, le=MAX_BIGINT)
    accounts: tuple[ListedAccount, ...] = Field(max_length=1000)
    unreadable: tuple[SandboxId, ...] = Field(default=(), max_length=1000)


class ApplyListing(_Command):
    """All `total` records of the listing are staged: bring the pool in line, as a whole or not at all.
    Held when empty or when it lacks more than `max_stale_fraction` of the pool, unless `force`.
    → ListingApplied or Refused."""

    type: Literal["ApplyListing"] = "ApplyListing"
    listing_id: int = Field(ge=1, le=MAX_BIGINT)
    total: int = Field(ge=0)
    max_stale_fraction: float = Field(ge=0, le=1)
    force: bool = False


class RefreshSandboxes(_Command):
    """Correct the names of at most `limit` sandboxes after the listing that was applied, in the order of their ids,
    beginning behind `after`. → SandboxesRefreshed."""

    type: Literal["RefreshSandboxes"] = "RefreshSandboxes"
    listing_id: int = Field(ge=1, le=MAX_BIGINT)
    after: SandboxId | None = None
    limit: int = Field(ge=1, le=1000)


class DeleteStale(_Command):
    """Take at most `limit` sandboxes that have been stale for `stale_for_sec` as deleted. → Purged."""

    type: Literal["DeleteStale"] = "DeleteStale"
    stale_for_sec: float = Field(ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class PurgeRecords(_Command):
    """Forget at most `limit` sandboxes that have been in this state for `for_sec`; their leases stay. CSP is not
    asked. → Purged."""

    type: Literal["PurgeRecords"] = "PurgeRecords"
    status: Literal["stale", "deletion_failed", "deleted"]
    for_sec: float = Field(default=0, ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class RecordJob(_Command):
    """How a job goes that an administrator waits for. Who works on it tells at least once a minute; once it is no
    longer `running`, nothing changes it. → Recorded."""

    type: Literal["RecordJob"] = "RecordJob"
    job_id: uuid.UUID
    kind: JobKind
    state: JobState = "running"
    progress: dict[str, int] = Field(default_factory=dict, max_length=20)
    result: dict[str, int | StorableText] | None = Field(default=None, max_length=20)


class ReplayDeadLetter(_Command):
    """An administrator puts a dead letter back into the queue that it died in, with the ids that it had.
    → DeadLetterReplayed or Refused."""

    type: Literal["ReplayDeadLetter"] = "ReplayDeadLetter"
    request_id: str
    dead_letter_id: uuid.UUID


class DropDeadLetter(_Command):
    """An administrator has no use for a dead letter. → Recorded or Refused."""

    type: Literal["DropDeadLetter"] = "DropDeadLetter"
    request_id: str
    dead_letter_id: uuid.UUID


class SyncPool(_Command):
    """Run a sync now, or join the one that runs. → PoolSynced or Refused."""

    type: Literal["SyncPool"] = "SyncPool"
    request_id: str
    force: bool = False
    job_id: uuid.UUID | None = None
    """Where the sync's progress and end are to be recorded."""


class CleanUpNow(_Command):
    """Delete what is pending now, whatever its backoff says. → CleanedUp or Refused."""

    type: Literal["CleanUpNow"] = "CleanUpNow"
    request_id: str
    job_id: uuid.UUID


Command = Annotated[
    AllocateSandbox
    | ReleaseSandbox
    | ExpireLeases
    | ClaimDeletions
    | HurryDeletions
    | EndCleanup
    | RecordDeletion
    | RecordDeletionFailure
    | EndLease
    | RetryDeletion
    | BeginListing
    | StageListing
    | ApplyListing
    | RefreshSandboxes
    | DeleteStale
    | PurgeRecords
    | RecordJob
    | ReplayDeadLetter
    | DropDeadLetter
    | SyncPool
    | CleanUpNow,
    Field(discriminator="type"),
]
