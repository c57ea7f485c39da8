"""Status report of all components."""

from typing import Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count, MaybeCount, MaybeSeconds, QueueName, UnixSeconds
from gateway.api.schemas.pool import Stats


class QueueStatus(BaseModel):
    queue: QueueName
    service: str = Field(examples=["allocator"], description="the service that consumes the queue")
    messages: MaybeCount = Field(
        description="waiting messages; null while RabbitMQ does not respond for this queue"
    )
    consumers: MaybeCount = Field(
        description="active and standby consumers; null while RabbitMQ does not respond for this queue"
    )
    problem: str | None = Field(
        examples=[None, "no answer in 0.3 s"], description="null if RabbitMQ responds for this queue"
    )


ServiceState = Literal["up", "partly", "down", "unknown"]


class ServiceStatus(BaseModel):
    service: str = Field(examples=["reaper"])
    state: ServiceState = Field(
        description="derived from the consumers of its queues. `partly`: some queues have no consumer. `unknown`: "
        "RabbitMQ is down, or responds for none of its queues"
    )


class PartStatus(BaseModel):
    state: Literal["up", "down", "unknown"] = Field(
        description="`unknown`: no answer yet, which a busy machine can cause. "
        "`down`: it refused, or has not answered for 5 s"
    )
    problem: str | None = Field(examples=[None, "no answer in 0.3 s"])


class CspStatus(BaseModel):
    """State of CSP according to the records of the broker. The gateway sends no request to CSP."""

    listed_at: MaybeSeconds = Field(description="start of the latest applied listing")
    unfinished_since: MaybeSeconds = Field(
        description="start of a newer listing that is incomplete: a sync is running, or CSP did not respond"
    )
    held: bool = Field(
        examples=[False],
        description="true if the newest listing waits for an administrator, see GET /v1/admin/sync",
    )
    pending_since: MaybeSeconds = Field(description="time of the oldest pending deletion request")
    failing: Count = Field(description="pending deletions that have failed at least once")
    error: str | None = Field(
        examples=["CSP answered 500", None], description="the error of the latest such failure"
    )


class StoppedStock(BaseModel):
    """Name prefix for which no account is created until an operator resumes it."""

    name_prefix: str = Field(examples=["lab-adventure-"])
    stopped_at: UnixSeconds
    cause: Literal["refused", "failures"] = Field(
        description="`refused`: CSP refused a creation, for example for its quota. `failures`: too many failed "
        "attempts in a row"
    )
    reason: str = Field(examples=["CSP refused the creation with 403: the quota is used up"])


AttentionCode = Literal[
    "server_slow",
    "server_down",
    "database_behind",
    "other_broker",
    "service_down",
    "service_partly_down",
    "queue_without_answer",
    "queue_long",
    "pool_empty",
    "pool_low",
    "deletions_failed",
    "sandboxes_missing",
    "stock_stopped",
    "stock_low",
    "sync_held",
    "listing_unfinished",
    "listing_old",
    "deletions_failing",
    "deletions_late",
    "dead_letters",
]


class AttentionItem(BaseModel):
    """A problem and the next step of an operator. Texts are for people and may change; `code` is for programs."""

    code: AttentionCode = Field(
        examples=["sync_held"], description="kind of the problem. Later versions may add kinds"
    )
    severity: Literal["critical", "warning"]
    part: str = Field(examples=["CSP", "reaper"], description="component, queue, or part of the pool")
    problem: str = Field(examples=["A sync is held"], description="no full stop at the end")
    effect: str = Field(
        examples=["It would change too much of the pool, so the broker did not apply it."],
        description="the consequence, or the cause if it is known",
    )
    advice: str = Field(examples=["Compare its changes with CSP, then approve it or repair CSP."])
    command: str | None = Field(
        default=None, examples=["brokerctl sync --show", None], description="command of brokerctl for the next step"
    )


class Status(BaseModel):
    checked_at: UnixSeconds
    rabbitmq: PartStatus
    database: PartStatus
    services: list[ServiceStatus]
    queues: list[QueueStatus] | None = Field(description="null while RabbitMQ does not respond")
    pool: Stats | None = Field(description="null while the database does not respond, like all fields below")
    csp: CspStatus | None
    waiting: Count | None = Field(description="students in the waiting line")
    dead_letters: Count | None
    stopped_stock: list[StoppedStock] | None = Field(
        description="stopped prefixes with a stock rule, see GET /v1/admin/stock"
    )
    other_broker_at: UnixSeconds | None = Field(
        description="last time that an allocator of another broker used the database, null after ten minutes"
    )
    database_behind_at: UnixSeconds | None = Field(
        description="last time that an allocator found the newest lease missing in the database: it is an older "
        "backup, and allocations are refused. Null otherwise"
    )
    attention: list[AttentionItem] = Field(
        description="problems to solve, critical ones first; empty if all is well"
    )


class WhoAmI(BaseModel):
    name: str | None = Field(
        examples=[None, "instructors"], description="name of the token; null for a token of BROKER_ADMIN_TOKEN"
    )
    role: str = Field(examples=["admin"], description="`viewer`, `operator` or `admin`")
