"""Answers of other servers end each command with one line. Hostile texts do not reach the terminal."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest
from rich.console import Console

from brokerctl import output
from brokerctl.errors import CommandError, Unavailable
from brokerctl.main import app
from brokerctl.progress import ProgressLine

HOSTILE = "\x1b[2J[bold]x[/red]\r\nforged line\x07\u202egnp\x9b31m\ud800"
"""Control sequences, unbalanced markup of rich, a line break, a direction override and a surrogate."""
HOSTILE_KEY = HOSTILE.rstrip("\ud800")
ID = "af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"
STATES = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted", "total")
COUNTS = dict.fromkeys(STATES, 1)
CHANGE = {"count": 1, "examples": [{"sandbox_id": HOSTILE, "name": HOSTILE}]}
SUMMARY = {
    "sandbox_id": HOSTILE,
    "name": HOSTILE,
    "status": HOSTILE,
    "status_since": 1728054123,
    "holder": HOSTILE,
    "track_name": HOSTILE,
    "deletion_error": HOSTILE,
}
STEP = {"at": 1728054123, **dict.fromkeys(("event", "by", "holder", "error", "reason"), HOSTILE)}
TIMES = ("missing_since", "allocated_at", "expires_at", "ended_at", "deletion_requested_at", "deletion_due_at")
LETTER = {"dead_letter_id": ID, "died_at": 1728054123, "service": HOSTILE, "commands": [HOSTILE], "reason": HOSTILE}
SERVER = {"state": HOSTILE, "problem": HOSTILE}
STATUS = {
    "rabbitmq": SERVER,
    "database": SERVER,
    "services": [{"service": HOSTILE, "state": HOSTILE}, {"service": HOSTILE, "state": "partly"}],
    "queues": [{"queue": HOSTILE, "service": HOSTILE, "messages": None, "consumers": None, "problem": HOSTILE}],
    "pool": {**COUNTS, "missing": 1},
    "csp": {
        "listed_at": None,
        "unfinished_since": 1728054123,
        "held": True,
        "pending_since": None,
        "failing": 1,
        "error": HOSTILE,
    },
    "dead_letters": 1,
    "attention": [dict.fromkeys(("part", "problem", "effect", "advice", "command"), HOSTILE)],
}
TRANSITION = {"sandbox_id": HOSTILE, "status": HOSTILE, "deletion_requested_at": 1728054123}
COMMANDS: dict[str, Any] = {
    "status": STATUS,
    "pool": COUNTS,
    "pool --by track_name": {**COUNTS, "by": HOSTILE, "groups": [{**COUNTS, "value": HOSTILE}], "cursor": None},
    "pool --status stale": {"sandboxes": [SUMMARY], "cursor": None},
    "sandbox 1": {
        **SUMMARY,
        **dict.fromkeys(TIMES, 1728054123),
        "deleted_at": None,
        "history": [STEP],
        HOSTILE_KEY: HOSTILE,
    },
    "who ada": {
        "allocations": [
            {
                **SUMMARY,
                "allocated_at": 1728054123,
                "ended_at": None,
                "end_note": HOSTILE,
                "end_reason": HOSTILE,
            }
        ],
        "cursor": None,
    },
    "sync": {"status": "completed", "synced": HOSTILE, HOSTILE_KEY: HOSTILE},
    "cleanup": {"status": "completed", "deleted": HOSTILE},
    "release 1 --reason why": TRANSITION,
    "retry 1": TRANSITION,
    "dlq list": {"dead_letters": [LETTER], "cursor": None},
    "dlq show 1": {**LETTER, "payload": HOSTILE.replace("\n", ""), "encoding": HOSTILE, HOSTILE_KEY: HOSTILE},
    "dlq replay 1": {"dead_letter_id": ID, "queue": HOSTILE, "published": True, "skipped": 1},
    "dlq drop 1": {"dead_letter_id": ID},
}
"""Command line -> a valid answer with hostile texts."""
HELD = {
    "applied": None,
    "held": {
        "held_at": 1728054123,
        "reason": HOSTILE,
        **dict.fromkeys(("stale", "missing", "moved", "discovered", "restored"), CHANGE),
    },
}

OTHER_JSON = {
    "empty object": b"{}",
    "empty list": b"[]",
    "null": b"null",
    "number": b"1e400",
    "string": b'"ok"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "other API": b'{"status": "ok", "results": [{"id": 1}], "detail": "fine"}',
    "no JSON": b"<html>Welcome to the hotel Wi-Fi</html>",
    "no UTF-8": b'{"available": "\xff"}',
    "nothing": b"",
    "surrogate as a key": b'{"\\ud800": 1, "status": "completed"}',
}


class CannedGateway(ThreadingHTTPServer):
    """Send `body` with `status` as the answer to each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.body = b""


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server = cast(CannedGateway, self.server)
        self.send_response(server.status)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        self.wfile.write(server.body)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep the test output free of access logs."""


@pytest.fixture(scope="module")
def server() -> Iterator[CannedGateway]:
    with CannedGateway() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def gateway(server: CannedGateway, monkeypatch: pytest.MonkeyPatch) -> CannedGateway:
    server.status = 200
    monkeypatch.setenv("BROKER_API_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("BROKER_ADMIN_TOKEN", "an-admin-token-for-this-test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for console in (output.console, output.error_console):
        monkeypatch.setattr(console, "width", 1000)  # so that no text is wrapped
    return server


def run(command: str) -> None:
    """Run a command line in this process. Raises CommandError."""
    try:
        arguments = ["--within", "60"] if command.startswith("status") else []
        app([*command.split(), *arguments], standalone_mode=False)
    except SystemExit:
        pytest.fail("The command ended the process.")


def assert_harmless(text: str) -> None:
    assert "forged line" in text, "the hostile text was not shown at all"
    assert not [line for line in text.splitlines() if line.startswith("forged line")]
    assert not [char for char in text if not char.isprintable() and char != "\n"]


@pytest.mark.parametrize("options", ["", " --json"], ids=["screen", "json"])
@pytest.mark.parametrize("body", OTHER_JSON.values(), ids=OTHER_JSON.keys())
@pytest.mark.parametrize("command", [*COMMANDS, "sync --show"])
def test_an_answer_that_is_not_of_the_api_is_one_error(
    gateway: CannedGateway, capsys: pytest.CaptureFixture[str], command: str, body: bytes, options: str
) -> None:
    gateway.body = body
    with pytest.raises(Unavailable) as error_info:
        run(command + options)
    output.print_error(error_info.value, as_json=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "answers, but it is not this broker's API" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_load_balancer_without_a_gateway_is_named(gateway: CannedGateway) -> None:
    gateway.status, gateway.body = 503, b"<html>503 Service Unavailable</html>"
    with pytest.raises(Unavailable, match=r"answers HTTP 503 without this broker's JSON\. No gateway"):
        run("pool")


@pytest.mark.parametrize("field", ["code", "message"])
@pytest.mark.parametrize("status", [400, 401, 404])
def test_an_error_without_the_fields_of_the_api_is_recognised(
    gateway: CannedGateway, status: int, field: str
) -> None:
    gateway.status = status
    gateway.body = json.dumps({"detail": {"code": "C", "message": "M", field: [1]}}).encode()
    with pytest.raises(Unavailable, match=f"it is not this broker's API .HTTP {status}: "):
        run("pool")


@pytest.mark.parametrize("wrong", [None, -1, "40", 1.5, [], 1e300])
def test_a_field_of_another_type_is_named(gateway: CannedGateway, wrong: object) -> None:
    gateway.body = json.dumps({**COUNTS, "stale": wrong}).encode()
    with pytest.raises(Unavailable, match=r"HTTP 200: .*stale"):
        run("pool")


@pytest.mark.parametrize("time", [1e300, -1, "soon", True])
def test_a_time_that_is_no_time_is_rejected(gateway: CannedGateway, time: object) -> None:
    gateway.body = json.dumps({**TRANSITION, "deletion_requested_at": time}).encode()
    with pytest.raises(Unavailable, match="deletion_requested_at"):
        run("retry 1")


def test_pages_without_an_end_are_rejected(gateway: CannedGateway) -> None:
    gateway.body = json.dumps({"dead_letters": [], "cursor": "same"}).encode()
    with pytest.raises(Unavailable, match="the cursor of a page leads to the same page"):
        run("dlq list")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("pool", "dlq drop 1")])
def test_hostile_texts_do_not_reach_the_terminal(
    gateway: CannedGateway, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    gateway.body = json.dumps(COMMANDS[command]).encode()
    try:
        run(command)
    except CommandError as error:  # a job without a result
        output.print_error(error, as_json=False)
    captured = capsys.readouterr()
    assert_harmless(captured.out + captured.err)


def test_hostile_texts_in_a_held_sync_do_not_reach_the_terminal(
    gateway: CannedGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.body = json.dumps(HELD).encode()
    run("sync --show")
    assert_harmless(capsys.readouterr().out)


@pytest.mark.parametrize("status", [400, 401, 409, 503])
def test_hostile_texts_in_an_error_do_not_reach_the_terminal(
    gateway: CannedGateway, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    gateway.status = status
    gateway.body = json.dumps({"detail": {"code": HOSTILE, "message": HOSTILE, "request_id": HOSTILE}}).encode()
    with pytest.raises(CommandError) as error_info:
        run("pool")
    output.print_error(error_info.value, as_json=False)
    captured = capsys.readouterr()
    assert_harmless(captured.err)
    assert len(captured.err.splitlines()) == 1


def raise_hostile_error() -> str:
    raise Unavailable(HOSTILE)


@pytest.mark.parametrize("describe", [lambda: HOSTILE, raise_hostile_error], ids=["text", "error"])
def test_hostile_texts_in_a_progress_line_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], describe: Callable[[], str]
) -> None:
    console = Console(stderr=True, markup=False, highlight=False, emoji=False, force_terminal=True, width=200)
    monkeypatch.setattr("brokerctl.progress.error_console", console)
    with ProgressLine("Working") as progress:
        progress.update(describe)
        progress._line.stop()
        with console.capture() as capture:
            console.print(progress._line.renderable)
    capsys.readouterr()  # drop the control sequences of the spinner itself
    shown = capture.get()
    assert "[bold]x[/red]" in shown
    assert "\x1b[2J" not in shown
    assert not set(shown) & set("\x07\r\u202e\x9b\ud800")
