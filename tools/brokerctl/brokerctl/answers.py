"""Shapes of the admin API's answers, limited to the fields that brokerctl reads.

`validate_answer` checks an answer against a shape. Fields that a gateway of another version adds are allowed.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar

import msgspec

Shape = TypeVar("Shape")

Timestamp = Annotated[float, msgspec.Meta(ge=0, le=253_402_300_799)]
"""Unix seconds, at most the end of the year 9999."""
Count = Annotated[int, msgspec.Meta(ge=0)]
Identifier = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z-]{1,64}\Z")]


class InvalidAnswer(Exception):
    """The answer does not have the expected shape. The message names the first difference."""


class StateCounts(TypedDict):
    available: Count
    allocated: Count
    pending_deletion: Count
    deletion_failed: Count
    stale: Count
    deleted: Count
    total: Count


class PoolCounts(StateCounts):
    missing: Count
    standby: NotRequired[Count]
    """A gateway of an earlier version has neither standby leases nor sandboxes on hold."""
    on_hold: NotRequired[Count]


class GroupCounts(StateCounts):
    value: str


class Stats(StateCounts):
    standby: NotRequired[Count]
    on_hold: NotRequired[Count]
    by: NotRequired[str]
    groups: NotRequired[list[GroupCounts]]


class ServerState(TypedDict):
    state: str
    problem: str | None


class ServiceState(TypedDict):
    service: str
    state: str


class QueueState(TypedDict):
    queue: str
    messages: Count | None
    consumers: Count | None
    service: NotRequired[str]
    """A gateway of an earlier version does not name the service of a queue."""
    problem: NotRequired[str | None]


class CspState(TypedDict):
    listed_at: Timestamp | None
    unfinished_since: Timestamp | None
    held: bool
    pending_since: Timestamp | None
    failing: Count
    error: str | None


class AttentionItem(TypedDict):
    part: str
    problem: str
    effect: str
    advice: str
    command: str | None


class Status(TypedDict):
    rabbitmq: ServerState
    database: ServerState
    services: list[ServiceState]
    queues: list[QueueState] | None
    pool: PoolCounts | None
    csp: CspState | None
    dead_letters: Count | None
    attention: NotRequired[list[AttentionItem]]
    """A gateway of an earlier version lists no problems."""


class CreationTime(TypedDict):
    count: Count
    p50_sec: float | None
    p90_sec: float | None


class StockLevel(TypedDict):
    name_prefix: str
    policy: str
    state: str
    min: Count
    max: Count
    target: Count
    available: Count
    allocated: Count
    creating: Count
    waiting: Count
    exhaustion_sec: float | None
    creation: CreationTime
    failures: Count
    last_error: str | None
    stop_reason: str | None


class Stock(TypedDict):
    stock: list[StockLevel]
    asked_at: Timestamp | None


class StockResumed(TypedDict):
    name_prefix: str
    changed: bool


class KeysRotated(TypedDict):
    rotated: int
    remaining: int
    unreadable: int


class SandboxSummary(TypedDict):
    sandbox_id: str
    name: str
    status: str
    status_since: Timestamp
    holder: str | None
    track_name: str | None
    deletion_error: str | None


class Transition(TypedDict):
    at: Timestamp
    event: str
    by: str
    holder: str | None
    error: str | None
    reason: str | None


class Sandbox(SandboxSummary):
    missing_since: Timestamp | None
    allocated_at: Timestamp | None
    expires_at: Timestamp | None
    ended_at: Timestamp | None
    deletion_requested_at: Timestamp | None
    deletion_due_at: Timestamp | None
    deletion_hold_until: NotRequired[Timestamp | None]
    deleted_at: Timestamp | None
    history: list[Transition]


class Allocation(TypedDict):
    sandbox_id: str
    name: str | None
    track_name: str | None
    allocated_at: Timestamp
    ended_at: Timestamp | None
    end_note: str | None
    end_reason: str | None
    mode: NotRequired[str]
    """A gateway of an earlier version does not send the details of a lease."""
    claimed_at: NotRequired[Timestamp | None]
    extended_sec: NotRequired[Count]
    policy: NotRequired[str | None]
    replaced_by: NotRequired[str | None]


class Extension(TypedDict):
    expires_at: Timestamp
    max_expires_at: Timestamp


class Lease(TypedDict):
    sandbox_id: str
    name: str
    expires_at: Timestamp


class PoolSample(TypedDict):
    at: Timestamp
    available: Count
    allocated: Count
    pending_deletion: Count
    deletion_failed: Count
    stale: Count
    waiting: Count


class PoolHistory(TypedDict):
    samples: list[PoolSample]
    step_sec: Count


class WaitingStudent(TypedDict):
    holder: str
    name_prefix: str | None
    track_name: str | None
    waiting_since: Timestamp
    asked_at: Timestamp
    ends_at: Timestamp


class AppliedSync(TypedDict):
    applied_at: Timestamp
    synced: Count
    discovered: Count
    restored: Count
    marked_stale: Count
    reopened: Count
    leaked: NotRequired[Count]


class SandboxName(TypedDict):
    name: str


class Change(TypedDict):
    count: Count
    examples: list[SandboxName]


class HeldSync(TypedDict):
    held_at: Timestamp
    reason: str
    stale: Change
    missing: Change
    moved: Change
    discovered: Change
    restored: Change


class SyncState(TypedDict):
    applied: AppliedSync | None
    held: HeldSync | None


class RestoreConfirmed(TypedDict):
    changed: bool


class IssuedToken(TypedDict):
    name: str
    role: str
    token: str


class Token(TypedDict):
    name: str
    role: str
    tracks: list[str]
    prefixes: list[str]
    max_active: Count | None
    max_new_per_hour: Count | None
    max_rate: Count | None
    expires_at: Timestamp | None
    suspended_at: Timestamp | None
    last_used_at: Timestamp | None


class Tokens(TypedDict):
    tokens: list[Token]


class TokenLease(TypedDict):
    sandbox_id: str
    holder: str
    track_name: str | None
    allocated_at: Timestamp


class TokenSuspended(TypedDict):
    name: str
    released: list[str]
    leases: list[TokenLease]


class TokenResumed(TypedDict):
    name: str
    changed: bool


class StudentForgotten(TypedDict):
    pseudonym: str
    leases: Count


class AuditEntry(TypedDict):
    audit_id: Count
    at: Timestamp
    actor: str
    action: str
    object: str | None
    reason: str | None
    request_id: str | None
    address: str | None
    outcome: str


class Policies(TypedDict):
    policies: list[dict[str, Any]]


class PolicyChange(TypedDict):
    name: str
    change: str
    fields: list[str]


class PolicyChanges(TypedDict):
    changes: list[PolicyChange]


class TransitionResult(TypedDict):
    """Answer to a release and to a retry of a deletion."""

    sandbox_id: str
    status: str
    deletion_requested_at: Timestamp


class JobAnswer(TypedDict):
    """Answer to a request that can take long: the result, or the id of the job that is still running."""

    status: Literal["completed", "running"]
    job_id: NotRequired[Identifier]


class Job(TypedDict):
    job_id: Identifier
    state: str
    progress: dict[str, Count]
    result: dict[str, str | int | float | None] | None


class DeadLetterSummary(TypedDict):
    dead_letter_id: Identifier
    died_at: Timestamp
    service: str
    commands: list[str]
    reason: str


class DeadLetter(DeadLetterSummary):
    payload: str
    encoding: str


class DeadLetterReplayed(TypedDict):
    dead_letter_id: Identifier
    queue: str
    published: bool
    skipped: Count


class DeadLetterDropped(TypedDict):
    dead_letter_id: Identifier


def validate_answer(answer: Any, shape: type[Shape]) -> Shape:
    """Return the parsed JSON unchanged, with the type `shape`. Raises InvalidAnswer."""
    try:
        msgspec.convert(answer, shape)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as error:  # UnicodeError: a lone surrogate
        raise InvalidAnswer(str(error)) from None
    checked: Shape = answer
    return checked
