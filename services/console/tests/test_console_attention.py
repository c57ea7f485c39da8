"""Attention items: each problem with its action, critical ones first."""

import time
from typing import Any

import pytest

from console.attention import find_items

NOW = time.time()
POOL = {
    "total": 100,
    "available": 80,
    "allocated": 20,
    "pending_deletion": 0,
    "deletion_failed": 0,
    "stale": 0,
    "deleted": 0,
    "missing": 0,
}
CSP = {
    "listed_at": NOW,
    "unfinished_since": None,
    "held": False,
    "pending_since": None,
    "failing": 0,
    "error": None,
}
UP = {"state": "up", "problem": None}
WELL: dict[str, Any] = {
    "rabbitmq": UP,
    "database": UP,
    "services": [{"service": "allocator", "state": "up"}],
    "queues": [{"queue": "allocator.commands", "messages": 0}],
    "pool": POOL,
    "csp": CSP,
    "dead_letters": 0,
    "other_broker_at": None,
    "database_behind_at": None,
}
LEVEL = {
    "name_prefix": "lab-",
    "state": "full",
    "stop_reason": None,
    "exhaustion_sec": None,
    "available": 5,
    "recent_leases_per_hour": 60.0,
}


def test_a_healthy_broker_needs_nothing() -> None:
    assert find_items(WELL, {"stock": [LEVEL]}) == []
    assert find_items(WELL, None) == []


@pytest.mark.parametrize(
    ("change", "severity", "title", "link"),
    [
        ({"rabbitmq": {"state": "down", "problem": "refused"}}, "critical", "RabbitMQ does not answer", None),
        ({"database": {"state": "unknown", "problem": "no answer"}}, "warning", "PostgreSQL is slow", None),
        ({"services": [{"service": "reaper", "state": "down"}]}, "critical", "The reaper does not run", None),
        ({"services": [{"service": "reaper", "state": "partly"}]}, "warning", "some of its queues", None),
        ({"queues": [{"queue": "q", "messages": 5000}]}, "warning", "5,000 messages wait in q", None),
        ({"pool": {**POOL, "available": 0}}, "critical", "No sandbox is available", "/sync"),
        ({"pool": {**POOL, "available": 5}}, "warning", "Only 5 of 100", "/sync"),
        ({"pool": {**POOL, "deletion_failed": 1}}, "warning", "1 deletion failed permanently", "/deletions"),
        ({"pool": {**POOL, "missing": 2}}, "warning", "2 students in a sandbox", "/sandboxes?status=allocated"),
        ({"csp": {**CSP, "held": True}}, "critical", "A sync is held", "/sync"),
        ({"csp": {**CSP, "listed_at": NOW - 7200}}, "warning", "Last listing of CSP: 2 h ago", "/sync"),
        ({"csp": {**CSP, "unfinished_since": NOW - 600}}, "warning", "has not arrived", "/sync"),
        ({"csp": {**CSP, "failing": 3, "error": "500"}}, "warning", "3 deletions failed so far", "/deletions"),
        ({"csp": {**CSP, "pending_since": NOW - 7200}}, "warning", "Deletions are late", "/deletions"),
        ({"dead_letters": 1}, "warning", "1 message could not be processed", "/dead-letters"),
        ({"other_broker_at": NOW}, "critical", "Another broker", None),
        ({"database_behind_at": NOW}, "critical", "older backup", None),
    ],
)
def test_each_problem_has_an_item(change: dict[str, Any], severity: str, title: str, link: str | None) -> None:
    (item,) = find_items({**WELL, **change}, None)
    assert item.severity == severity
    assert title in item.title
    assert item.link == link
    assert item.action.endswith(".")


def test_a_stopped_or_draining_stock_has_an_item() -> None:
    stopped = {**LEVEL, "state": "stopped", "stop_reason": "quota"}
    draining = {**LEVEL, "exhaustion_sec": 600.0}
    items = find_items(WELL, {"stock": [draining, stopped]})
    assert [(item.severity, item.title) for item in items] == [
        ("critical", "The stock of lab- is stopped"),
        ("warning", "lab- is empty in 10 min"),
    ]


def test_critical_items_come_first() -> None:
    items = find_items({**WELL, "dead_letters": 1, "csp": {**CSP, "held": True}}, None)
    assert [item.severity for item in items] == ["critical", "warning"]
