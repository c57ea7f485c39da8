"""Evidence of a round: the requests and responses of the clients, and the final state of the database, RabbitMQ and
CSP.

All times are Unix seconds of one clock, because clients, PostgreSQL and the CSP simulator run on the same machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

OperationKind = Literal["allocate", "release", "read", "claim", "extend", "replace", "end_play"]
Outcome = Literal["ok", "refused", "unknown", "waiting"]
"""refused: the request has no effect, now or later. unknown: it may have had its effect, or have it later. waiting:
the student has a place in the waiting line, so a lease may follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Request of a client with its result. Each retry is a separate operation."""

    number: int
    kind: OperationKind
    student: str
    sandbox_id: str | None = None
    """Sandbox of the request, or sandbox in the response to an allocation."""
    new_sandbox_id: str | None = None
    """Sandbox in the response to a replacement."""
    idempotency_key: str | None = None
    token: str | None = None
    """Name of the token. None: a token of the settings."""
    secret: str | None = None
    """Secret of the lease in the request."""
    track_name: str | None = None
    """Lab of an allocation."""
    invoked_at: float
    ended_at: float
    outcome: Outcome
    status: int | None = None
    """HTTP status, if there was a response."""
    code: str = ""
    """Error code of the response, or class of the transport error."""
    retry_after_sec: float = 0
    allocated_at: int | None = None
    expires_at: int | None = None
    play_ended_at: int | None = None
    """Time of the end in an event of Instruqt."""


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
    mode: str = "active"
    policy: str | None = None
    track_name: str | None = None
    name_prefix: str | None = None
    token: str | None = None
    """Name of the token that the lease was made with. None: a token of the settings."""
    secret_hash: str | None = None
    """SHA-256 in hexadecimal digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """Named token with a scope."""

    name: str
    tracks: Sequence[str]
    """At least one."""
    prefixes: Sequence[str]
    """Empty: all."""
    max_active: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    sandbox_id: str
    external_id: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """Creation intent."""

    name: str
    state: str
    external_id: str | None
    granted_at: float
    flight_ended_at: float | None = None
    """Time from which it no longer counts for the `max` of its stock rule. None: it is in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Event as delivered by RabbitMQ. A duplicate is a second object with the same id."""

    event_id: str
    type: str
    sandbox_id: str | None
    occurred_at: float
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """Request to CSP to delete an account."""

    external_id: str
    began_at: float
    status: int | None
    """HTTP status, if the client waited for the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochObservation:
    """Row of the table of fencing epochs, as read at one moment of the round."""

    seen_at: float
    queue: str
    epoch: int
    backend_pid: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Time from a fault until a new student was served."""

    fault: str
    since: float
    """End of the fault, or its start if a standby can take over."""
    served_at: float | None
    """None if no probe succeeded before its time limit."""
    within_sec: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverPeriod:
    """Period with no fault except the death of at most one of the two allocators."""

    since: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Period in which the machine ran no process on time. Delays in it are not the broker's."""

    since: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    operations: Sequence[Operation]
    leases: Sequence[Lease]
    sandboxes: Sequence[Sandbox]
    unpublished: Sequence[str]
    """Ids of the events in the outbox."""
    events: Sequence[Event]
    """In the order of RabbitMQ, from before the first sandbox was discovered."""
    deletions: Sequence[Deletion]
    accounts: Mapping[str, str]
    """Names of the accounts in CSP, by external id."""
    epochs: Sequence[EpochObservation]
    recoveries: Sequence[Recovery]
    stats: Mapping[str, int]
    """The gateway's counts: one per status, and their `total`."""
    grace_sec: float
    """Time from the expiry of a lease to its end."""
    hold_sec: float = 0
    """Time from the replacement of a broken sandbox to its deletion."""
    collected_at: float
    """Time at which the database was read."""
    failover_periods: Sequence[FailoverPeriod] = ()
    stalls: Sequence[Stall] = ()
    """Without overlaps."""
    quotas: Mapping[str, int] = field(default_factory=dict)
    """Limit of the active leases of each policy, the same during the whole round."""
    tokens: Sequence[Token] = ()
    creations: Sequence[Creation] = ()
    stock_limits: Mapping[str, int] = field(default_factory=dict)
    """`max` of the stock rule of each name prefix, the same during the whole round."""
