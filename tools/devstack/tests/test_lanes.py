"""Test lanes of a small project, with the plugin in a pytest process of its own."""

import os
import re
import sys
from pathlib import Path

import pytest

from devstack.processes import run

CONFTEST = """
import pytest

pytest_plugins = ["devstack.lanes"]

@pytest.fixture
def database(server_programs): ...

@pytest.fixture
def filled_database(database): ...
"""
TESTS = """
import subprocess, sys
import pytest

def test_alone(): ...
def test_with_a_temporary_directory(tmp_path): ...
def test_with_a_database(database): ...
def test_with_an_indirect_database(filled_database): ...
@pytest.mark.usefixtures("server_programs")
def test_with_the_marker(): ...
@pytest.mark.parametrize("number", [1, 2])
def test_with_parameters(number, filled_database): ...
def test_with_a_script(): subprocess.run([sys.executable, "-c", ""], check=True)
"""
FAST = {"test_alone", "test_with_a_temporary_directory", "test_with_a_script"}
SERVERS = {
    *("test_with_a_database", "test_with_an_indirect_database", "test_with_the_marker"),
    *("test_with_parameters[1]", "test_with_parameters[2]"),
}


async def run_pytest(directory: Path, tests: str, *arguments: str) -> tuple[int, str]:
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_sample.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    return await run(command, cwd=directory, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), FAST | SERVERS), (("--lane", "fast"), FAST), (("--lane", "servers"), SERVERS)],
    ids=["all", "fast", "servers"],
)
async def test_each_test_belongs_to_exactly_one_lane(
    tmp_path: Path, arguments: tuple[str, ...], expected: set[str]
) -> None:
    code, output = await run_pytest(tmp_path, TESTS, *arguments)
    assert code == 0, output
    assert set(re.findall(r"::(\S+) PASSED", output)) == expected


async def test_only_the_server_lane_can_start_a_server(tmp_path: Path) -> None:
    tests = """
import asyncio, subprocess, sys
import pytest

async def spawn(command):
    words = [command] if isinstance(command, str) else command
    await (await asyncio.create_subprocess_exec(*words, stderr=subprocess.DEVNULL)).wait()

@pytest.mark.parametrize("command", [
    ["initdb", "--version"],
    ["setpriv", "--pdeathsig", "KILL", "--", "/usr/lib/rabbitmq/bin/epmd", "-names"],
    [sys.executable, "-m", "bench", "--help"],
    "docker",
])
@pytest.mark.parametrize("start", [subprocess.run, lambda command: asyncio.run(spawn(command))])
class Test:
    def test_fast(self, command, start):
        with pytest.raises(AssertionError, match="in the fast lane. Use the fixture server_programs"):
            start(command)

    def test_with_servers(self, command, start, database):
        try:
            start(command)
        except FileNotFoundError:
            pass  # not installed here
"""
    code, output = await run_pytest(tmp_path, tests)
    assert code == 0, output
    assert len(re.findall(r"PASSED", output)) == 16
