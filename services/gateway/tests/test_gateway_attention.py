"""Attention items: each problem with its next step, critical ones first."""

from typing import Any

import pytest

from gateway.api.schemas.status import Status
from gateway.attention import LowStock, find_items

NOW = 1_800_000_000
UP = {"state": "up", "problem": None}
DOWN = {"state": "down", "problem": "refused"}
SLOW = {"state": "unknown", "problem": "no answer in 0.3 s"}
POOL = {
    "total": 550,
    "available": 40,
    "allocated": 10,
    "pending_deletion": 0,
    "deletion_failed": 0,
    "stale": 0,
    "deleted": 500,
    "missing": 0,
    "standby": 0,
    "on_hold": 0,
}
CSP = {
    "listed_at": NOW - 60,
    "unfinished_since": None,
    "held": False,
    "pending_since": None,
    "failing": 0,
    "error": None,
}
QUEUE = {"queue": "reaper.events", "service": "reaper", "messages": 0, "consumers": 1, "problem": None}
STOPPED = {"name_prefix": "lab 1-", "stopped_at": NOW, "cause": "refused", "reason": "quota"}


def build_status(**changes: Any) -> Status:
    """Return a status without problems, then apply `changes`. `pool` and `csp` are merged key by key."""
    return Status.model_validate(
        {
            "checked_at": NOW,
            "rabbitmq": UP,
            "database": UP,
            "services": [{"service": "reaper", "state": "up"}],
            "queues": [QUEUE],
            "waiting": 0,
            "dead_letters": 0,
            "stopped_stock": [],
            "other_broker_at": None,
            "database_behind_at": None,
            "attention": [],
            **changes,
            "pool": {**POOL, **changes.get("pool", {})},
            "csp": {**CSP, **changes.get("csp", {})},
        }
    )


def test_a_healthy_broker_needs_nothing() -> None:
    assert find_items(build_status(), []) == []


@pytest.mark.parametrize(
    ("changes", "code", "severity", "part", "problem"),
    [
        ({"rabbitmq": DOWN, "queues": None}, "server_down", "critical", "RabbitMQ", "RabbitMQ is down: refused"),
        ({"database": SLOW}, "server_slow", "warning", "PostgreSQL", "has not answered yet: no answer in 0.3 s"),
        ({"database_behind_at": NOW}, "database_behind", "critical", "PostgreSQL", "older backup"),
        ({"other_broker_at": NOW - 90}, "other_broker", "critical", "PostgreSQL", "the same database 1 min ago"),
        (
            {"services": [{"service": "reaper", "state": "down"}]},
            "service_down",
            "critical",
            "reaper",
            "The reaper does not run",
        ),
        (
            {"services": [{"service": "reaper", "state": "partly"}], "queues": [QUEUE, {**QUEUE, "consumers": 0}]},
            "service_partly_down",
            "warning",
            "reaper",
            "The reaper does not consume reaper.events",
        ),
        (
            {"queues": [{**QUEUE, "messages": None, "consumers": None, "problem": "no answer in 0.3 s"}]},
            "queue_without_answer",
            "warning",
            "reaper.events",
            "no information about reaper.events: no answer in 0.3 s",
        ),
        (
            {"queues": [{**QUEUE, "messages": 5000}]},
            "queue_long",
            "warning",
            "reaper.events",
            "5,000 messages wait in reaper.events",
        ),
        ({"pool": {"available": 0}}, "pool_empty", "critical", "pool", "No sandbox is available"),
        ({"pool": {"available": 4}}, "pool_low", "warning", "pool", "Only 4 of 50 sandboxes are available"),
        (
            {"pool": {"deletion_failed": 1}},
            "deletions_failed",
            "warning",
            "deletions",
            "1 deletion failed permanently",
        ),
        ({"pool": {"missing": 2}}, "sandboxes_missing", "warning", "pool", "2 students hold a sandbox that CSP no"),
        ({"stopped_stock": [STOPPED]}, "stock_stopped", "critical", "stock", "No account is created for lab 1-: q"),
        ({"csp": {"held": True}}, "sync_held", "critical", "CSP", "A sync is held"),
        ({"csp": {"unfinished_since": NOW - 600}}, "listing_unfinished", "warning", "CSP", "began 10 min ago has"),
        ({"csp": {"listed_at": NOW - 7200}}, "listing_old", "warning", "CSP", "Last listing of CSP: 2 h ago"),
        ({"csp": {"listed_at": None}}, "listing_old", "warning", "CSP", "Last listing of CSP: never"),
        (
            {"csp": {"failing": 3, "error": "HTTP 500"}},
            "deletions_failing",
            "warning",
            "CSP",
            "3 pending deletions have failed so far: HTTP 500",
        ),
        ({"csp": {"pending_since": NOW - 7200}}, "deletions_late", "warning", "CSP", "was requested 2 h ago"),
        ({"dead_letters": 7}, "dead_letters", "warning", "dead letters", "7 messages could not be processed"),
    ],
)
def test_each_problem_has_an_item(
    changes: dict[str, Any], code: str, severity: str, part: str, problem: str
) -> None:
    (item,) = find_items(build_status(**changes), [])
    assert (item.code, item.severity, item.part) == (code, severity, part)
    assert problem in item.problem
    assert not item.problem.endswith(".")
    assert item.effect.endswith(".")
    assert item.advice.endswith(".")


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"unfinished_since": NOW - 170}, False),
        ({"listed_at": NOW - 3500}, False),
        ({"pending_since": NOW - 3500}, False),
        ({"pending_since": NOW - 3700}, True),
    ],
)
def test_ages_have_a_limit(change: dict[str, Any], reported: bool) -> None:
    assert bool(find_items(build_status(csp=change), [])) is reported


def test_unknown_parts_are_no_problem() -> None:
    """Without PostgreSQL and RabbitMQ, only they are reported."""
    status = build_status(rabbitmq=DOWN, database=DOWN, services=[{"service": "reaper", "state": "unknown"}])
    status = status.model_copy(
        update={"queues": None, "pool": None, "csp": None, "dead_letters": None, "stopped_stock": None}
    )
    assert [item.part for item in find_items(status, [])] == ["RabbitMQ", "PostgreSQL"]


def test_a_stock_that_is_used_up_soon_is_reported() -> None:
    items = find_items(build_status(), [LowStock("lab-", 620.0, 60.0), LowStock("dns-", 0.0, 30.0)])
    assert [item.problem for item in items] == [
        "The stock of lab- is empty in 10 min",
        "The stock of dns- is empty",
    ]


def test_the_command_quotes_a_prefix_with_spaces() -> None:
    (item,) = find_items(build_status(stopped_stock=[STOPPED]), [])
    assert item.command == "brokerctl stock resume 'lab 1-'"


def test_critical_items_come_first() -> None:
    items = find_items(build_status(dead_letters=1, csp={"held": True}), [])
    assert [item.severity for item in items] == ["critical", "warning"]
