"""Every message that crosses RabbitMQ: commands, their replies, and events.

A command asks the one service that owns a thing to change it and is named in the imperative; its reply says
what came of it. An event tells that something has happened, in the past tense. All are frozen and carry a
`version`: a reader that does not know it refuses the message instead of guessing.

Commands travel in an `Envelope`, so that what has gathered goes out together; the answer is one
`ReplyEnvelope` with a reply for each command, in the same order. Times are Unix seconds.
"""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MAX_ID_LENGTH = 128
MAX_ENVELOPE = 200
"""Commands in one envelope at most: what one SQL statement takes comfortably."""

MAX_SEC = 10 * 365 * 24 * 3600
"""Ten years: no duration here is longer."""
MAX_BIGINT = 2**63 - 1

SandboxStatus = Literal["available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted"]
DeletionReason = Literal["student", "expired", "admin"]
JobKind = Literal["sync", "cleanup"]
JobState = Literal["running", "completed", "held", "failed"]

PrintableAscii = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[\x20-\x7e]+$")]
"""What a header may carry here: an id, a track name, a prefix, an idempotency key."""

SandboxId = PrintableAscii

_StorableText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""PostgreSQL stores no NUL."""


class Message(BaseModel):
    """The common ground of all messages. Unknown fields are ignored, so that a newer sender can add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1


class _Command(Message):
    """The common ground of all commands."""

    request_id: str | None = None
    """Of the HTTP request, or the tick, that it is given for."""
    traceparent: str | None = None
    """The W3C trace context of that, if it is traced."""


# Commands to the allocator


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
    services_error: _StorableText | None = Field(default=None, max_length=500)


class RecordDeletionFailure(_Command):
    """CSP did not delete it. Counts for the claim that it belongs to, `attempts` being the count that came with
    it, so that a message delivered twice counts once; without `retry_in_sec` it was the last attempt.
    → Recorded."""

    type: Literal["RecordDeletionFailure"] = "RecordDeletionFailure"
    run_id: uuid.UUID
    sandbox_id: SandboxId
    attempts: int = Field(ge=0, le=1_000_000)
    error: _StorableText = Field(max_length=500)
    retry_in_sec: float | None = Field(default=None, ge=0, le=MAX_SEC)
    services_error: _StorableText | None = Field(default=None, max_length=500)


class EndLease(_Command):
    """An administrator ends a student's lease; `note` says why. → SandboxReleased or Refused."""

    type: Literal["EndLease"] = "EndLease"
    request_id: str
    sandbox_id: SandboxId
    note: _StorableText = Field(min_length=1, max_length=500)


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
    name: _StorableText = Field(min_length=1, max_length=500)
    sfdc_account_id: _StorableText | None = None
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
    result: dict[str, int | _StorableText] | None = Field(default=None, max_length=20)


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


# Commands to the csp-syncer


class SyncPool(_Command):
    """Run a sync now, or join the one that runs. → PoolSynced or Refused."""

    type: Literal["SyncPool"] = "SyncPool"
    request_id: str
    force: bool = False
    job_id: uuid.UUID | None = None
    """Where the sync's progress and end are to be recorded."""


# Commands to the reaper


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


# Replies

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


# Events: CloudEvents 1.0, structured JSON

EventType = Literal[
    "sandbox.discovered",
    "sandbox.allocated",
    "sandbox.deletion_requested",
    "sandbox.deleted",
    "sandbox.deletion_failed",
    "sandbox.stale",
    "sandbox.restored",
    "sync.completed",
    "sync.held",
    "pool.exhausted",
]


class Event(BaseModel):
    """A CloudEvent. `id` stays the same when it is published again; `subject` is the sandbox id, if any."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    specversion: Literal["1.0"] = "1.0"
    id: uuid.UUID
    source: Literal["/sandbox-broker/allocator"] = "/sandbox-broker/allocator"
    type: EventType
    subject: str | None = None
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    data: dict[str, Any]


EVENT_CONTENT_TYPE = "application/cloudevents+json"


def encode_event(  # as an Event would, in a tenth of the time: there is one for every lease
    event_id: str, event_type: str, subject: str | None, time: datetime, data: str
) -> bytes:
    """The event as JSON; `data` is JSON already."""
    attributes = {
        "specversion": "1.0",
        "id": event_id,
        "source": "/sandbox-broker/allocator",
        "type": event_type,
        "time": time,
        "datacontenttype": "application/json",
    }
    if subject is not None:
        attributes["subject"] = subject
    return orjson.dumps(attributes | {"data": orjson.Fragment(data)})


# Envelopes


class Envelope(BaseModel):
    model_config = ConfigDict(frozen=True)

    commands: tuple[Command, ...] = Field(min_length=1, max_length=MAX_ENVELOPE)


class ReplyEnvelope(BaseModel):
    model_config = ConfigDict(frozen=True)

    replies: tuple[Reply, ...]


class _LooseEnvelope(BaseModel):
    commands: list[Any] = Field(min_length=1, max_length=MAX_ENVELOPE)


_command: TypeAdapter[Command] = TypeAdapter(Command)


class InvalidEnvelope(ValueError):
    """The body is no envelope at all."""


class InvalidCommand(ValueError):
    """One entry of an envelope that cannot be understood; its neighbours can."""

    def __init__(self, raw: Any, reason: str) -> None:
        super().__init__(reason)
        self.raw = raw


def encode_commands(commands: Sequence[Command]) -> bytes:
    return Envelope(commands=tuple(commands)).model_dump_json(exclude_none=True).encode()


def request_ids_in(body: bytes) -> list[str]:
    """Those of the requests that an envelope is sent for, as far as it can be understood."""
    try:
        envelope = orjson.loads(body)
    except orjson.JSONDecodeError:
        return []
    commands = envelope.get("commands") if isinstance(envelope, dict) else None
    if not isinstance(commands, list):
        return []
    found = (entry.get("request_id") for entry in commands if isinstance(entry, dict))
    return [request_id for request_id in found if isinstance(request_id, str)]


def decode_commands(body: bytes) -> list[Command | InvalidCommand]:
    """The commands of an envelope, each poisonous entry in its place as an InvalidCommand.

    Raises InvalidEnvelope when there is no list of commands to speak of.
    """
    try:
        return list(Envelope.model_validate_json(body).commands)
    except ValidationError:
        pass
    try:
        entries = _LooseEnvelope.model_validate_json(body).commands
    except ValidationError as error:
        raise InvalidEnvelope(_first_problem(error)) from error
    return [_decode_command(raw) for raw in entries]


def _decode_command(raw: Any) -> Command | InvalidCommand:
    try:
        return _command.validate_python(raw)
    except ValidationError as error:
        return InvalidCommand(raw, _first_problem(error))


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
