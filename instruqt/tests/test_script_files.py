"""Script files: Python versions, identical shared lines, and test_allocation.sh."""

import ast
import re
import sys
from pathlib import Path

import pytest

from .conftest import SCRIPTS, CannedServer, Run, Track, build_lease_reply

PYTHON_FILES = sorted(SCRIPTS.glob("instruqt_broker_*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_python_3_6_parses_a_script(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 6))
    # `ast` does not check this: an unknown future feature is a syntax error before Python 3.7.
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_an_older_python_ends_a_script_with_one_line(track: Track, broker: CannedServer, path: Path) -> None:
    (track.directory / "sandbox_id.txt").write_text("2012224")
    run = track.run_patched("sys.version_info = (3, 7, 17); platform.python_version = lambda: '3.7.17'", path)
    assert (run.code, run.out) == (2, "")
    assert run.err == "sandbox broker: ERROR: this is Python 3.7.17. Run the script with Python 3.8 or newer.\n"
    assert broker.calls == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_a_script_imports_only_the_standard_library(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_the_shared_lines_are_identical_in_both_scripts() -> None:
    shared = [
        re.findall(r"^# --- Shared.*^# --- End of the shared", path.read_text("utf-8"), re.M | re.S)
        for path in PYTHON_FILES
    ]
    assert [len(matches) for matches in shared] == [1, 1]
    assert shared[0] == shared[1]


def run_shell_test(track: Track) -> Run:
    """Run test_allocation.sh with the tests' Python as its python3."""
    track.environment["PATH"] = f"{Path(sys.executable).parent}:{track.environment['PATH']}"
    return track.run(str(SCRIPTS / "test_allocation.sh"), INSTRUQT_PARTICIPANT_ID=None)


def test_the_shell_test_shows_the_files_and_a_working_cleanup_command(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(201), build_lease_reply(200)]
    run = run_shell_test(track)
    assert (run.code, run.err) == (0, "")
    assert "OK: sandbox 2012224 both times" in run.out
    for name, content in track.files().items():
        assert re.search(rf"^{name} +{re.escape(content.strip())}$", run.out, re.M)
    first, second = (call.headers["X-Instruqt-Sandbox-ID"] for call in broker.calls)
    assert first == second
    assert first.startswith("test-student-")

    broker.replies = [build_lease_reply(200, status="pending_deletion")]
    [command] = re.findall(r"^cd .*", run.out, re.M)
    assert track.run("bash", "-c", command).code == 0
    assert broker.calls[2].path == "/v1/sandboxes/2012224/mark-for-deletion"
    assert broker.calls[2].headers["X-Instruqt-Sandbox-ID"] == first


def test_the_shell_test_fails_if_the_repeat_returns_another_sandbox(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(201), build_lease_reply(201, sandbox_id="2012225")]
    run = run_shell_test(track)
    assert run.code == 1
    assert "FAILED: the same student got sandbox 2012224, then 2012225" in run.err


def test_the_shell_test_stops_after_a_failed_allocation(track: Track, closed_origin: str) -> None:
    track.environment["BROKER_API_URL"] = closed_origin
    track.environment["BROKER_TIMEOUT_SEC"] = "0.2"
    run = run_shell_test(track)
    assert run.code == 1
    assert "The files" not in run.out
