"""Payloads (`data`) of the events on `broker.events`: the contract for subscribers.

SQL statements of the allocator write them as JSON. A test validates that JSON against these classes.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sandbox_broker.contract.events import EventType
from sandbox_broker.contract.replies import PolicyChange
from sandbox_broker.contract.types import DeletionReason, LeaseMode


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SandboxEvent(_Data):
    sandbox_id: str
    external_id: str
    """UUID of the account in CSP."""
    name: str


class Allocated(SandboxEvent):
    holder: str
    track_name: str | None
    policy: str | None = None
    """Name of the policy of the lease. None for the defaults."""
    expires_at: int
    """Unix seconds. In standby the latest time of the claim."""
    mode: LeaseMode = "active"
    replaces: str | None = None
    """Broken sandbox of the same student that this one replaces."""


class Claimed(SandboxEvent):
    """The student has arrived, and the time of a standby lease has started."""

    holder: str
    first_holder: str | None
    """Student id under which the lease was taken, if the claim gave it to another one."""
    track_name: str | None
    expires_at: int
    """Unix seconds."""
    request_id: str | None = None


class Extended(SandboxEvent):
    holder: str
    track_name: str | None
    reason: Literal["student", "admin"]
    note: str | None
    """Reason of the administrator."""
    extension_sec: int
    expires_at: int
    """End of the lease after the extension, in Unix seconds."""
    request_id: str | None = None


class Replaced(SandboxEvent):
    """A broken sandbox was replaced. Its deletion was requested in the same transaction, after a hold."""

    holder: str
    track_name: str | None
    reason: Literal["student", "admin"]
    note: str
    """Reason of the student or administrator."""
    replaced_by: str
    """Sandbox that the student has instead."""
    hold_until: int
    """Unix seconds."""
    request_id: str | None = None


class DeletionRequested(SandboxEvent):
    """Deletion of a sandbox was requested. `holder` and `track_name` are set if this ended a lease."""

    reason: DeletionReason
    holder: str | None = None
    track_name: str | None = None
    request_id: str | None = None
    """Id of the request that caused the deletion. None if the lease expired."""
    reopened: bool = False
    """The sandbox was recorded as deleted before, but CSP still lists the account."""


class DeletionFailed(SandboxEvent):
    """Deletion failed for good. An administrator has to retry or purge the sandbox."""

    attempts: int
    error: str


class SyncCompleted(_Data):
    listing_id: int
    synced: int
    """Number of accounts in the CSP listing."""
    discovered: int
    restored: int
    marked_stale: int
    reopened: int


class SyncHeld(_Data):
    listing_id: int
    reason: str


class PoolExhausted(_Data):
    name_prefix: str | None
    """Prefix of the requested sandboxes. None if any sandbox was requested."""


class _WaitingEvent(_Data):
    place: int
    """Number of the place: the line serves a lower one first."""
    holder: str
    name_prefix: str | None
    """Prefix of the requested sandboxes. None if any sandbox was requested."""
    track_name: str | None
    waiting_since: int
    """Unix seconds."""


class WaitingStarted(_WaitingEvent):
    """A student joined the waiting line."""

    ends_at: int
    """Unix seconds. The wait ends then at the latest."""


class WaitingServed(_WaitingEvent):
    """A student of the waiting line got a sandbox. `sandbox.allocated` announces the lease, too."""

    sandbox_id: str
    name: str
    waited_sec: int


class WaitingEnded(_WaitingEvent):
    """A student lost the place without a sandbox. `left`: gave up, or stopped repeating the request. `timed_out`:
    the longest wait is over. `refused`: the request can no longer succeed. `play_ended`: Instruqt has ended the
    play."""

    reason: Literal["left", "timed_out", "refused", "play_ended"]
    waited_sec: int


class _CreationEvent(_Data):
    creation_id: int
    """Id of the creation intent."""
    name: str
    name_prefix: str
    """Prefix of the stock rule."""


class SandboxCreated(_CreationEvent):
    """CSP has a new account for the stock. The sandbox becomes available by the next sync."""

    external_id: str
    """UUID of the account in CSP."""


class CreationFailed(_CreationEvent):
    """The creation of an account was given up."""

    attempts: int
    error: str


class StockStopped(_Data):
    """No account is created for the prefix until an administrator resumes it."""

    name_prefix: str
    cause: Literal["refused", "failures"]
    """`refused`: CSP refused for a lasting reason, such as a quota."""
    reason: str
    """The last error."""


class StockResumed(_Data):
    name_prefix: str


class PolicyChanged(_Data):
    """An administrator applied policies that differ from the previous ones."""

    version: int
    changes: tuple[PolicyChange, ...]


class TokenChanged(_Data):
    name: str
    change: Literal["issued", "suspended", "resumed", "revoked"]


class _AccessEvent(SandboxEvent):
    """Events about the login inside a sandbox. They hold no email, no password and no user id."""

    holder: str


class AccessReady(_AccessEvent):
    """The student can fetch the login."""

    after_sec: int
    """Seconds since the begin of the lease."""


class AccessFailed(_AccessEvent):
    """The login could not be created. The broker tries it again later, so `access.ready` may follow."""

    error: str


class AccessEnded(_AccessEvent):
    """The lease ended. The password was erased, and the user inside the sandbox is to be deleted."""


class AccessRemoved(_AccessEvent):
    """The user inside the sandbox was deleted."""


class AccessRemains(_AccessEvent):
    """The account was deleted before its user, because the removal of the user took too long."""

    error: str | None
    """The last error."""


EVENT_DATA: Mapping[EventType, type[BaseModel]] = {
    "sandbox.discovered": SandboxEvent,
    "sandbox.allocated": Allocated,
    "lease.claimed": Claimed,
    "lease.extended": Extended,
    "sandbox.deletion_requested": DeletionRequested,
    "sandbox.replaced": Replaced,
    "sandbox.deleted": SandboxEvent,
    "sandbox.deletion_failed": DeletionFailed,
    "sandbox.stale": SandboxEvent,
    "sandbox.restored": SandboxEvent,
    "sync.completed": SyncCompleted,
    "sync.held": SyncHeld,
    "pool.exhausted": PoolExhausted,
    "waiting.started": WaitingStarted,
    "waiting.served": WaitingServed,
    "waiting.ended": WaitingEnded,
    "sandbox.created": SandboxCreated,
    "creation.failed": CreationFailed,
    "stock.stopped": StockStopped,
    "stock.resumed": StockResumed,
    "policy.changed": PolicyChanged,
    "token.changed": TokenChanged,
    "access.ready": AccessReady,
    "access.failed": AccessFailed,
    "access.ended": AccessEnded,
    "access.removed": AccessRemoved,
    "access.remains": AccessRemains,
}
