"""pip-audit with a local stand-in for the vulnerability database."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from devstack.audit import audit_locks, main
from devstack.ports import free_port

HASH = "0" * 64
VULNERABILITY = {
    "id": "PYSEC-2026-1",
    "summary": "bad",
    "affected": [
        {
            "package": {"name": "six", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.17.0"}]}],
        }
    ],
}

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def database(answer: Answer) -> Iterator[str]:
    """Serve the query API of OSV; `answer` returns status and body for a query."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = answer(query)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "service.txt"
    path.write_text(f"six==1.16.0 \\\n    --hash=sha256:{HASH}\nidna==3.10 \\\n    --hash=sha256:{HASH}\n")
    return path


def test_a_known_vulnerability_fails_and_names_the_package_and_the_fix(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(query: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"vulns": [VULNERABILITY]} if query["package"]["name"] == "six" else {}

    with database(answer) as url:
        assert audit_locks([lock, lock], url) == 1
    assert capsys.readouterr().err == "six 1.16.0 has PYSEC-2026-1, fixed in 1.17.0\n"


def test_every_package_is_queried(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queried = []

    def answer(query: dict[str, Any]) -> tuple[int, Any]:
        queried.append((query["package"]["name"], query["version"]))
        return 200, {}

    with database(answer) as url:
        assert audit_locks([lock], url) == 0
    assert {("six", "1.16.0"), ("idna", "3.10")} <= set(queried)
    assert capsys.readouterr().out == "no known vulnerability in 1 locked requirements files\n"


def test_an_unreachable_database_is_reported_without_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1/query"
    monkeypatch.setenv("AUDIT_URL", url)

    assert main() == 0

    output = capsys.readouterr()
    assert output.out.startswith(f"not audited: the vulnerability database {url} was not reached (")
    assert (output.out.count("\n"), output.err) == (1, "")


def test_a_database_that_stops_responding_is_reported_without_failure(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queried: list[str] = []

    def answer(query: dict[str, Any]) -> tuple[int, Any]:
        queried.append(query["package"]["name"])
        return (200 if len(queried) == 1 else 503), {}

    with database(answer) as url:
        assert audit_locks([lock], url) == 0
    assert len(queried) > 2
    assert "not audited: " in capsys.readouterr().out


def test_requirements_without_hashes_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "service.txt"
    path.write_text("six==1.16.0\n")
    with database(lambda _: (200, {})) as url:
        assert audit_locks([path], url) == 1
    assert "pip-audit failed for service.txt: " in capsys.readouterr().err


def test_the_locked_requirements_of_the_project_are_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    queried: set[str] = set()

    def answer(query: dict[str, Any]) -> tuple[int, Any]:
        queried.add(query["package"]["name"])
        return 200, {}

    with database(answer) as url:
        monkeypatch.setenv("AUDIT_URL", url)
        assert main() == 0
    assert {"fastapi", "asyncpg", "httpx", "pytest"} <= queried
