"""Status of the broker, and the problems in it for an operator to solve."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from brokerctl.answers import CspState, PoolCounts, Status
from brokerctl.client import AdminClient, BackgroundCall, describe_unreachable_gateway
from brokerctl.errors import OtherApi, Unavailable

STATUS_TIMEOUT_SEC = 0.5
"""Default time for the gateway's answer. The gateway limits each of its probes to 0.3 s."""

LOW_POOL_FRACTION = 0.1
"""Report the pool when a smaller fraction of it is available."""
LISTING_TIMEOUT_SEC = 180
"""Time to fetch and apply a listing. After it the listing counts as failed."""
MAX_LISTING_AGE_SEC = 3600
MAX_DELETION_AGE_SEC = 3600
LONG_QUEUE_MESSAGES = 1000

SERVICE_DOWN_ADVICE = {
    "allocator": "Start an allocator. Until then students get 503. No data is lost.",
    "reaper": "Start a reaper. Until then no sandbox is deleted and no lease expires. No data is lost.",
    "csp-syncer": "Start a csp-syncer. Until then new accounts are not imported.",
    "provisioner": "Start a provisioner. Until then no account is created, so the pool is not refilled.",
}


@dataclass(frozen=True, slots=True)
class AttentionItem:
    part: str
    problem: str
    advice: str


def fetch_status(client: AdminClient, timeout_sec: float) -> dict[str, Any]:
    """Return the body of GET /v1/admin/status, plus `gateway` (its state) and `attention` (a list of items).

    A gateway that is down, or unknown because it is slower than `timeout_sec`, is part of the result. Raises
    `CommandError` for everything else, such as a wrong token.
    """
    status: Status | None = None
    try:
        status = BackgroundCall(lambda: client.get("status", Status)).result(timeout_sec)
        gateway: dict[str, Any] = {"state": "up", "problem": None}
    except TimeoutError as error:
        problem = f"{describe_unreachable_gateway(client.url, str(error))} --within waits longer."
        gateway = {"state": "unknown", "problem": problem}
    except OtherApi:
        raise
    except Unavailable as error:
        gateway = {"state": "down", "problem": error.message}
    items = [asdict(item) for item in find_attention_items(gateway, status)]
    return {"gateway": gateway, **(status or {}), "attention": items}


def find_attention_items(gateway: Mapping[str, Any], status: Status | None) -> Iterator[AttentionItem]:
    """Yield the problems in a status, the most severe first."""
    if status is None:
        yield AttentionItem(
            "gateway", gateway["problem"], "The components behind the gateway cannot be seen from here."
        )
        return
    yield from _check_servers(status)
    if (other_broker_at := status.get("other_broker_at")) is not None:
        yield AttentionItem(
            "PostgreSQL",
            f"Another broker used the same database {format_age(other_broker_at, time.time())}.",
            "Find the allocator that stopped, and correct its DATABASE_URL or AMQP_URL.",
        )
    if status.get("database_behind_at") is not None:
        yield AttentionItem(
            "PostgreSQL",
            "The database is an older backup without the newest lease. Students get 503.",
            "Import the lost leases as in the runbook (Backup and restore), or run brokerctl restore confirm.",
        )
    yield from _check_services(status)
    if status["pool"] is not None:
        yield from _check_pool(status["pool"])
    for stopped in status.get("stopped_stock") or []:
        yield AttentionItem(
            "stock",
            f"No account is created for {stopped['name_prefix']}: {stopped['reason']}",
            f"Repair the cause, then run brokerctl stock resume {stopped['name_prefix']}.",
        )
    if status["csp"] is not None:
        yield from _check_csp(status["csp"])
    if status["dead_letters"]:
        yield AttentionItem(
            "dead letters",
            f"{status['dead_letters']} messages could not be processed",
            "Run brokerctl dlq list and dlq show, then dlq replay or dlq drop.",
        )


def _check_servers(status: Status) -> Iterator[AttentionItem]:
    for name, server in (("RabbitMQ", status["rabbitmq"]), ("PostgreSQL", status["database"])):
        if server["state"] == "unknown":
            yield AttentionItem(
                name,
                f"It has not answered yet: {server['problem']}.",
                "Run the command again. A busy machine is slow; a component without an answer for 5 s is down.",
            )
        elif server["state"] != "up":
            yield AttentionItem(
                name,
                server["problem"] or "It is down.",
                "Students get 503 until it is back. All services reconnect by themselves.",
            )


def _check_services(status: Status) -> Iterator[AttentionItem]:
    queues = status["queues"] or []
    for service in status["services"]:
        name, state = service["service"], service["state"]
        if state == "down":
            yield AttentionItem(
                name, "Its queues have no consumer.", SERVICE_DOWN_ADVICE.get(name, "Start the service.")
            )
        elif state == "partly":
            # A gateway of an earlier version does not name the service of a queue.
            unconsumed = [
                entry["queue"] for entry in queues if entry["consumers"] == 0 and entry.get("service", name) == name
            ]
            yield AttentionItem(
                name, f"No consumer on {', '.join(unconsumed)}.", "Its log has the reason. Restart it."
            )
    for entry in queues:
        if entry.get("problem"):
            yield AttentionItem(
                entry["queue"],
                f"RabbitMQ gives no information about it: {entry['problem']}.",
                "Run rabbitmqctl cluster_status: is the node of this queue down? Start that node.",
            )
        elif (entry["messages"] or 0) >= LONG_QUEUE_MESSAGES:
            yield AttentionItem(
                entry["queue"],
                f"{entry['messages']} messages wait.",
                "Check that its consumer makes progress, and read its log.",
            )


def _check_pool(pool: PoolCounts) -> Iterator[AttentionItem]:
    existing = pool["total"] - pool["deleted"]
    if pool["available"] == 0:
        yield AttentionItem(
            "pool",
            "No sandbox is available: students get 409.",
            "Have sandboxes created in CSP, then run brokerctl sync.",
        )
    elif pool["available"] < LOW_POOL_FRACTION * existing:
        yield AttentionItem(
            "pool",
            f"Only {pool['available']} of {existing} sandboxes are available.",
            "Have sandboxes created in CSP, then run brokerctl sync.",
        )
    if pool["deletion_failed"]:
        yield AttentionItem(
            "deletions",
            f"{pool['deletion_failed']} failed permanently.",
            "brokerctl pool --status deletion_failed shows the reasons; brokerctl retry ID tries one again.",
        )
    if pool["missing"]:
        yield AttentionItem(
            "pool",
            f"{pool['missing']} students hold a sandbox that CSP no longer lists.",
            "Find out why it was deleted in CSP; brokerctl release ID lets the student get another one.",
        )


def _check_csp(csp: CspState) -> Iterator[AttentionItem]:
    now = time.time()
    unfinished, listed, pending = csp["unfinished_since"], csp["listed_at"], csp["pending_since"]
    if csp["held"]:
        yield AttentionItem(
            "CSP",
            "The newest listing is held.",
            "brokerctl sync --show lists the changes it would make; brokerctl sync --force applies it.",
        )
    if unfinished is not None and now - unfinished > LISTING_TIMEOUT_SEC:
        yield AttentionItem(
            "CSP",
            f"The listing that began {format_age(unfinished, now)} has not arrived.",
            "Check that CSP answers and accepts our token. brokerctl sync tries now; the csp-syncer's log has the "
            "error.",
        )
    elif listed is None or now - listed > MAX_LISTING_AGE_SEC:
        yield AttentionItem("CSP", f"Last listing: {format_age(listed, now)}.", "brokerctl sync fetches one now.")
    if csp["failing"]:
        yield AttentionItem(
            "CSP",
            f"{csp['failing']} pending deletions have failed so far: {csp['error']}",
            "The reaper retries them; brokerctl cleanup tries them now.",
        )
    elif pending is not None and now - pending > MAX_DELETION_AGE_SEC:
        yield AttentionItem(
            "CSP",
            f"The oldest pending deletion was requested {format_age(pending, now)}.",
            "The reaper's log has the reason: an open circuit breaker, or a refused token. brokerctl cleanup tries "
            "it now.",
        )


def format_age(at: float | None, now: float) -> str:
    if at is None:
        return "never"
    seconds = max(0, int(now - at))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
