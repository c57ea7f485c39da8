"""What of a status is called to a person's attention."""

import time
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from brokerctl import screens
from brokerctl.outlook import attention

UP = {"state": "up", "problem": None}
QUEUES = (
    "allocator.commands",
    "allocator.maintenance",
    "reaper.events",
    "csp-syncer.commands",
    "broker.dead_letters",
)


def status(**changes: Any) -> dict[str, Any]:
    """One where all is well, but for the changes; those of pool, csp and states are by name."""
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
        "queues": [{"queue": queue, "messages": 0, "consumers": 1} for queue in QUEUES],
        "pool": {**pool, **changes.pop("pool", {})},
        "csp": {**csp, **changes.pop("csp", {})},
        "dead_letters": 0,
        **changes,
    }


def found(gateway: dict[str, Any], seen: dict[str, Any]) -> list[tuple[str, str]]:
    entries = list(attention(gateway, seen))
    assert all(entry.advice for entry in entries)
    return [(entry.part, entry.problem) for entry in entries]


def test_when_all_is_well_nothing_is() -> None:
    assert found(UP, status()) == []


DOWN = {"state": "down", "problem": "no answer in 0.3 s"}


@pytest.mark.parametrize(
    ("changes", "part", "problem"),
    [
        ({"rabbitmq": DOWN, "queues": None}, "RabbitMQ", "no answer in 0.3 s"),
        ({"database": DOWN}, "PostgreSQL", "no answer in 0.3 s"),
        ({"states": {"reaper": "down"}}, "reaper", "Nobody consumes its queues."),
        ({"pool": {"available": 0}}, "pool", "Nothing is available: students get 409."),
        ({"pool": {"available": 4}}, "pool", "Only 4 of 50 are available."),
        ({"pool": {"deletion_failed": 2}}, "deletions", "2 failed for good."),
        ({"pool": {"missing": 1}}, "pool", "1 students hold a sandbox that CSP no longer lists."),
        ({"csp": {"held": True}}, "CSP", "Its newest listing is held."),
        ({"csp": {"listed_at": None}}, "CSP", "It was listed never."),
        ({"csp": {"failing": 3, "error": "HTTP 500"}}, "CSP", "3 pending deletions have failed so far: HTTP 500"),
        ({"dead_letters": 7}, "dead letters", "7 messages could not be processed"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], part: str, problem: str) -> None:
    seen = status(**changes)
    if seen["database"] is DOWN:
        seen |= {"pool": None, "csp": None, "dead_letters": None}
    assert found(UP, seen) == [(part, problem)]


@pytest.mark.parametrize(("age_sec", "told"), [(30, False), (600, True)])
def test_a_listing_has_its_time(age_sec: float, told: bool) -> None:
    seen = status(csp={"unfinished_since": time.time() - age_sec})
    assert [part for part, _ in found(UP, seen)] == (["CSP"] if told else [])


@pytest.mark.parametrize(("age_sec", "told"), [(600, False), (2 * 3600, True)])
def test_a_deletion_may_be_pending_for_a_while(age_sec: float, told: bool) -> None:
    seen = status(csp={"pending_since": time.time() - age_sec})
    assert [part for part, _ in found(UP, seen)] == (["CSP"] if told else [])


def test_the_queues_that_lack_a_consumer_are_named() -> None:
    seen = status(states={"allocator": "partly"})
    seen["queues"][-1]["consumers"] = 0
    assert found(UP, seen) == [("allocator", "Nobody consumes broker.dead_letters.")]


def test_a_long_queue_is_named() -> None:
    seen = status()
    seen["queues"][0]["messages"] = 5000
    assert found(UP, seen) == [("allocator.commands", "5000 messages wait.")]


def test_a_queue_that_does_not_answer_is_named() -> None:
    seen = status()
    seen["queues"][2] |= {"messages": None, "consumers": None, "problem": "no answer in 0.3 s"}
    assert found(UP, seen) == [
        ("reaper.events", "RabbitMQ gives no information about it: no answer in 0.3 s."),
    ]


def test_the_screen_shows_a_queue_that_does_not_answer() -> None:
    seen = status()
    seen["queues"][2] |= {"messages": None, "consumers": None, "problem": "no answer in 0.3 s"}
    console = Console(width=200, file=StringIO())
    console.print(screens.status("http://broker", {"gateway": UP, **seen, "attention": []}))
    assert isinstance(console.file, StringIO)
    (line,) = [line.split() for line in console.file.getvalue().splitlines() if "reaper.events" in line]
    assert line == ["reaper.events", "?", "?"]


def test_behind_a_gateway_that_is_down_nothing_is_judged() -> None:
    assert found({"state": "down", "problem": "refused"}, {}) == [("gateway", "refused")]
