"""Attention items: the problems of the broker, the most severe first, each with the action of the person."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from console.rendering import format_age, format_duration

LOW_POOL_FRACTION = 0.1
LISTING_TIMEOUT_SEC = 180
MAX_LISTING_AGE_SEC = 3600
MAX_DELETION_AGE_SEC = 3600
LONG_QUEUE_MESSAGES = 1000
SOON_EMPTY_SEC = 3600

SERVICE_EFFECTS = {
    "allocator": "Students get an error until an allocator runs. No data is lost.",
    "reaper": "No sandbox is deleted and no lease expires until a reaper runs. No data is lost.",
    "csp-syncer": "New accounts are not imported until a csp-syncer runs.",
    "provisioner": "No account is created, so the pool is not refilled, until a provisioner runs.",
}


@dataclass(frozen=True, slots=True)
class AttentionItem:
    severity: Literal["critical", "warning"]
    title: str
    effect: str
    """The consequence, or the cause if it is known."""
    action: str
    """The next step, as a sentence."""
    link: str | None = None
    """Page of the console for the next step."""


def find_items(status: dict[str, Any], stock: dict[str, Any] | None) -> list[AttentionItem]:
    items = [*_check_status(status), *_check_stock(stock)]
    return sorted(items, key=lambda item: item.severity != "critical")


def _check_status(status: dict[str, Any]) -> Iterator[AttentionItem]:
    yield from _check_servers(status)
    if status["database_behind_at"] is not None:
        yield AttentionItem(
            "critical",
            "The database is an older backup",
            "It lacks the newest lease, so students get an error.",
            "Follow the section 'Backup and restore' of the runbook.",
        )
    if status["other_broker_at"] is not None:
        yield AttentionItem(
            "critical",
            "Another broker used this database",
            f"Last seen {format_age(status['other_broker_at'])}.",
            "Find the allocator that stopped, and correct its DATABASE_URL or AMQP_URL.",
        )
    for service in status["services"]:
        name = service["service"]
        effect = SERVICE_EFFECTS.get(name, "")
        if service["state"] == "down":
            yield AttentionItem(
                "critical", f"The {name} does not run", effect, f"Start the {name}, or read its log."
            )
        elif service["state"] == "partly":
            title = f"The {name} consumes only some of its queues"
            yield AttentionItem("warning", title, effect, "Read its log, and restart it.")
    for queue in status["queues"] or []:
        if (queue["messages"] or 0) >= LONG_QUEUE_MESSAGES:
            yield AttentionItem(
                "warning",
                f"{queue['messages']:,} messages wait in {queue['queue']}",
                "Its service may be slow or stopped.",
                "Check that its number falls, and read the log of its service.",
            )
    if status["pool"] is not None:
        yield from _check_pool(status["pool"])
    if status["csp"] is not None:
        yield from _check_csp(status["csp"])
    if status["dead_letters"]:
        yield AttentionItem(
            "warning",
            f"{_count(status['dead_letters'], 'message')} could not be processed",
            "Their effect is missing until they are replayed.",
            "Read the reasons, then replay or drop each.",
            "/dead-letters",
        )


def _check_servers(status: dict[str, Any]) -> Iterator[AttentionItem]:
    for name, server in (("RabbitMQ", status["rabbitmq"]), ("PostgreSQL", status["database"])):
        if server["state"] == "unknown":
            yield AttentionItem(
                "warning",
                f"{name} is slow",
                f"It has not answered yet: {server['problem']}.",
                "Look again in some seconds. After 5 s without an answer it counts as down.",
            )
        elif server["state"] != "up":
            yield AttentionItem(
                "critical",
                f"{name} does not answer",
                f"{server['problem'] or 'It is down'}. Students get an error until it is back.",
                "Start it, or call the platform engineer. All services reconnect by themselves.",
            )


def _check_pool(pool: dict[str, int]) -> Iterator[AttentionItem]:
    existing = pool["total"] - pool["deleted"]
    if pool["available"] == 0:
        yield AttentionItem(
            "critical",
            "No sandbox is available",
            "New students wait or get an error.",
            "Have accounts created in CSP, then sync. Used sandboxes never return.",
            "/sync",
        )
    elif pool["available"] < LOW_POOL_FRACTION * existing:
        yield AttentionItem(
            "warning",
            f"Only {pool['available']:,} of {existing:,} sandboxes are available",
            "The next classes may find no sandbox.",
            "Have accounts created in CSP, then sync.",
            "/sync",
        )
    if pool["deletion_failed"]:
        yield AttentionItem(
            "warning",
            f"{_count(pool['deletion_failed'], 'deletion')} failed permanently",
            "The accounts still exist in CSP.",
            "Read the reasons, then retry.",
            "/deletions",
        )
    if pool["missing"]:
        yield AttentionItem(
            "warning",
            f"{_count(pool['missing'], 'student')} in a sandbox that CSP no longer lists",
            "Their labs are probably broken.",
            "Find out why it was deleted in CSP. Replace the sandbox of each student.",
            "/sandboxes?status=allocated",
        )


def _check_csp(csp: dict[str, Any]) -> Iterator[AttentionItem]:
    now = time.time()
    if csp["held"]:
        yield AttentionItem(
            "critical",
            "A sync is held",
            "It would change too much of the pool, so the broker did not apply it.",
            "Compare its changes with CSP, then approve it or repair CSP.",
            "/sync",
        )
    unfinished, listed, pending = csp["unfinished_since"], csp["listed_at"], csp["pending_since"]
    if unfinished is not None and now - unfinished > LISTING_TIMEOUT_SEC:
        yield AttentionItem(
            "warning",
            "A listing of CSP has not arrived",
            f"It began {format_age(unfinished)}.",
            "Check that CSP answers and accepts the token, then sync.",
            "/sync",
        )
    elif listed is None or now - listed > MAX_LISTING_AGE_SEC:
        yield AttentionItem(
            "warning",
            f"Last listing of CSP: {format_age(listed)}",
            "New accounts are missing.",
            "Sync now.",
            "/sync",
        )
    if csp["failing"]:
        yield AttentionItem(
            "warning",
            f"{_count(csp['failing'], 'deletion')} failed so far",
            str(csp["error"]),
            "The reaper retries by itself. Look again in some minutes.",
            "/deletions",
        )
    elif pending is not None and now - pending > MAX_DELETION_AGE_SEC:
        yield AttentionItem(
            "warning",
            "Deletions are late",
            f"The oldest was requested {format_age(pending)}.",
            "Read the log of the reaper: an open circuit breaker, or a refused token.",
            "/deletions",
        )


def _check_stock(stock: dict[str, Any] | None) -> Iterator[AttentionItem]:
    for level in [] if stock is None else stock["stock"]:
        prefix = level["name_prefix"]
        if level["state"] == "stopped":
            yield AttentionItem(
                "critical",
                f"The stock of {prefix} is stopped",
                level["stop_reason"] or "Creations failed repeatedly.",
                "Repair the cause, then run brokerctl stock resume.",
            )
        elif level["exhaustion_sec"] is not None and level["exhaustion_sec"] < SOON_EMPTY_SEC:
            yield AttentionItem(
                "warning",
                f"{prefix} is empty in {format_duration(level['exhaustion_sec'])}",
                f"{level['available']:,} available, {level['recent_leases_per_hour']:.0f} leases an hour.",
                "Raise min and max of its stock rule if a class begins.",
                "/policies",
            )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
