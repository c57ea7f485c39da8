"""How the broker is, and what of that a person has to do something about."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from brokerctl.api import Api, Asking, no_gateway
from brokerctl.problems import Unavailable

STATUS_SEC = 0.5
"""For the gateway's answer, unless more is given: none of its parts has more than 0.3 s."""

FEW = 0.1
"""Of the pool: when fewer are available, it is said."""
LISTING_SEC = 180
"""For fetching and applying a listing; one that takes longer has failed."""
OLD_LISTING_SEC = 3600
OLD_DELETION_SEC = 3600
LONG_QUEUE = 1000

STARTS = {
    "allocator": "Students get 503 until one is started; nothing is lost.",
    "reaper": "Used sandboxes are not deleted and leases do not expire until one is started; nothing is lost.",
    "csp-syncer": "New accounts are not found until one is started.",
}


@dataclass(frozen=True, slots=True)
class Attention:
    part: str
    problem: str
    advice: str


def ask(api: Api, within_sec: float) -> dict[str, Any]:
    """What GET /v1/admin/status tells, whether the gateway is up, and what needs attention. Returns in time,
    whatever is down; raises Problem where it is not the gateway's being up that is in question."""
    try:
        status = Asking(lambda: api.get("status")).answer(within_sec)
        gateway: dict[str, Any] = {"state": "up", "problem": None}
    except TimeoutError as error:
        status, gateway = {}, {"state": "down", "problem": no_gateway(api.url, str(error))}
    except Unavailable as error:
        status, gateway = {}, {"state": "down", "problem": error.message}
    found = [asdict(entry) for entry in attention(gateway, status)]
    return {"gateway": gateway, **status, "attention": found}


def attention(gateway: Mapping[str, Any], status: Mapping[str, Any]) -> Iterator[Attention]:
    """The worst first."""
    if gateway["state"] != "up":
        yield Attention("gateway", gateway["problem"], "What is behind it cannot be seen from here.")
        return
    yield from _servers(status)
    yield from _services(status)
    if status["pool"] is not None:
        yield from _pool(status["pool"])
        yield from _csp(status["csp"])
    if status["dead_letters"]:
        yield Attention(
            "dead letters",
            f"{status['dead_letters']} messages could not be processed",
            "brokerctl dlq list, then dlq show, and dlq replay or dlq drop.",
        )


def _servers(status: Mapping[str, Any]) -> Iterator[Attention]:
    for part, name in (("rabbitmq", "RabbitMQ"), ("database", "PostgreSQL")):
        if status[part]["state"] != "up":
            yield Attention(
                name, status[part]["problem"], "Students get 503 until it is back; everything reconnects by itself."
            )


def _services(status: Mapping[str, Any]) -> Iterator[Attention]:
    queues = status["queues"] or []
    for service in status["services"]:
        name, state = service["service"], service["state"]
        if state == "down":
            yield Attention(name, "Nobody consumes its queues.", STARTS.get(name, "Start one."))
        elif state == "partly":
            lacking = [entry["queue"] for entry in queues if entry["consumers"] == 0 and _of(entry["queue"], name)]
            yield Attention(name, f"Nobody consumes {', '.join(lacking)}.", "Its log says why; restart it.")
    for entry in queues:
        if entry.get("problem"):
            yield Attention(
                entry["queue"],
                f"RabbitMQ gives no information about it: {entry['problem']}.",
                "Run rabbitmqctl cluster_status: is the node of this queue down? Start that node.",
            )
        elif entry["messages"] >= LONG_QUEUE:
            yield Attention(
                entry["queue"],
                f"{entry['messages']} messages wait.",
                "Look whether its consumer works, and at its log.",
            )


def _of(queue: str, service: str) -> bool:
    return queue.startswith(f"{service}.") or (service == "allocator" and queue.startswith("broker."))


def _pool(pool: Mapping[str, int]) -> Iterator[Attention]:
    kept = pool["total"] - pool["deleted"]
    if pool["available"] == 0:
        yield Attention(
            "pool", "Nothing is available: students get 409.", "Have sandboxes created, then brokerctl sync."
        )
    elif pool["available"] < FEW * kept:
        yield Attention(
            "pool",
            f"Only {pool['available']} of {kept} are available.",
            "Have sandboxes created, then brokerctl sync.",
        )
    if pool["deletion_failed"]:
        yield Attention(
            "deletions",
            f"{pool['deletion_failed']} failed for good.",
            "brokerctl pool --status deletion_failed shows why; brokerctl retry ID tries one anew.",
        )
    if pool["missing"]:
        yield Attention(
            "pool",
            f"{pool['missing']} students hold a sandbox that CSP no longer lists.",
            "Ask whether somebody has deleted it in CSP; brokerctl release ID lets the student get another.",
        )


def _csp(csp: Mapping[str, Any]) -> Iterator[Attention]:
    now = time.time()
    unfinished, listed, pending = csp["unfinished_since"], csp["listed_at"], csp["pending_since"]
    if csp["held"]:
        yield Attention(
            "CSP",
            "Its newest listing is held.",
            "brokerctl sync --show tells what it would change; --force applies it.",
        )
    if unfinished is not None and now - unfinished > LISTING_SEC:
        yield Attention(
            "CSP",
            f"The listing begun {ago(unfinished, now)} has not come.",
            "Does CSP answer, with our token? brokerctl sync tries now, and the csp-syncer's log has the error.",
        )
    elif listed is None or now - listed > OLD_LISTING_SEC:
        yield Attention("CSP", f"It was listed {ago(listed, now)}.", "brokerctl sync lists it now.")
    if csp["failing"]:
        yield Attention(
            "CSP",
            f"{csp['failing']} pending deletions have failed so far: {csp['error']}",
            "They are tried again by themselves; brokerctl cleanup tries them now.",
        )
    elif pending is not None and now - pending > OLD_DELETION_SEC:
        yield Attention(
            "CSP",
            f"A deletion has been pending since {ago(pending, now)}.",
            "The reaper's log says why: an open circuit, or a refused token. brokerctl cleanup tries it now.",
        )


def ago(at: float | None, now: float) -> str:
    if at is None:
        return "never"
    seconds = max(0, int(now - at))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
