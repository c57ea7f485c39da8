"""Replies to commands."""

import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox_broker.contract.types import LeaseMode, Message, SandboxStatus

RefusalCode = Literal[
    "ACCESS_NOT_CONFIGURED",
    "ALLOCATOR_UNAVAILABLE",
    "ALREADY_CLAIMED",
    "CSP_UNAVAILABLE",
    "DATABASE_BEHIND",
    "DEAD_LETTER_NOT_FOUND",
    "EXTENSION_LIMIT",
    "FORBIDDEN_SCOPE",
    "IDEMPOTENCY_KEY_CONFLICT",
    "INTERNAL_ERROR",
    "INVALID_COMMAND",
    "LEASE_ENDED",
    "LISTING_OUTDATED",
    "NEW_HOLDER_HAS_LEASE",
    "NOT_ALLOCATED",
    "NOT_CLAIMED",
    "NOT_DELETION_FAILED",
    "NOT_REPLAYABLE",
    "NOT_SANDBOX_OWNER",
    "POOL_EXHAUSTED",
    "REPLACEMENT_LIMIT",
    "QUOTA_EXCEEDED",
    "SANDBOX_NOT_FOUND",
    "STOCK_RULE_NOT_FOUND",
    "STUDENT_HAS_LEASE",
    "SYNC_HELD",
    "TOKEN_EXISTS",
    "TOKEN_NOT_FOUND",
    "UNAUTHORIZED",
]


Parameters = Mapping[str, int | str]
"""Facts of a refusal. `cause` distinguishes the causes of a code that has several."""


class Refused(Message):
    """The command was refused. The gateway words the reason from `code` and `parameters`. A sender of the previous
    version has no `parameters`, and its `message` states the reason. Otherwise `message` repeats code and facts for
    receivers of that version."""

    type: Literal["Refused"] = "Refused"
    code: RefusalCode
    parameters: dict[str, int | str] | None = None
    message: str

    def to_job_result(self) -> dict[str, int | str]:
        """Return the result of a job that ended with this refusal. `parameters` are JSON there."""
        result: dict[str, int | str] = {"code": self.code, "message": self.message}
        if self.parameters is not None:
            result["parameters"] = json.dumps(self.parameters)
        return result


def refuse(code: RefusalCode, **parameters: int | str) -> Refused:
    """Return a refusal. `messages` in the error table of the gateway words its parameters."""
    facts = ", ".join(f"{name}: {value}" for name, value in parameters.items())
    return Refused(code=code, parameters=parameters, message=f"{code} ({facts})" if facts else code)


class LeaseGranted(Message):
    type: Literal["LeaseGranted"] = "LeaseGranted"
    new: bool
    """False if the holder already had this lease, or had claimed it before."""
    sandbox_id: str
    name: str
    external_id: str
    sfdc_account_id: str | None
    allocated_at: int
    expires_at: int
    """End of the lease or, in standby, the latest time of its claim."""
    mode: LeaseMode = "active"
    claimed_at: int | None = None
    """None: the lease was never in standby, or is not claimed yet."""


class LeaseExtended(Message):
    """The lease was extended. `changed` is false if this extension had been granted before."""

    type: Literal["LeaseExtended"] = "LeaseExtended"
    changed: bool
    expires_at: int
    max_expires_at: int
    """Latest end of the lease that the student can reach by further extensions."""


class StudentWaiting(Message):
    """No sandbox is free, and the student has a place in the waiting line."""

    type: Literal["StudentWaiting"] = "StudentWaiting"
    position: int
    """1 for the next student. Counts only students for the same sandboxes."""
    waiting_since: int
    estimated_wait_sec: int | None
    """None: unknown."""
    retry_after: int
    """Seconds until the student should repeat the request."""


class SandboxReleased(Message):
    type: Literal["SandboxReleased"] = "SandboxReleased"
    sandbox_id: str
    status: SandboxStatus
    deletion_requested_at: int
    changed: bool = True
    """False if the deletion had been requested before. Only set for administrators."""


class LineServed(Message):
    type: Literal["LineServed"] = "LineServed"
    served: int
    waiting: int
    """Students in the line."""


class PlayEnded(Message):
    type: Literal["PlayEnded"] = "PlayEnded"
    outcome: Literal["released", "stopped_waiting", "no_lease", "newer_lease"]
    """`stopped_waiting`: the holder had no lease, but lost a place in the waiting line. `newer_lease`: the lease of
    the holder began after the end of the play, so it stays."""
    sandbox_id: str | None = None
    """Sandbox of the lease; None without a lease."""


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
    """CSP no longer lists the sandbox, so there is no account to delete."""
    request_id: str | None = None
    """Id of the request that caused the deletion. None if the lease expired."""
    traceparent: str | None = None
    """W3C trace context of that request, if it is traced."""


class DeletionsClaimed(Message):
    type: Literal["DeletionsClaimed"] = "DeletionsClaimed"
    deletions: tuple[DueDeletion, ...]
    on_duty: bool = True
    """False if another clean-up run holds the leader lease. This run then gets no deletions."""
    next_in_sec: float | None = None
    """Seconds until the next deletion can be due, if `deletions` is empty. None if no deletion is pending."""


class DeletionsHurried(Message):
    type: Literal["DeletionsHurried"] = "DeletionsHurried"
    on_duty: bool = True
    hurried: int


class DueCreation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    creation_id: int
    name: str
    """Name of the account. No other creation intent ever has it."""
    name_prefix: str
    admin_user: dict[str, str] | None = None
    """Administrator of the account, from the stock rule: `email` and `name`."""
    attempts: int
    """Number of failed attempts."""
    claimed_before: bool
    """An earlier claim may have created the account, so look the name up in CSP before the creation."""
    request_id: str | None = None
    """Id of the request or tick that caused the creation."""
    traceparent: str | None = None
    """W3C trace context of that request, if it is traced."""


class CreationsClaimed(Message):
    type: Literal["CreationsClaimed"] = "CreationsClaimed"
    creations: tuple[DueCreation, ...]
    on_duty: bool = True
    """False if another run holds the leader lease. This run then gets no creations."""
    next_in_sec: float | None = None
    """Seconds until the next creation can be due, if `creations` is empty. None if no creation waits."""
    awaited: int = 0
    """Number of accounts that CSP has created and no sync has imported yet."""
    awaited_sec: float | None = None
    """Seconds since the newest of them was recorded."""


class DueAccess(BaseModel):
    """A claimed login: to create unless `remove` is set."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sandbox_id: str
    external_id: str
    """UUID of the account in CSP."""
    claim_id: uuid.UUID
    remove: bool = False
    """Delete the user, because the lease has ended."""
    email: str
    groups: tuple[str, ...]
    password: str | None = Field(default=None, repr=False)
    """Encrypted with a key of ACCESS_KEYS. The same in each claim of a login. None with `remove`."""
    user_id: str | None = None
    """None: not recorded, so a user with an unknown id may exist."""
    attempts: int
    """Number of failed attempts."""
    waiting_sec: float
    """Seconds since the lease began or, with `remove`, since it ended."""


class AccessClaimed(Message):
    type: Literal["AccessClaimed"] = "AccessClaimed"
    logins: tuple[DueAccess, ...]
    next_in_sec: float | None = None
    """Seconds until the next login can be due, if `logins` is empty. None if none is pending."""


class AccessKeysRotated(Message):
    type: Literal["AccessKeysRotated"] = "AccessKeysRotated"
    rotated: int
    remaining: int
    """Passwords that another key than the first one encrypts."""
    unreadable: int
    """Those of them that no key of ACCESS_KEYS decrypts."""


class Recorded(Message):
    """The command was carried out. `changed` is false if it had been carried out before."""

    type: Literal["Recorded"] = "Recorded"
    changed: bool


class ListingBegun(Message):
    type: Literal["ListingBegun"] = "ListingBegun"
    listing_id: int


class ListingStaged(Message):
    type: Literal["ListingStaged"] = "ListingStaged"
    staged: int


class ListingApplied(Message):
    """Counts of an applied listing. `reopened`: recorded as deleted, but still listed by CSP. `leaked`: listed by
    CSP, but not in the pool."""

    type: Literal["ListingApplied"] = "ListingApplied"
    synced: int
    discovered: int
    restored: int
    marked_stale: int
    reopened: int = 0
    leaked: int = 0


class SandboxesRefreshed(Message):
    """Names were updated. `last` is the id of the last updated sandbox, None if no sandbox was left to update."""

    type: Literal["SandboxesRefreshed"] = "SandboxesRefreshed"
    last: str | None


class Purged(Message):
    type: Literal["Purged"] = "Purged"
    count: int


class PolicyChange(BaseModel):
    """Difference between the applied and the new policies."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    change: Literal["added", "changed", "removed"]
    fields: tuple[str, ...]
    """Fields with another value, by name. All fields of an added or a removed policy."""


class PoliciesApplied(Message):
    type: Literal["PoliciesApplied"] = "PoliciesApplied"
    changes: tuple[PolicyChange, ...]
    """Empty if the policies had been applied before."""


class StudentForgotten(Message):
    type: Literal["StudentForgotten"] = "StudentForgotten"
    pseudonym: str
    leases: int
    """Number of past leases that have the pseudonym now."""


class TokenLeasesEnded(Message):
    type: Literal["TokenLeasesEnded"] = "TokenLeasesEnded"
    sandbox_ids: tuple[str, ...]


class DeadLetterReplayed(Message):
    type: Literal["DeadLetterReplayed"] = "DeadLetterReplayed"
    dead_letter_id: uuid.UUID
    queue: str
    published: bool
    """False if all commands of the dead letter were skipped."""
    skipped: int
    """Number of skipped allocations, because the student has received a sandbox since the request."""


class CleanedUp(Message):
    type: Literal["CleanedUp"] = "CleanedUp"
    deleted: int
    failed: int
    """Number of failed attempts."""
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
    | StudentWaiting
    | LeaseExtended
    | SandboxReleased
    | LineServed
    | PlayEnded
    | LeasesExpired
    | AccessClaimed
    | AccessKeysRotated
    | DeletionsClaimed
    | DeletionsHurried
    | CleanedUp
    | CreationsClaimed
    | DeadLetterReplayed
    | TokenLeasesEnded
    | StudentForgotten
    | PoliciesApplied
    | Recorded
    | ListingBegun
    | ListingStaged
    | ListingApplied
    | SandboxesRefreshed
    | Purged
    | PoolSynced,
    Field(discriminator="type"),
]
