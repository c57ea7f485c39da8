"""Commands. A command asks the service that owns a resource to change it. Its name is in the imperative.

Every docstring names the reply after the arrow. All commands are frozen and carry a `version`. A receiver refuses a
command with an unknown version.
"""

import builtins
import uuid
from datetime import datetime
from typing import Annotated, Any, ClassVar, Generic, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import TypeVar

from sandbox_broker.contract.policies import MAX_POLICIES, InvalidPolicies, Policy, find_conflicts
from sandbox_broker.contract.replies import (
    AccessClaimed,
    AccessKeysRotated,
    CleanedUp,
    CreationsClaimed,
    DeadLetterReplayed,
    DeletionsClaimed,
    DeletionsHurried,
    LeaseExtended,
    LeaseGranted,
    LeasesExpired,
    LineServed,
    ListingApplied,
    ListingBegun,
    ListingStaged,
    PlayEnded,
    PoliciesApplied,
    PoolSynced,
    Purged,
    Recorded,
    SandboxesRefreshed,
    SandboxReleased,
    StudentForgotten,
    StudentWaiting,
    TokenLeasesEnded,
)
from sandbox_broker.contract.tokens import KeyId, Sender, Sha256, TokenGrant, TokenName
from sandbox_broker.contract.types import (
    MAX_BIGINT,
    MAX_SEC,
    MAX_TIME,
    JobKind,
    JobState,
    LeaseMode,
    Message,
    PrintableAscii,
    SandboxId,
    StorableText,
)

R = TypeVar("R", bound=Message, default=Any)


class Command(Message, Generic[R]):
    """Base class of all commands. `R` is the type of the reply to a command that is not refused."""

    _reply_type: ClassVar[type[Any]] = Message

    type: str
    """Name of the class."""
    request_id: str | None = None
    """Id of the HTTP request or the tick that caused the command."""
    traceparent: str | None = None
    """W3C trace context of that request or tick, if it is traced."""
    sender: Sender | None = None
    """Sender of a command of an administrator, or of a student with a named token. None: a token of a setting, or
    another service."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if arguments := cls.__pydantic_generic_metadata__["args"]:
            cls._reply_type = arguments[0]

    @property
    def reply_type(self) -> builtins.type[R]:
        return self._reply_type


class AllocateSandbox(Command[LeaseGranted | StudentWaiting]):
    """Return the lease of `holder`, or lease a sandbox to them. A student that may wait gets a place in the
    waiting line instead if no sandbox is free, and keeps it by repeating the command.
    → LeaseGranted, StudentWaiting or Refused."""

    type: Literal["AllocateSandbox"] = "AllocateSandbox"
    request_id: str
    holder: PrintableAscii
    track_name: PrintableAscii | None = None
    name_prefix: PrintableAscii | None = None
    idempotency_key: PrintableAscii | None = None
    wait_sec: int | None = Field(default=None, ge=0, le=MAX_SEC)
    """Longest wait in line. 0 gives up a place. None: the student does not wait, as in earlier versions."""
    mode: LeaseMode = "active"
    """Mode of a new lease. The lease that the holder has keeps its own mode."""
    secret_hash: Sha256 | None = None
    """SHA-256 of the lease secret. None: the client sent none."""
    access: Literal["user"] | None = None
    """`user`: a new lease has a login inside its sandbox, also without a policy that grants one."""


class ClaimLease(Command[LeaseGranted]):
    """Start the time of a standby lease, and lease its sandbox to `new_holder` if there is one. `holder` is the
    student id under which the lease was taken, or the new one. → LeaseGranted or Refused."""

    type: Literal["ClaimLease"] = "ClaimLease"
    request_id: str
    sandbox_id: SandboxId
    holder: PrintableAscii
    new_holder: PrintableAscii | None = None
    secret_hash: Sha256 | None = None
    """SHA-256 of the lease secret. None: the client sent none."""


class ExtendLease(Command[LeaseExtended]):
    """Extend a lease, once for each `extension_id`. Without a `holder` an administrator extends the lease of any
    student, without the limit; `note` gives the reason. → LeaseExtended or Refused."""

    type: Literal["ExtendLease"] = "ExtendLease"
    request_id: str
    sandbox_id: SandboxId
    holder: PrintableAscii | None = None
    extension_id: uuid.UUID
    extension_sec: int = Field(ge=1, le=MAX_SEC)
    note: StorableText | None = Field(default=None, min_length=1, max_length=500)
    secret_hash: Sha256 | None = None
    """SHA-256 of the lease secret. None: the client sent none."""


class ReplaceSandbox(Command[LeaseGranted | StudentWaiting]):
    """End the lease of a broken sandbox, and lease another sandbox to its student. A student that may wait
    keeps the broken sandbox until another one is free. Without a `holder` an administrator replaces the sandbox of
    any student, without the limit. → LeaseGranted, StudentWaiting or Refused."""

    type: Literal["ReplaceSandbox"] = "ReplaceSandbox"
    request_id: str
    sandbox_id: SandboxId
    holder: PrintableAscii | None = None
    reason: StorableText = Field(min_length=1, max_length=500)
    wait_sec: int | None = Field(default=None, ge=0, le=MAX_SEC)
    """Longest wait in line: see AllocateSandbox. None for an administrator."""
    secret_hash: Sha256 | None = None
    """SHA-256 of the lease secret. None: the client sent none."""


class ReleaseSandbox(Command[SandboxReleased]):
    """End the lease of the student, and request the deletion of the sandbox. → SandboxReleased or Refused."""

    type: Literal["ReleaseSandbox"] = "ReleaseSandbox"
    request_id: str
    sandbox_id: SandboxId
    holder: PrintableAscii
    secret_hash: Sha256 | None = None
    """SHA-256 of the lease secret. None: the client sent none."""


class ServeWaiting(Command[LineServed]):
    """Lease the available sandboxes to the waiting line, first come, first served, and end overdue places.
    → LineServed."""

    type: Literal["ServeWaiting"] = "ServeWaiting"


class EndPlay(Command[PlayEnded]):
    """End the lease of `holder` and the place in the waiting line, because Instruqt reported the end of the play at
    `ended_at` (Unix seconds), and request the deletion of the sandbox. A lease or place that began later belongs to
    another play and stays. → PlayEnded."""

    type: Literal["EndPlay"] = "EndPlay"
    request_id: str
    holder: PrintableAscii
    ended_at: int = Field(ge=0, le=MAX_TIME)


class ExpireLeases(Command[LeasesExpired]):
    """End at most `limit` leases that expired more than `grace_sec` seconds ago. → LeasesExpired."""

    type: Literal["ExpireLeases"] = "ExpireLeases"
    grace_sec: float = Field(ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class ClaimDeletions(Command[DeletionsClaimed]):
    """Claim at most `limit` due deletions for `claim_sec` seconds, and renew the leader lease of the run for the
    same time. Other clean-up runs get no claim meanwhile. A claim without a result ends after that time.
    `untried` prefers deletions without a failed attempt, in this order of their due times. → DeletionsClaimed."""

    type: Literal["ClaimDeletions"] = "ClaimDeletions"
    run_id: uuid.UUID
    limit: int = Field(ge=1, le=1000)
    claim_sec: float = Field(gt=0, le=MAX_SEC)
    untried: Literal["oldest", "newest"] | None = None


class HurryDeletions(Command[DeletionsHurried]):
    """Make at most `limit` pending deletions due now, except the deletions that this run has claimed, and those of
    broken sandboxes on hold. Renews the leader lease of the run like a claim. → DeletionsHurried."""

    type: Literal["HurryDeletions"] = "HurryDeletions"
    run_id: uuid.UUID
    limit: int = Field(ge=1, le=1000)
    claim_sec: float = Field(gt=0, le=MAX_SEC)


class EndCleanup(Command[Recorded]):
    """End the leader lease of the clean-up run, so that another run can start. → Recorded."""

    type: Literal["EndCleanup"] = "EndCleanup"
    run_id: uuid.UUID


class RecordDeletion(Command[Recorded]):
    """Record that CSP deleted the sandbox or no longer had it. `services_error` describes a failed clean-up of the
    services inside it. → Recorded."""

    type: Literal["RecordDeletion"] = "RecordDeletion"
    sandbox_id: SandboxId
    services_error: StorableText | None = Field(default=None, max_length=500)


class RecordDeletionFailure(Command[Recorded]):
    """Record that CSP did not delete the sandbox. `attempts` is the count that came with the claim, so a redelivery
    counts once. Without `retry_in_sec` this was the last attempt. → Recorded."""

    type: Literal["RecordDeletionFailure"] = "RecordDeletionFailure"
    run_id: uuid.UUID
    sandbox_id: SandboxId
    attempts: int = Field(ge=0, le=1_000_000)
    error: StorableText = Field(max_length=500)
    retry_in_sec: float | None = Field(default=None, ge=0, le=MAX_SEC)
    services_error: StorableText | None = Field(default=None, max_length=500)


class EndLease(Command[SandboxReleased]):
    """End a student's lease for an administrator; `note` gives the reason. → SandboxReleased or Refused."""

    type: Literal["EndLease"] = "EndLease"
    request_id: str
    sandbox_id: SandboxId
    note: StorableText = Field(min_length=1, max_length=500)


class RetryDeletion(Command[SandboxReleased]):
    """Retry a failed deletion for an administrator. With `end_hold`, also delete a broken sandbox before its hold
    has ended. → SandboxReleased or Refused."""

    type: Literal["RetryDeletion"] = "RetryDeletion"
    request_id: str
    sandbox_id: SandboxId
    end_hold: bool = False


class BeginListing(Command[ListingBegun]):
    """Register a CSP listing before it is fetched. → ListingBegun, with the id of the listing."""

    type: Literal["BeginListing"] = "BeginListing"


class ListedAccount(BaseModel):
    """An active sandbox account in a CSP listing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sandbox_id: SandboxId
    external_id: PrintableAscii
    name: StorableText = Field(min_length=1, max_length=500)
    sfdc_account_id: StorableText | None = None
    created_at: datetime | None = None


UNREADABLE_ACCOUNT = "account "
"""Prefix of an account UUID that stands for an unreadable csp_id in StageListing. No csp_id begins with it."""


class StageListing(Command[ListingStaged]):
    """Stage a batch of a listing until the listing is complete. `unreadable` are sandboxes whose CSP records lack
    required fields, by their id or, without a readable csp_id, as `account <uuid>`. They count as present, and no
    other data is read from them. → ListingStaged."""

    type: Literal["StageListing"] = "StageListing"
    listing_id: int = Field(ge=1, le=MAX_BIGINT)
    accounts: tuple[ListedAccount, ...] = Field(max_length=1000)
    unreadable: tuple[SandboxId, ...] = Field(default=(), max_length=1000)


class ApplyListing(Command[ListingApplied]):
    """Update the pool in one transaction from the `total` staged records of a listing. The sync is held if the
    listing is empty, lacks more than `max_stale_fraction` of the pool, or has unusually many new accounts
    (`max_growth_fraction` of the largest listing so far), unless `force` is set. → ListingApplied or Refused."""

    type: Literal["ApplyListing"] = "ApplyListing"
    listing_id: int = Field(ge=1, le=MAX_BIGINT)
    total: int = Field(ge=0)
    max_stale_fraction: float = Field(ge=0, le=1)
    max_growth_fraction: float | None = Field(default=None, ge=0, le=1000)
    """None: a csp-syncer of an earlier version, without a limit."""
    force: bool = False


class RefreshSandboxes(Command[SandboxesRefreshed]):
    """Update the names of at most `limit` sandboxes from the applied listing, in the order of their ids, starting
    behind `after`. → SandboxesRefreshed."""

    type: Literal["RefreshSandboxes"] = "RefreshSandboxes"
    listing_id: int = Field(ge=1, le=MAX_BIGINT)
    after: SandboxId | None = None
    limit: int = Field(ge=1, le=1000)


class DeleteStale(Command[Purged]):
    """Mark at most `limit` sandboxes as deleted that have been stale for `stale_for_sec` seconds. → Purged."""

    type: Literal["DeleteStale"] = "DeleteStale"
    stale_for_sec: float = Field(ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class PurgeRecords(Command[Purged]):
    """Purge the records of at most `limit` sandboxes that have had this status for `for_sec` seconds. Their leases
    stay. CSP accounts are not deleted. → Purged."""

    type: Literal["PurgeRecords"] = "PurgeRecords"
    status: Literal["stale", "deletion_failed", "deleted"]
    for_sec: float = Field(default=0, ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class RecordJob(Command[Recorded]):
    """Record the progress or the end of a job of an administrator. The worker reports at least once a minute. A job
    that is no longer `running` does not change any more. → Recorded."""

    type: Literal["RecordJob"] = "RecordJob"
    job_id: uuid.UUID
    kind: JobKind
    state: JobState = "running"
    progress: dict[str, int] = Field(default_factory=dict, max_length=20)
    result: dict[str, int | StorableText] | None = Field(default=None, max_length=20)


class ReplayDeadLetter(Command[DeadLetterReplayed]):
    """Publish a dead letter again to its queue, with its original ids, for an administrator.
    → DeadLetterReplayed or Refused."""

    type: Literal["ReplayDeadLetter"] = "ReplayDeadLetter"
    request_id: str
    dead_letter_id: uuid.UUID


class DropDeadLetter(Command[Recorded]):
    """Remove a dead letter for an administrator. → Recorded or Refused."""

    type: Literal["DropDeadLetter"] = "DropDeadLetter"
    request_id: str
    dead_letter_id: uuid.UUID


class ApplyPolicies(Command[PoliciesApplied]):
    """Replace all policies, for an administrator. With `dry_run`, only return the difference. → PoliciesApplied."""

    type: Literal["ApplyPolicies"] = "ApplyPolicies"
    request_id: str
    policies: tuple[Policy, ...] = Field(max_length=MAX_POLICIES)
    dry_run: bool = False

    @field_validator("policies")
    @classmethod
    def _refuse_conflicts(cls, policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
        if problems := [*find_conflicts(policies)]:
            raise InvalidPolicies(problems)
        return policies


class ConfirmRestore(Command[Recorded]):
    """Accept a database without the newest lease, after an administrator has restored a backup. → Recorded."""

    type: Literal["ConfirmRestore"] = "ConfirmRestore"
    request_id: str


class ClaimCreations(Command[CreationsClaimed]):
    """Grant the creation intents that the stock rules need, and claim at most `limit` due ones for `claim_sec`
    seconds. Renews the leader lease of the run for the same time. Other runs get no claim meanwhile. A claim
    without a result ends after that time. `received` has the ids of the claims that reached the run and may last.
    Other claims of the run are due at once, because their reply was lost; None: they end by themselves. `dry_run`
    grants and claims nothing, and returns the missing creations with the id 0. → CreationsClaimed."""

    type: Literal["ClaimCreations"] = "ClaimCreations"
    run_id: uuid.UUID
    limit: int = Field(ge=1, le=1000)
    claim_sec: float = Field(gt=0, le=MAX_SEC)
    received: tuple[int, ...] | None = None
    dry_run: bool = False


class EndCreations(Command[Recorded]):
    """End the leader lease of the run, so that another run can start. Its claims end by themselves. → Recorded."""

    type: Literal["EndCreations"] = "EndCreations"
    run_id: uuid.UUID


class RecordCreation(Command[Recorded]):
    """Record that CSP has the account of a creation intent. `external_id` is the bare account UUID. The next sync
    imports the account. → Recorded."""

    type: Literal["RecordCreation"] = "RecordCreation"
    creation_id: int = Field(ge=1, le=MAX_BIGINT)
    external_id: PrintableAscii


class RecordCreationFailure(Command[Recorded]):
    """Record that CSP did not create the account. `attempts` is the count that came with the claim, so a redelivery
    counts once. Without `retry_in_sec` this was the last attempt, and the intent ends as `failed`. `refused`: CSP
    gave a lasting reason, such as a quota or a licence, so the prefix stops at once. `max_failures` consecutive
    failures of a prefix stop it, too. → Recorded."""

    type: Literal["RecordCreationFailure"] = "RecordCreationFailure"
    run_id: uuid.UUID
    creation_id: int = Field(ge=1, le=MAX_BIGINT)
    attempts: int = Field(ge=0, le=1_000_000)
    error: StorableText = Field(max_length=500)
    retry_in_sec: float | None = Field(default=None, ge=0, le=MAX_SEC)
    refused: bool = False
    max_failures: int = Field(default=5, ge=1, le=1_000_000)


class ClaimAccess(Command[AccessClaimed]):
    """Claim at most `limit` due logins for `claim_sec` seconds: logins to create, and logins of ended leases to
    remove. At most `max_running` claims run at once, over all provisioners. A claim without a result ends after
    that time. `email_domain` completes the emails of new logins. After the end of a lease, the deletion of its
    sandbox waits at most `removal_wait_sec` seconds for the removal of the login. → AccessClaimed or Refused."""

    type: Literal["ClaimAccess"] = "ClaimAccess"
    limit: int = Field(ge=1, le=100)
    max_running: int = Field(ge=1, le=1000)
    claim_sec: float = Field(gt=0, le=MAX_SEC)
    email_domain: PrintableAscii
    removal_wait_sec: float = Field(ge=0, le=MAX_SEC)


class RecordAccess(Command[Recorded]):
    """Record that the user `user_id` with the claimed password is inside the sandbox. → Recorded."""

    type: Literal["RecordAccess"] = "RecordAccess"
    sandbox_id: SandboxId
    claim_id: uuid.UUID
    user_id: PrintableAscii


class RecordAccessFailure(Command[Recorded]):
    """Record that a claimed login was not created, or not removed. It is due again after `retry_in_sec` seconds.
    `failed`: students and lab authors see the login as failed, with `error` as the reason, until an attempt
    succeeds. → Recorded."""

    type: Literal["RecordAccessFailure"] = "RecordAccessFailure"
    sandbox_id: SandboxId
    claim_id: uuid.UUID
    error: StorableText = Field(max_length=500)
    retry_in_sec: float = Field(ge=0, le=MAX_SEC)
    failed: bool = False


class RecordAccessRemoval(Command[Recorded]):
    """Record that the user of a claimed login is no longer inside the sandbox. The sandbox may be deleted then.
    → Recorded."""

    type: Literal["RecordAccessRemoval"] = "RecordAccessRemoval"
    sandbox_id: SandboxId
    claim_id: uuid.UUID


class RotateAccessKeys(Command[AccessKeysRotated]):
    """Encrypt at most `limit` passwords again with the first key of ACCESS_KEYS, for an administrator.
    → AccessKeysRotated or Refused."""

    type: Literal["RotateAccessKeys"] = "RotateAccessKeys"
    request_id: str
    limit: int = Field(ge=1, le=1000)


class ResumeStock(Command[Recorded]):
    """Continue to create accounts of a stopped prefix, for an administrator. → Recorded or Refused."""

    type: Literal["ResumeStock"] = "ResumeStock"
    request_id: str
    name_prefix: PrintableAscii


class IssueToken(Command[Recorded]):
    """Record a new named token, once for each `key_id`. The token itself stays in the gateway. → Recorded or
    Refused."""

    type: Literal["IssueToken"] = "IssueToken"
    request_id: str
    key_id: KeyId
    token_hash: Sha256
    pepper_id: str | None = Field(default=None, max_length=64)
    """Pepper of the hash. None: no pepper."""
    grant: TokenGrant


class RevokeToken(Command[Recorded]):
    """End a named token for ever. Its leases stay. → Recorded or Refused."""

    type: Literal["RevokeToken"] = "RevokeToken"
    request_id: str
    name: TokenName


class SuspendToken(Command[Recorded]):
    """Suspend a named token, or resume it. Its leases stay. → Recorded or Refused."""

    type: Literal["SuspendToken"] = "SuspendToken"
    request_id: str
    name: TokenName
    suspended: bool = True


class EndTokenLeases(Command[TokenLeasesEnded]):
    """End at most `limit` active leases that were made with the token, for an administrator. `note` gives the
    reason. → TokenLeasesEnded."""

    type: Literal["EndTokenLeases"] = "EndTokenLeases"
    request_id: str
    name: TokenName
    note: StorableText = Field(min_length=1, max_length=500)
    limit: int = Field(ge=1, le=1000)


class RecordTokenUses(Command[Recorded]):
    """Record the last uses of tokens, by key id, in Unix seconds with minute precision. → Recorded."""

    type: Literal["RecordTokenUses"] = "RecordTokenUses"
    uses: dict[KeyId, int] = Field(min_length=1, max_length=10_000)


class ForgetStudent(Command[StudentForgotten]):
    """Replace a student id by a pseudonym, for an administrator. → StudentForgotten or Refused."""

    type: Literal["ForgetStudent"] = "ForgetStudent"
    request_id: str
    student: PrintableAscii


class PurgeAudit(Command[Purged]):
    """Remove at most `limit` entries of the audit that are older than `for_sec` seconds. → Purged."""

    type: Literal["PurgeAudit"] = "PurgeAudit"
    for_sec: float = Field(ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class PurgePersonalData(Command[Purged]):
    """Replace student ids by pseudonyms in at most `limit` leases that ended more than `for_sec` seconds ago.
    → Purged."""

    type: Literal["PurgePersonalData"] = "PurgePersonalData"
    for_sec: float = Field(ge=0, le=MAX_SEC)
    limit: int = Field(ge=1, le=1000)


class SyncPool(Command[PoolSynced]):
    """Run a sync now, or join the running sync. → PoolSynced or Refused."""

    type: Literal["SyncPool"] = "SyncPool"
    request_id: str
    force: bool = False
    job_id: uuid.UUID | None = None
    """Job for the progress and the end of the sync."""


class CleanUpNow(Command[CleanedUp]):
    """Delete all sandboxes with a pending deletion now, regardless of their backoff. → CleanedUp or Refused."""

    type: Literal["CleanUpNow"] = "CleanUpNow"
    request_id: str
    job_id: uuid.UUID


AnyCommand = Annotated[
    AllocateSandbox
    | ClaimLease
    | ExtendLease
    | ReplaceSandbox
    | ReleaseSandbox
    | ServeWaiting
    | EndPlay
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
    | ConfirmRestore
    | ApplyPolicies
    | ClaimCreations
    | EndCreations
    | RecordCreation
    | RecordCreationFailure
    | ResumeStock
    | IssueToken
    | RevokeToken
    | SuspendToken
    | EndTokenLeases
    | RecordTokenUses
    | ClaimAccess
    | RecordAccess
    | RecordAccessFailure
    | RecordAccessRemoval
    | RotateAccessKeys
    | ForgetStudent
    | PurgeAudit
    | PurgePersonalData
    | SyncPool
    | CleanUpNow,
    Field(discriminator="type"),
]
