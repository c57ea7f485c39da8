"""HTTP server with canned replies, and fixtures that run the scripts against it.

Most tests run twice: with the Python scripts and with the shell scripts.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest

SCRIPTS = Path(__file__).parents[1]
ALLOCATION, CLEANUP = "instruqt_broker_allocation", "instruqt_broker_cleanup"
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
    """Canned reply, with faults for tests.

    `content_length` overstates the length of the body; `trickles` sends the body byte by byte; `drops` closes the
    connection without a reply; `hangs` never replies.
    """

    status: int = 201
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_length: int = 0
    trickles: bool = False
    drops: bool = False
    hangs: bool = False


def build_json_reply(status: int, body: object) -> Reply:
    return Reply(status, json.dumps(body).encode())


def build_lease_reply(status: int = 201, /, **changes: object) -> Reply:
    return build_json_reply(status, {**LEASE, **changes})


def build_refusal(status: int, code: str, message: str = "No.", **extra: object) -> Reply:
    return build_json_reply(status, {"detail": {"code": code, "message": message, "request_id": "req-1", **extra}})


def build_html_reply(status: int, **headers: str) -> Reply:
    """Build the HTML reply of a WAF or load balancer, with headers as keywords (`retry_after="1"`)."""
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
    """Send `replies` in order, then repeat the last one. Record every request in `calls`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = [build_lease_reply()]
        self.calls: list[Call] = []
        self.closing = threading.Event()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Ignore errors, because some tests close the connection early."""


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # otherwise a body waits up to 40 ms for the acknowledgement of its head

    def reply(self) -> None:
        server = cast(CannedServer, self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.calls.append(Call(self.command, self.path, self.headers, body, time.monotonic()))
        canned = server.replies[min(len(server.calls), len(server.replies)) - 1]
        if canned.hangs:
            server.closing.wait()
        if canned.hangs or canned.drops:
            return
        self.send_response(canned.status)
        for name, value in canned.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(canned.content_length or len(canned.body)))
        self.end_headers()
        if not canned.trickles:
            self.wfile.write(canned.body)
            return
        for byte in canned.body:
            self.wfile.write(bytes([byte]))
            if server.closing.wait(0.05):
                return

    do_GET = do_POST = do_CONNECT = reply  # noqa: N815 (names of the base class)

    def log_message(self, *_: object) -> None:
        """Keep the test output free of access logs."""


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
    """URL of a port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


SECRET_FILE = "lease_secret.txt"


@dataclass
class Track:
    """Working directory and environment of a lab host. Runs the scripts like Instruqt's hooks."""

    directory: Path
    environment: dict[str, str]

    shell: tuple[str, ...] = ()
    """Shell for the shell scripts; empty: the Python scripts run."""

    def script(self, name: str) -> tuple[str, ...]:
        """Return the command that runs a script."""
        if self.shell:
            return (*self.shell, str(SCRIPTS / f"{name}.sh"))
        return (*INTERPRETER, str(SCRIPTS / f"{name}.py"))

    def run(self, *command: str, **variables: str | None) -> Run:
        merged = {**self.environment, **variables}
        environment = {name: value for name, value in merged.items() if value is not None}
        # Shorter than the default time budget of 120 s, so that a script without its own budget fails the test. Long
        # enough for a busy machine.
        completed = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, timeout=100, check=False
        )
        out, err = completed.stdout.decode(), completed.stderr.decode()
        assert TOKEN not in out + err
        assert "Traceback" not in err
        assert "Warning" not in err
        return Run(completed.returncode, out, err)

    def allocate(self, *arguments: str, launcher: Sequence[str] = (), **variables: str | None) -> Run:
        return self.run(*launcher, *self.script(ALLOCATION), *arguments, **variables)

    def run_patched(self, statements: str, script: Path) -> Run:
        """Run `script` after `statements`, which change the modules os, platform and sys of its process."""
        code = (
            f"import os, platform, runpy, sys; {statements}; runpy.run_path({str(script)!r}, run_name='__main__')"
        )
        return self.run(*INTERPRETER, "-c", code)

    def clean_up(self, **variables: str | None) -> Run:
        return self.run(*self.script(CLEANUP), **variables)

    def files(self) -> dict[str, str]:
        """Return the content of each file by its name, without the secret of the lease."""
        return {
            path.name: path.read_text("utf-8")
            for path in self.directory.iterdir()
            if path.is_file() and path.name != SECRET_FILE
        }


@pytest.fixture(params=["python", "shell"])
def track(request: pytest.FixtureRequest, tmp_path: Path, broker: CannedServer) -> Track:
    """Track whose scripts run with Python, and as shell scripts with the machine's sh or INSTRUQT_TEST_SHELL."""
    track = build_track(tmp_path, broker)
    if request.param == "shell":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        track.shell = tuple(os.environ.get("INSTRUQT_TEST_SHELL", "sh").split())
    return track


@pytest.fixture
def python_track(tmp_path: Path, broker: CannedServer) -> Track:
    return build_track(tmp_path, broker)


def build_track(tmp_path: Path, broker: CannedServer) -> Track:
    directory = tmp_path / "track"
    directory.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "BROKER_API_URL": f"{broker.origin}/v1",
        "BROKER_API_TOKEN": TOKEN,
        "BROKER_TIMEOUT_SEC": "20",
        "INSTRUQT_PARTICIPANT_ID": "student-1",
    }
    return Track(directory, environment)
