"""`brokerctl status`: the problems that the gateway lists, and those of the gateway itself."""

import threading
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from brokerctl import output
from brokerctl.attention import fetch_status
from brokerctl.client import AdminClient
from brokerctl.config import Config
from brokerctl.errors import OtherApi, Unavailable

UP = {"state": "up", "problem": None}
ITEM = {
    "code": "sync_held",
    "severity": "critical",
    "part": "CSP",
    "problem": "A sync is held",
    "effect": "It changes too much.",
    "advice": "Compare its changes with CSP.",
    "command": "brokerctl sync --show",
}


def build_status(**changes: Any) -> dict[str, Any]:
    return {
        "rabbitmq": UP,
        "database": UP,
        "services": [{"service": "reaper", "state": "up"}],
        "queues": [{"queue": "reaper.events", "service": "reaper", "messages": 0, "consumers": 1}],
        "pool": None,
        "csp": None,
        "dead_letters": 0,
        "attention": [],
        **changes,
    }


class FakeClient(AdminClient):
    """Client that passes its requests to `answer`."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        super().__init__(Config("http://broker", "token", None))
        self._answer = answer

    def get(self, *_: object, **__: object) -> Any:
        return self._answer()


def fail(error: Exception) -> Any:
    raise error


def render(status: dict[str, Any]) -> str:
    console = Console(width=200, file=StringIO())
    console.print(output.render_status("http://broker", status))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_problems_come_from_the_gateway() -> None:
    status = fetch_status(FakeClient(lambda: build_status(attention=[ITEM])), 60)
    assert (status["gateway"], status["attention"]) == (UP, [ITEM])
    shown = render(status)
    assert "A sync is held. It changes too much." in shown
    assert "Compare its changes with CSP. Run: brokerctl sync --show" in shown
    assert "CSP: A sync is held" in output.format_status_line(status).plain


def test_without_problems_nothing_needs_attention() -> None:
    assert "Nothing needs attention." in render(fetch_status(FakeClient(build_status), 60))


def test_a_gateway_of_an_earlier_version_is_no_healthy_broker() -> None:
    status = build_status()
    del status["attention"]
    (item,) = fetch_status(FakeClient(lambda: status), 60)["attention"]
    assert (item["part"], item["problem"]) == ("gateway", "It is of an earlier version, and lists no problems.")


def test_a_gateway_that_is_down_is_the_only_problem() -> None:
    status = fetch_status(FakeClient(lambda: fail(Unavailable("refused"))), 60)
    (item,) = status["attention"]
    assert (item["part"], item["problem"], status["gateway"]["state"]) == ("gateway", "refused", "down")
    assert "cannot be seen from here" in render(status)


def test_a_slow_gateway_is_unknown() -> None:
    may_answer = threading.Event()
    status = fetch_status(FakeClient(may_answer.wait), 0.01)
    may_answer.set()
    assert status["gateway"]["state"] == "unknown"
    assert "--within" in status["attention"][0]["problem"]


def test_an_answer_of_another_api_is_an_error() -> None:
    with pytest.raises(OtherApi):
        fetch_status(FakeClient(lambda: fail(OtherApi("no broker"))), 60)


def test_status_screen_shows_queue_without_information() -> None:
    queue = {"queue": "reaper.events", "messages": None, "consumers": None, "problem": "no answer in 0.3 s"}
    shown = render({"gateway": UP, **build_status(queues=[queue])})
    (line,) = [line.split() for line in shown.splitlines() if "reaper.events" in line]
    assert line == ["reaper.events", "?", "?"]
