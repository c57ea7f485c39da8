"""Attention items: the problems in a status report, each with the next step of an operator."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.api.schemas.pool import Stats
from gateway.api.schemas.status import AttentionItem, CspStatus, QueueStatus, Status, StoppedStock

LOW_POOL_FRACTION = 0.1
"""Report the pool when a smaller fraction of it is available."""
LISTING_TIMEOUT_SEC = 180
"""Time to fetch and apply a listing. After it the listing counts as failed."""
MAX_LISTING_AGE_SEC = 3600
MAX_DELETION_AGE_SEC = 3600
LONG_QUEUE_MESSAGES = 1000
SOON_EMPTY_SEC = 3600
"""Report a stock rule when its sandboxes last for a shorter time at the present rate of leases."""

SERVICE_EFFECTS = {
    "allocator": "Students get 503 until an allocator runs. No data is lost.",
    "reaper": "No sandbox is deleted and no lease expires until a reaper runs. No data is lost.",
    "csp-syncer": "New accounts are not imported until a csp-syncer runs.",
    "provisioner": "No account is created, so the pool is not refilled, until a provisioner runs.",
}


@dataclass(frozen=True, slots=True)
class LowStock:
    """Stock rule with sandboxes for less than SOON_EMPTY_SEC."""

    name_prefix: str
    exhaustion_sec: float
    leases_per_hour: float


def find_items(status: Status, low_stock: Sequence[LowStock]) -> list[AttentionItem]:
    """Return the problems, critical ones first. Ages refer to the time of the status."""
    items = [
        *_check_servers(status),
        *_check_database(status),
        *_check_services(status),
        *(() if status.pool is None else _check_pool(status.pool)),
        *_check_stock(status.stopped_stock or (), low_stock),
        *(() if status.csp is None else _check_csp(status.csp, status.checked_at)),
        *_check_dead_letters(status.dead_letters or 0),
    ]
    return sorted(items, key=lambda item: item.severity != "critical")


def _check_servers(status: Status) -> Iterator[AttentionItem]:
    for name, server in (("RabbitMQ", status.rabbitmq), ("PostgreSQL", status.database)):
        if server.state == "unknown":
            yield AttentionItem(
                code="server_slow",
                severity="warning",
                part=name,
                problem=f"{name} has not answered yet: {server.problem}",
                effect="A busy machine is slow. After 5 s without an answer it counts as down.",
                advice="Look again in some seconds.",
            )
        elif server.state == "down":
            yield AttentionItem(
                code="server_down",
                severity="critical",
                part=name,
                problem=f"{name} is down: {server.problem}",
                effect="Students get 503 until it is back.",
                advice="Start it, or call the platform engineer. All services reconnect by themselves.",
            )


def _check_database(status: Status) -> Iterator[AttentionItem]:
    if status.database_behind_at is not None:
        yield AttentionItem(
            code="database_behind",
            severity="critical",
            part="PostgreSQL",
            problem="The database is an older backup without the newest lease",
            effect="Students get 503.",
            advice="Import the lost leases as in the section 'Backup and restore' of the runbook, then confirm.",
            command="brokerctl restore confirm",
        )
    if status.other_broker_at is not None:
        age = _format_duration(status.checked_at - status.other_broker_at)
        yield AttentionItem(
            code="other_broker",
            severity="critical",
            part="PostgreSQL",
            problem=f"Another broker used the same database {age} ago",
            effect="One of the two allocators has stopped.",
            advice="Find the allocator that stopped, and correct its DATABASE_URL or AMQP_URL.",
        )


def _check_services(status: Status) -> Iterator[AttentionItem]:
    queues = status.queues or []
    for service in status.services:
        name = service.service
        effect = SERVICE_EFFECTS.get(name, "Its work waits until it runs.")
        if service.state == "down":
            yield AttentionItem(
                code="service_down",
                severity="critical",
                part=name,
                problem=f"The {name} does not run: its queues have no consumer",
                effect=effect,
                advice=f"Start the {name}, or read its log.",
            )
        elif service.state == "partly":
            unconsumed = [queue.queue for queue in queues if queue.service == name and queue.consumers == 0]
            yield AttentionItem(
                code="service_partly_down",
                severity="warning",
                part=name,
                problem=f"The {name} does not consume {', '.join(unconsumed)}",
                effect=effect,
                advice="Its log has the reason. Restart it.",
            )
    for queue in queues:
        yield from _check_queue(queue)


def _check_queue(queue: QueueStatus) -> Iterator[AttentionItem]:
    if queue.problem is not None:
        yield AttentionItem(
            code="queue_without_answer",
            severity="warning",
            part=queue.queue,
            problem=f"RabbitMQ gives no information about {queue.queue}: {queue.problem}",
            effect="The node of this queue may be down.",
            advice="Run rabbitmqctl cluster_status, and start the node if it is down.",
        )
    elif (queue.messages or 0) >= LONG_QUEUE_MESSAGES:
        yield AttentionItem(
            code="queue_long",
            severity="warning",
            part=queue.queue,
            problem=f"{queue.messages:,} messages wait in {queue.queue}",
            effect=f"The {queue.service} may be slow or stopped.",
            advice=f"Check that the number falls, and read the log of the {queue.service}.",
        )


def _check_pool(pool: Stats) -> Iterator[AttentionItem]:
    existing = pool.total - pool.deleted
    advice = "Have accounts created in CSP, then sync. Used sandboxes never return."
    if pool.available == 0:
        yield AttentionItem(
            code="pool_empty",
            severity="critical",
            part="pool",
            problem="No sandbox is available",
            effect="New students wait or get 409.",
            advice=advice,
            command="brokerctl sync",
        )
    elif pool.available < LOW_POOL_FRACTION * existing:
        yield AttentionItem(
            code="pool_low",
            severity="warning",
            part="pool",
            problem=f"Only {pool.available:,} of {existing:,} sandboxes are available",
            effect="The next classes may find no sandbox.",
            advice=advice,
            command="brokerctl sync",
        )
    if pool.deletion_failed:
        yield AttentionItem(
            code="deletions_failed",
            severity="warning",
            part="deletions",
            problem=f"{_count(pool.deletion_failed, 'deletion')} failed permanently",
            effect="The accounts still exist in CSP.",
            advice="Read the reasons, then retry each deletion.",
            command="brokerctl pool --status deletion_failed",
        )
    if pool.missing:
        verb = "holds" if pool.missing == 1 else "hold"
        yield AttentionItem(
            code="sandboxes_missing",
            severity="warning",
            part="pool",
            problem=f"{_count(pool.missing, 'student')} {verb} a sandbox that CSP no longer lists",
            effect="Their labs are probably broken.",
            advice="Find out why it was deleted in CSP. Replace the sandbox of each student.",
            command="brokerctl replace ID",
        )


def _check_stock(stopped: Sequence[StoppedStock], low: Sequence[LowStock]) -> Iterator[AttentionItem]:
    for rule in stopped:
        yield AttentionItem(
            code="stock_stopped",
            severity="critical",
            part="stock",
            problem=f"No account is created for {rule.name_prefix}: {rule.reason}",
            effect="The pool is not refilled.",
            advice="Repair the cause, then resume the stock.",
            command=f"brokerctl stock resume {shlex.quote(rule.name_prefix)}",
        )
    for level in low:
        rest = f"empty in {_format_duration(level.exhaustion_sec)}" if level.exhaustion_sec else "empty"
        yield AttentionItem(
            code="stock_low",
            severity="warning",
            part="stock",
            problem=f"The stock of {level.name_prefix} is {rest}",
            effect=f"It loses {level.leases_per_hour:,.0f} sandboxes an hour to new leases.",
            advice="Raise min and max of its stock rule if a class begins.",
            command="brokerctl stock",
        )


def _check_csp(csp: CspStatus, now: int) -> Iterator[AttentionItem]:
    if csp.held:
        yield AttentionItem(
            code="sync_held",
            severity="critical",
            part="CSP",
            problem="A sync is held",
            effect="It would change too much of the pool, so the broker did not apply it.",
            advice="Compare its changes with CSP, then approve it or repair CSP.",
            command="brokerctl sync --show",
        )
    if csp.unfinished_since is not None and now - csp.unfinished_since > LISTING_TIMEOUT_SEC:
        yield AttentionItem(
            code="listing_unfinished",
            severity="warning",
            part="CSP",
            problem=f"The listing that began {_format_duration(now - csp.unfinished_since)} ago has not arrived",
            effect="New accounts are not imported.",
            advice="Check that CSP answers and accepts the token, then sync. The csp-syncer logs the error.",
            command="brokerctl sync",
        )
    elif csp.listed_at is None or now - csp.listed_at > MAX_LISTING_AGE_SEC:
        age = "never" if csp.listed_at is None else f"{_format_duration(now - csp.listed_at)} ago"
        yield AttentionItem(
            code="listing_old",
            severity="warning",
            part="CSP",
            problem=f"Last listing of CSP: {age}",
            effect="New accounts are missing.",
            advice="Sync now.",
            command="brokerctl sync",
        )
    if csp.failing:
        verb = "has" if csp.failing == 1 else "have"
        yield AttentionItem(
            code="deletions_failing",
            severity="warning",
            part="CSP",
            problem=f"{_count(csp.failing, 'pending deletion')} {verb} failed so far: {csp.error}",
            effect="The accounts still exist in CSP.",
            advice="The reaper retries by itself. Look again in some minutes, or try now.",
            command="brokerctl cleanup",
        )
    elif csp.pending_since is not None and now - csp.pending_since > MAX_DELETION_AGE_SEC:
        yield AttentionItem(
            code="deletions_late",
            severity="warning",
            part="CSP",
            problem=f"The oldest pending deletion was requested {_format_duration(now - csp.pending_since)} ago",
            effect="Used accounts still exist in CSP.",
            advice="Read the log of the reaper: an open circuit breaker, or a refused token.",
            command="brokerctl cleanup",
        )


def _check_dead_letters(number: int) -> Iterator[AttentionItem]:
    if number:
        yield AttentionItem(
            code="dead_letters",
            severity="warning",
            part="dead letters",
            problem=f"{_count(number, 'message')} could not be processed",
            effect="Their effect is missing until they are replayed.",
            advice="Read the reasons, then replay or drop each.",
            command="brokerctl dlq list",
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_duration(seconds: float) -> str:
    """Return a duration in its largest unit, like `5 min`."""
    left = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if left >= size:
            return f"{left // size} {unit}"
    return f"{left} s"
