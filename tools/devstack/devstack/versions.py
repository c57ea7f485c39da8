"""`python -m devstack.versions`: run tests with the oldest and the newest supported versions of both servers.

The versions come from Debian's packages: the oldest from Debian 12, the newest from Debian's next release. Without
arguments after `--`, pytest runs the tests that need servers.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from devstack import debian_servers, packages
from devstack.debian_servers import ServerPrograms
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.settings import ROOT

OLDEST, NEWEST = "bookworm", "testing"
TESTS = ("--lane", "servers", "shared", "services", "tests/integration", "tests/cluster")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", action="append", dest="suites", metavar="NAME", help="Debian suite with the servers; repeatable"
    )
    parser.add_argument("--servers", type=Path, help="directory that keeps the servers for the next run")
    parser.add_argument("--prepare", action="store_true", help="print the variables of the servers, run no test")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments for pytest")
    parsed = parser.parse_args(arguments)
    if parsed.prepare and parsed.servers is None:
        parser.error("--prepare needs --servers DIRECTORY")
    terminal = Terminal()
    try:
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="sandbox-broker-servers-") as temporary:
            Path(temporary).chmod(0o755)  # the accounts of the servers read the programs
            directory = (parsed.servers or Path(temporary)).absolute()
            patchelf = asyncio.run(packages.find_or_install(["patchelf"], "patchelf", terminal))
            failed = False
            for suite in parsed.suites or (OLDEST, NEWEST):
                programs = _prepare(suite, directory, patchelf, terminal)
                if parsed.prepare:
                    terminal.print_line(" ".join(f"{name}={value}" for name, value in programs.environment.items()))
                else:
                    failed |= _run_tests(suite, programs, parsed.tests, terminal) != 0
            return int(failed)
    except CannotRun as error:
        terminal.print_error(str(error))
        return error.status


def _prepare(suite: str, directory: Path, patchelf: str, terminal: Terminal) -> ServerPrograms:
    began = time.monotonic()
    terminal.print_step(f"{suite}: preparing PostgreSQL and RabbitMQ")
    programs = debian_servers.prepare(suite, directory, patchelf=patchelf)
    terminal.print_step(f"{suite}: {programs.describe()}, prepared in {time.monotonic() - began:.0f} s")
    return programs


def _run_tests(suite: str, programs: ServerPrograms, tests: Sequence[str], terminal: Terminal) -> int:
    """Run pytest with the servers of the suite. Return its exit code."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "AMQP_URL")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "5", "--dist", "loadfile", "--no-loadscope-reorder", *tests],
        cwd=ROOT,
        env={**inherited, **programs.environment},
        check=False,
    )
    result = "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}"
    terminal.print_step(f"{suite}: tests {result} after {time.monotonic() - began:.0f} s")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
