"""Script files: Python versions, shellcheck, identical shared lines, and test_allocation.sh."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import CLEANUP, SCRIPTS, CannedServer, Run, Track, build_lease_reply

PYTHON_FILES = sorted(SCRIPTS.glob("instruqt_broker_*.py"))
SHELL_FILES = sorted(SCRIPTS.glob("instruqt_broker_*.sh"))


NEWER_SYNTAX = (
    ast.AnnAssign,
    ast.AsyncFunctionDef,
    ast.Await,
    ast.JoinedStr,
    ast.MatMult,
    ast.NamedExpr,
    ast.Nonlocal,
    ast.Starred,
    ast.YieldFrom,
)
"""Syntax that Python 2.7 or 3.5 does not parse."""


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_python_2_7_and_3_5_parse_a_script(path: Path) -> None:
    """They can then say that they are too old. The check found no difference from a real Python 2.7."""
    source = path.read_text("ascii")  # Python 2.7 expects ASCII
    for node in ast.walk(ast.parse(source)):
        where = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Starred):
            continue  # checked at the call and the display that contain it
        assert not isinstance(node, NEWER_SYNTAX), where
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            arguments = node.args
            assert not arguments.kwonlyargs, where
            assert not arguments.posonlyargs, where
            assert not [a for a in (*arguments.args, arguments.vararg, arguments.kwarg) if a and a.annotation], (
                where
            )
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None, where
        if isinstance(node, ast.Raise):
            assert node.cause is None, where
        if isinstance(node, ast.ClassDef):
            assert not node.keywords, where
        if isinstance(node, ast.Dict):
            assert None not in node.keys, where
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            assert not [item for item in node.elts if isinstance(item, ast.Starred)], where
        if isinstance(node, ast.Call):
            stars = [argument for argument in node.args if isinstance(argument, ast.Starred)]
            assert not stars or (len(stars) == 1 and node.args[-1] is stars[0]), where
            assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), where
    assert not re.search(r"\d_\d", re.sub(r"[\"'].*?[\"']", "", source)), "digits with separators"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_the_check_of_the_version_comes_before_newer_imports(path: Path) -> None:
    body = ast.parse(path.read_text("ascii")).body
    check = next(index for index, node in enumerate(body) if isinstance(node, ast.If))
    imported = {alias.name for node in body[:check] if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"os", "platform", "sys"}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_an_older_python_ends_a_script_with_one_line(python_track: Track, broker: CannedServer, path: Path) -> None:
    (python_track.directory / "sandbox_id.txt").write_text("2012224")
    patch = "sys.version_info = (3, 7, 17); platform.python_version = lambda: '3.7.17'"
    run = python_track.run_patched(patch, path)
    assert (run.code, run.out) == (2, "")
    assert run.err == (
        "sandbox broker: ERROR: this is Python 3.7.17. Run the script with Python 3.8 or newer, "
        f"or use {path.stem}.sh, which needs no Python.\n"
    )
    assert broker.calls == []


def test_an_older_python_does_not_fail_a_lenient_cleanup(python_track: Track) -> None:
    python_track.environment["CLEANUP_STRICT"] = "false"
    run = python_track.run_patched("sys.version_info = (3, 7, 17)", SCRIPTS / f"{CLEANUP}.py")
    assert run.code == 0


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_a_script_imports_only_the_standard_library(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("files", [PYTHON_FILES, SHELL_FILES], ids=["python", "shell"])
def test_the_shared_lines_are_identical_in_both_scripts(files: list[Path]) -> None:
    shared = [
        re.findall(r"^# --- Shared.*^# --- End of the shared", path.read_text("utf-8"), re.M | re.S)
        for path in files
    ]
    assert [len(matches) for matches in shared] == [1, 1]
    assert shared[0] == shared[1]


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed for this platform")
    run = subprocess.run([shellcheck, *SCRIPTS.glob("*.sh")], capture_output=True, check=False)
    assert run.returncode == 0, run.stdout.decode()


def run_shell_test(python_track: Track) -> Run:
    """Run test_allocation.sh with the tests' Python as its python3."""
    python_track.environment["PATH"] = f"{Path(sys.executable).parent}:{python_track.environment['PATH']}"
    return python_track.run(str(SCRIPTS / "test_allocation.sh"), INSTRUQT_PARTICIPANT_ID=None)


def test_the_shell_test_shows_the_files_and_a_working_cleanup_command(
    python_track: Track, broker: CannedServer
) -> None:
    broker.replies = [build_lease_reply(201), build_lease_reply(200)]
    run = run_shell_test(python_track)
    assert (run.code, run.err) == (0, "")
    assert "OK: sandbox 2012224 both times" in run.out
    for name, content in python_track.files().items():
        assert re.search(rf"^{name} +{re.escape(content.strip())}$", run.out, re.M)
    first, second = (call.headers["X-Instruqt-Sandbox-ID"] for call in broker.calls)
    assert first == second
    assert first.startswith("test-student-")

    broker.replies = [build_lease_reply(200, status="pending_deletion")]
    [command] = re.findall(r"^cd .*", run.out, re.M)
    assert python_track.run("bash", "-c", command).code == 0
    assert broker.calls[2].path == "/v1/sandboxes/2012224/mark-for-deletion"
    assert broker.calls[2].headers["X-Instruqt-Sandbox-ID"] == first


def test_the_shell_test_fails_if_the_repeat_returns_another_sandbox(
    python_track: Track, broker: CannedServer
) -> None:
    broker.replies = [build_lease_reply(201), build_lease_reply(201, sandbox_id="2012225")]
    run = run_shell_test(python_track)
    assert run.code == 1
    assert "FAILED: the same student got sandbox 2012224, then 2012225" in run.err


def test_the_shell_test_stops_after_a_failed_allocation(python_track: Track, closed_origin: str) -> None:
    python_track.environment["BROKER_API_URL"] = closed_origin
    python_track.environment["BROKER_TIMEOUT_SEC"] = "0.2"
    run = run_shell_test(python_track)
    assert run.code == 1
    assert "The files" not in run.out
