"""A canned HTTP server for all that may answer in the broker's place, and a way to run the scripts."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest

SCRIPTS = Path(__file__).parents[1]
INTERPRETER = (os.environ.get("INSTRUQT_TEST_PYTHON", sys.executable), "-ISX", "dev", "-W", "error")
TOKEN = "s3cret-track-token"
LEASE = {
    "sandbox_id": "2012224",
    "name": "sandbox-1",
    "external_id": "af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3",
    "allocated_at": 1728054123,
    "expires_at": 1728068523,
    "sfdc_account_id": None,
}


@dataclass(frozen=True)
class Reply:
    """One canned answer. `claims` overstates the body's length; `trickles` sends it a byte at a time;
    `drops` hangs up without a word; `hangs` never answers."""

    status: int = 201
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    claims: int = 0
    trickles: bool = False
    drops: bool = False
    hangs: bool = False


def json_reply(status: int, body: object) -> Reply:
    return Reply(status, json.dumps(body).encode())


def lease(status: int = 201, /, **changes: object) -> Reply:
    return json_reply(status, {**LEASE, **changes})


def refusal(status: int, code: str, message: str = "No.", **extra: object) -> Reply:
    return json_reply(status, {"detail": {"code": code, "message": message, "request_id": "req-1", **extra}})


def page(status: int, **headers: str) -> Reply:
    """What a WAF or a load balancer sends: HTML. A header is given as `retry_after=`."""
    html = b"<html><body>Request blocked</body></html>"
    return Reply(status, html, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    headers: Message
    body: bytes
    at: float


class CannedServer(ThreadingHTTPServer):
    """Answers with `replies` in turn, the last one for ever, and remembers every call."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = [lease()]
        self.calls: list[Call] = []
        self.closing = threading.Event()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the game."""


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server = cast(CannedServer, self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.calls.append(Call(self.command, self.path, self.headers, body, time.monotonic()))
        reply = server.replies[min(len(server.calls), len(server.replies)) - 1]
        if reply.hangs:
            server.closing.wait()
        if reply.hangs or reply.drops:
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.claims or len(reply.body)))
        self.end_headers()
        if not reply.trickles:
            self.wfile.write(reply.body)
            return
        for byte in reply.body:
            self.wfile.write(bytes([byte]))
            if server.closing.wait(0.05):
                return

    do_GET = do_POST = do_CONNECT = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Not in the tests' output."""


@pytest.fixture
def start_server() -> Iterator[Callable[[], CannedServer]]:
    servers: list[CannedServer] = []

    def start() -> CannedServer:
        server = CannedServer()
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def broker(start_server: Callable[[], CannedServer]) -> CannedServer:
    return start_server()


@pytest.fixture
def closed_origin() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@dataclass
class Track:
    """A lab host: its working directory and environment, in which a script runs as a hook would run it."""

    directory: Path
    environment: dict[str, str]

    def run(self, *command: str, **variables: str | None) -> Run:
        merged = {**self.environment, **variables}
        environment = {name: value for name, value in merged.items() if value is not None}
        # Far less than the budget of two minutes that a script has when it is not told another.
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, timeout=30, check=False
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        assert TOKEN not in out + err
        assert "Traceback" not in err
        assert "Warning" not in err
        return Run(done.returncode, out, err)

    def allocate(self, *launcher: str, **variables: str | None) -> Run:
        return self.run(*launcher, *INTERPRETER, str(SCRIPTS / "instruqt_broker_allocation.py"), **variables)

    def clean_up(self, **variables: str | None) -> Run:
        return self.run(*INTERPRETER, str(SCRIPTS / "instruqt_broker_cleanup.py"), **variables)

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text("utf-8") for path in self.directory.iterdir() if path.is_file()}


@pytest.fixture
def track(tmp_path: Path, broker: CannedServer) -> Track:
    environment = {
        "PATH": os.environ["PATH"],
        "BROKER_API_URL": f"{broker.origin}/v1",
        "BROKER_API_TOKEN": TOKEN,
        "BROKER_TIMEOUT_SEC": "5",
        "INSTRUQT_PARTICIPANT_ID": "student-1",
    }
    return Track(tmp_path, environment)
