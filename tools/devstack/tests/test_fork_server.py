"""Copies of a fork server behave like new interpreters."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from devstack import fork_server
from devstack.conditions import wait_until
from devstack.fork_server import can_fork, fork
from devstack.processes import Process

pytestmark = pytest.mark.skipif(not can_fork(os.environ), reason="copies need Linux")

MAIN = """
import json, os, signal, sys
importer = os.getpid()

def main():
    if "EXIT" in os.environ:
        sys.exit(int(os.environ["EXIT"]))
    facts = {
        "imported": importer != os.getpid(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "arguments": sys.argv,
        "leads a session": os.getsid(0) == os.getpid(),
        "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
    }
    print(json.dumps(facts), flush=True)
    print("error", file=sys.stderr, flush=True)
    signal.pause()
"""
SCRIPT = """
import runpy, sys
print("script", *sys.argv[1:], flush=True)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A service that prints facts about its process and waits, or exits with EXIT."""
    package = tmp_path / f"service_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(MAIN)
    (package / "__main__.py").write_text(f"from {package.name}.main import main\nmain()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return package.name


async def start(module: str, directory: Path, launcher: str = "-m", **environment: str) -> Process:
    return await fork("copy", module, launcher, env=environment, cwd=directory)


async def read_lines(process: Process, count: int) -> list[str]:
    await wait_until(lambda: len(process.tail) >= count or not process.running)
    return list(process.tail)


async def test_a_copy_has_its_own_environment_directory_output_and_session(module: str, tmp_path: Path) -> None:
    first = await start(module, tmp_path, GREETING="hello")
    second = await start(module, Path("/"))
    try:
        output, error = await read_lines(first, 2)
        facts = json.loads(output)
        # Another descriptor is that of the listing itself.
        assert [number for number in facts.pop("descriptors") if number > 2][1:] == []
        assert facts == {
            "imported": True,
            "environment": {"GREETING": "hello"},
            "directory": str(tmp_path),
            "arguments": [str(tmp_path / module / "__main__.py")],
            "leads a session": True,
        }
        assert error == "error"
        other = json.loads((await read_lines(second, 2))[0])
        assert (other["directory"], other["environment"]) == ("/", {})
        first.kill()
        assert await first.wait() == -signal.SIGKILL
        assert second.running
    finally:
        for process in (first, second):
            await process.stop()
    assert second.returncode == -signal.SIGTERM


async def test_the_exit_code_of_a_copy_is_returned(module: str, tmp_path: Path) -> None:
    copies = [await start(module, tmp_path, EXIT=str(code)) for code in (0, 3, 0, 5)]
    assert [await copy.wait() for copy in copies] == [0, 3, 0, 5]
    failed = await start(module, tmp_path, EXIT="text")
    assert await failed.wait() == 1
    assert "ValueError" in failed.tail[-1]


async def test_a_script_starts_the_service(module: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = await start(module, tmp_path, str(script))
    try:
        first, facts, _ = await read_lines(process, 3)
        assert first == f"script {module}"
        assert json.loads(facts)["imported"]
    finally:
        await process.stop()


async def test_copies_end_with_their_server(module: str, tmp_path: Path) -> None:
    process = await start(module, tmp_path)
    server = psutil.Process(process.pid).parent()
    assert server is not None
    server.kill()
    assert await asyncio.wait_for(process.wait(), 60) == -signal.SIGKILL
    with pytest.raises((ChildProcessError, BrokenPipeError)):
        await start(module, tmp_path)


async def test_a_module_that_cannot_be_imported_is_reported(tmp_path: Path) -> None:
    with pytest.raises((ChildProcessError, BrokenPipeError)):
        await start("no_such_service", tmp_path)


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH"])
def test_variables_of_the_interpreter_need_a_new_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert can_fork({**os.environ, "OTHER": "1"})
    assert not can_fork({**os.environ, name: "1"})


async def test_a_start_is_seen_by_audit_hooks(module: str, tmp_path: Path) -> None:
    """The fast lane of the tests refuses starts of services with such a hook."""
    commands: list[list[str]] = []

    def record(event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen" and isinstance(arguments[1], list):
            commands.append(arguments[1])

    sys.addaudithook(record)
    await (await start(module, tmp_path, EXIT="0")).wait()
    assert [sys.executable, "-m", module] in commands


def test_servers_run_until_the_end_of_the_process(module: str) -> None:
    assert fork_server._server(module) is fork_server._server(module)
