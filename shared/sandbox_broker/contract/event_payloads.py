"""What `data` of each event holds: the contract of whoever subscribes to `broker.events`.

The statements of the allocator write it as JSON; a test holds what they write against these classes.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from sandbox_broker.contract.events import EventType
from sandbox_broker.contract.types import DeletionReason


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OfSandbox(_Data):
    sandbox_id: str
    external_id: str
    """Of the account in CSP."""
    name: str


class Allocated(OfSandbox):
    holder: str
    track_name: str | None
    expires_at: int
    """Unix seconds."""


class DeletionRequested(OfSandbox):
    """`holder` and `track_name` are there when a lease ends with it."""

    reason: DeletionReason
    holder: str | None = None
    track_name: str | None = None
    request_id: str | None = None
    """Of the request that has asked for it; none where time was up."""
    reopened: bool = False
    """It was done before, and CSP still lists the account."""


class DeletionFailed(OfSandbox):
    """It was given up and waits for a person."""

    attempts: int
    error: str


class SyncCompleted(_Data):
    listing_id: int
    synced: int
    """Accounts that CSP lists."""
    discovered: int
    restored: int
    marked_stale: int
    reopened: int


class SyncHeld(_Data):
    listing_id: int
    reason: str


class PoolExhausted(_Data):
    name_prefix: str | None
    """Of the sandboxes that were asked for; none: of all."""


EVENT_DATA: Mapping[EventType, type[BaseModel]] = {
    "sandbox.discovered": OfSandbox,
    "sandbox.allocated": Allocated,
    "sandbox.deletion_requested": DeletionRequested,
    "sandbox.deleted": OfSandbox,
    "sandbox.deletion_failed": DeletionFailed,
    "sandbox.stale": OfSandbox,
    "sandbox.restored": OfSandbox,
    "sync.completed": SyncCompleted,
    "sync.held": SyncHeld,
    "pool.exhausted": PoolExhausted,
}
