"""What is known once a round of faults is over: what clients asked and were told, and what the database, RabbitMQ
and CSP say in the end.

All times are Unix seconds of this machine's one clock, which clients, PostgreSQL and the CSP simulator share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

OperationKind = Literal["allocate", "release"]
Outcome = Literal["ok", "refused", "unknown"]
"""unknown: it may have been done, or be done yet. refused: it was not done, and never will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One request of a client, and what came of it. A retry is an operation of its own."""

    number: int
    kind: OperationKind
    student: str
    sandbox_id: str | None = None
    """The one to release, or the one that was answered."""
    idempotency_key: str | None = None
    invoked_at: float
    ended_at: float
    outcome: Outcome
    status: int | None = None
    """The answer's HTTP status, if there was one."""
    code: str = ""
    """The code of a refusal, or what went wrong."""
    retry_after_sec: float = 0
    allocated_at: int | None = None
    expires_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    lease_id: int
    sandbox_id: str
    holder: str
    idempotency_key: str | None
    allocated_at: float
    expires_at: float
    ended_at: float | None = None
    end_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    sandbox_id: str
    external_id: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """As RabbitMQ delivered it; one that was published twice is here twice, under one id."""

    event_id: str
    type: str
    sandbox_id: str | None
    occurred_at: float
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """A call to CSP that was to delete an account."""

    external_id: str
    began_at: float
    status: int | None
    """None where the client went away before the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one of many looks at the table of epochs has found for a queue."""

    seen_at: float
    queue: str
    epoch: int
    backend_pid: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How long it took until a new student was given a sandbox, from when that is to be expected: from the end of a
    fault or, where a standby is there, from its beginning."""

    fault: str
    since: float
    served_at: float | None
    """None: nobody was, for as long as somebody tried."""
    within_sec: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """A time in which nothing was wrong but that of two allocators one, at most, had died."""

    since: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A time in which the machine kept even who only looks at the clock from running: it says nothing of the
    broker."""

    since: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    operations: Sequence[Operation]
    leases: Sequence[Lease]
    sandboxes: Sequence[Sandbox]
    unpublished: Sequence[str]
    """The ids of events that are still in the outbox."""
    events: Sequence[Event]
    """In the order in which RabbitMQ has carried them, from before the first sandbox was discovered."""
    deletions: Sequence[Deletion]
    accounts: frozenset[str]
    """The external ids that CSP has."""
    epochs: Sequence[Epoch]
    recoveries: Sequence[Recovery]
    stats: Mapping[str, int]
    """What the gateway counts: a number per status, and their `total`."""
    grace_sec: float
    """How long after its end a lease is still left to its student."""
    looked_at: float
    """When the database was read."""
    covered: Sequence[Covered] = ()
    stalls: Sequence[Stall] = ()
    """One after the other."""
