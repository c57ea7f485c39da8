"""What the files in this directory promise as files: old Pythons, shared lines, and the shell script."""

import ast
import re
import sys
from pathlib import Path

import pytest

from .conftest import SCRIPTS, CannedServer, Run, Track, lease

PYTHON_FILES = sorted(SCRIPTS.glob("instruqt_broker_*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_a_script_is_python_3_8(path: Path) -> None:
    ast.parse(path.read_text("utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_a_script_imports_the_standard_library_alone(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_the_shared_lines_are_the_same_in_both_scripts() -> None:
    shared = [
        re.findall(r"^# --- Shared.*^# --- End of the shared", path.read_text("utf-8"), re.M | re.S)
        for path in PYTHON_FILES
    ]
    assert [len(found) for found in shared] == [1, 1]
    assert shared[0] == shared[1]


def try_out(track: Track) -> Run:
    """test_allocation.sh, with this Python as its python3."""
    track.environment["PATH"] = f"{Path(sys.executable).parent}:{track.environment['PATH']}"
    return track.run(str(SCRIPTS / "test_allocation.sh"), INSTRUQT_PARTICIPANT_ID=None)


def test_the_try_out_shows_the_files_and_a_clean_up_command_that_works(track: Track, broker: CannedServer) -> None:
    broker.replies = [lease(201), lease(200)]
    run = try_out(track)
    assert (run.code, run.err) == (0, "")
    assert "OK: sandbox 2012224 both times" in run.out
    for name, content in track.files().items():
        assert re.search(rf"^{name} +{re.escape(content.strip())}$", run.out, re.M)
    first, second = (call.headers["X-Instruqt-Sandbox-ID"] for call in broker.calls)
    assert first == second
    assert first.startswith("test-student-")

    broker.replies = [lease(200, status="pending_deletion")]
    [command] = re.findall(r"^cd .*", run.out, re.M)
    assert track.run("bash", "-c", command).code == 0
    assert broker.calls[2].path == "/v1/sandboxes/2012224/mark-for-deletion"
    assert broker.calls[2].headers["X-Instruqt-Sandbox-ID"] == first


def test_the_try_out_fails_when_the_repeat_gets_another_sandbox(track: Track, broker: CannedServer) -> None:
    broker.replies = [lease(201), lease(201, sandbox_id="2012225")]
    run = try_out(track)
    assert run.code == 1
    assert "FAILED: the same student was given sandbox 2012224, then 2012225" in run.err


def test_the_try_out_stops_where_allocation_is_refused(track: Track, closed_origin: str) -> None:
    track.environment["BROKER_API_URL"] = closed_origin
    track.environment["BROKER_TIMEOUT_SEC"] = "0.2"
    run = try_out(track)
    assert run.code == 1
    assert "The files" not in run.out
