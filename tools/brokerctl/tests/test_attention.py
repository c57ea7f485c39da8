"""Problems that `brokerctl status` reports as needing attention."""

import time
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from brokerctl import output
from brokerctl.attention import find_attention_items

UP = {"state": "up", "problem": None}
QUEUES = {
    "allocator.commands": "allocator",
    "allocator.maintenance": "allocator",
    "reaper.events": "reaper",
    "csp-syncer.commands": "csp-syncer",
    "broker.dead_letters": "allocator",
}
"""Queue -> service."""


def build_status(**changes: Any) -> dict[str, Any]:
    """Return a status without problems, then apply `changes`. `pool`, `csp` and `states` are merged key by key."""
    now = time.time()
    pool = {
        "available": 40,
        "allocated": 10,
        "pending_deletion": 0,
        "deletion_failed": 0,
        "stale": 0,
        "deleted": 500,
        "total": 550,
        "missing": 0,
    }
    csp = {
        "listed_at": now - 60,
        "unfinished_since": None,
        "held": False,
        "pending_since": None,
        "failing": 0,
        "error": None,
    }
    states = {"allocator": "up", "reaper": "up", "csp-syncer": "up"} | changes.pop("states", {})
    return {
        "rabbitmq": UP,
        "database": UP,
        "services": [{"service": service, "state": state} for service, state in states.items()],
        "queues": [
            {"queue": queue, "service": service, "messages": 0, "consumers": 1} for queue, service in QUEUES.items()
        ],
        "pool": {**pool, **changes.pop("pool", {})},
        "csp": {**csp, **changes.pop("csp", {})},
        "dead_letters": 0,
        **changes,
    }


def find_problems(gateway: dict[str, Any], status: Any) -> list[tuple[str, str]]:
    items = list(find_attention_items(gateway, status))
    assert all(item.advice for item in items)
    return [(item.part, item.problem) for item in items]


def test_healthy_status_has_no_problems() -> None:
    assert find_problems(UP, build_status()) == []


DOWN = {"state": "down", "problem": "no answer in 0.3 s"}


@pytest.mark.parametrize(
    ("changes", "part", "problem"),
    [
        ({"rabbitmq": DOWN, "queues": None}, "RabbitMQ", "no answer in 0.3 s"),
        ({"database": DOWN}, "PostgreSQL", "no answer in 0.3 s"),
        (
            {"rabbitmq": {"state": "unknown", "problem": "no answer in 0.3 s"}},
            "RabbitMQ",
            "It has not answered yet: no answer in 0.3 s.",
        ),
        ({"states": {"reaper": "down"}}, "reaper", "Its queues have no consumer."),
        ({"pool": {"available": 0}}, "pool", "No sandbox is available: students get 409."),
        ({"pool": {"available": 4}}, "pool", "Only 4 of 50 sandboxes are available."),
        ({"pool": {"deletion_failed": 2}}, "deletions", "2 failed permanently."),
        ({"pool": {"missing": 1}}, "pool", "1 students hold a sandbox that CSP no longer lists."),
        ({"csp": {"held": True}}, "CSP", "The newest listing is held."),
        ({"csp": {"listed_at": None}}, "CSP", "Last listing: never."),
        ({"csp": {"failing": 3, "error": "HTTP 500"}}, "CSP", "3 pending deletions have failed so far: HTTP 500"),
        (
            {"database_behind_at": 1},
            "PostgreSQL",
            "The database is an older backup without the newest lease. Students get 503.",
        ),
        (
            {"stopped_stock": [{"name_prefix": "lab-", "reason": "CSP refused the creation with 403: quota"}]},
            "stock",
            "No account is created for lab-: CSP refused the creation with 403: quota",
        ),
        ({"dead_letters": 7}, "dead letters", "7 messages could not be processed"),
    ],
)
def test_problem_is_reported(changes: dict[str, Any], part: str, problem: str) -> None:
    status = build_status(**changes)
    if status["database"] is DOWN:
        status |= {"pool": None, "csp": None, "dead_letters": None}
    assert find_problems(UP, status) == [(part, problem)]


@pytest.mark.parametrize(("age_sec", "reported"), [(30, False), (600, True)])
def test_unfinished_listing_is_reported_after_its_timeout(age_sec: float, reported: bool) -> None:
    status = build_status(csp={"unfinished_since": time.time() - age_sec})
    assert [part for part, _ in find_problems(UP, status)] == (["CSP"] if reported else [])


@pytest.mark.parametrize(("age_sec", "reported"), [(600, False), (2 * 3600, True)])
def test_pending_deletion_is_reported_after_an_hour(age_sec: float, reported: bool) -> None:
    status = build_status(csp={"pending_since": time.time() - age_sec})
    assert [part for part, _ in find_problems(UP, status)] == (["CSP"] if reported else [])


def test_queues_without_a_consumer_are_named() -> None:
    status = build_status(states={"allocator": "partly"})
    for entry in status["queues"][2:]:
        entry["consumers"] = 0
    assert find_problems(UP, status) == [("allocator", "No consumer on broker.dead_letters.")]


def test_queues_without_a_consumer_are_named_with_an_earlier_gateway() -> None:
    """Its status does not name the service of a queue."""
    status = build_status(states={"allocator": "partly"})
    for entry in status["queues"]:
        del entry["service"]
    status["queues"][-1]["consumers"] = 0
    assert find_problems(UP, status) == [("allocator", "No consumer on broker.dead_letters.")]


def test_long_queue_is_reported() -> None:
    status = build_status()
    status["queues"][0]["messages"] = 5000
    assert find_problems(UP, status) == [("allocator.commands", "5000 messages wait.")]


def test_queue_without_information_is_reported() -> None:
    status = build_status()
    status["queues"][2] |= {"messages": None, "consumers": None, "problem": "no answer in 0.3 s"}
    assert find_problems(UP, status) == [
        ("reaper.events", "RabbitMQ gives no information about it: no answer in 0.3 s."),
    ]


def test_status_screen_shows_queue_without_information() -> None:
    status = build_status()
    status["queues"][2] |= {"messages": None, "consumers": None, "problem": "no answer in 0.3 s"}
    console = Console(width=200, file=StringIO())
    console.print(output.render_status("http://broker", {"gateway": UP, **status, "attention": []}))
    assert isinstance(console.file, StringIO)
    (line,) = [line.split() for line in console.file.getvalue().splitlines() if "reaper.events" in line]
    assert line == ["reaper.events", "?", "?"]


def test_gateway_that_is_down_is_the_only_problem_reported() -> None:
    assert find_problems({"state": "down", "problem": "refused"}, None) == [("gateway", "refused")]
