"""Load on an HTTP server, made by wrk: a process of its own, whose price is small and known."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from bench import cpu
from devstack import packages
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.processes import run

_SCRIPT = Path(__file__).with_name("allocate.lua")
_TIMEOUT_SEC = 10
_runs: Iterator[int] = count(1)


@dataclass(frozen=True, slots=True)
class Load:
    """What the load generator has seen. Latencies are in milliseconds, None where it does not tell them."""

    requests: int
    """Answers that were 2xx."""
    seconds: float
    errors: int = 0
    """Other answers, and connections that broke or timed out."""
    p50: float | None = None
    p99: float | None = None
    slowest: float | None = None
    cpu_sec: float = 0.0
    """What the load generator itself has used."""


async def have_wrk(terminal: Terminal) -> None:
    """Installs wrk where it is missing; raises CannotRun where that is not ours to do."""
    if shutil.which("wrk") is not None:
        return
    if not packages.can_install():
        raise CannotRun("wrk not found: install it (Debian, Ubuntu: apt-get install wrk; macOS: brew install wrk)")
    await packages.install("wrk", terminal)


async def allocations(url: str, token: str, *, connections: int, seconds: int, each_once: bool = False) -> Load:
    """`POST /v1/allocate` on so many connections at once, each request for a new student.

    `each_once`: all connections send one request at the same moment, and no more after it. `seconds` is then how
    long they may take together.
    """
    students = f"student-{next(_runs)}"
    program = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds:d}s"]
    script = ["--timeout", f"{_TIMEOUT_SEC}s", "--script", str(_SCRIPT), f"{url}/v1/allocate"]
    arguments = ["--", token, students, str(connections if each_once else 0)]
    with cpu.of_children() as used:
        code, said = await run([*program, *script, *arguments], timeout=seconds + 60)
    if code != 0:
        raise CannotRun(f"wrk ended with exit code {code}: {said}", status=1)
    return parse(said, cpu_sec=used.seconds)


def parse(said: str, *, cpu_sec: float = 0.0) -> Load:
    """Reads the line that allocate.lua writes at the end of wrk's own words."""
    counted = json.loads(said.splitlines()[-1])
    return Load(
        requests=counted["requests"] - counted["refused"],
        seconds=counted["duration_us"] / 1e6,
        errors=counted["refused"] + counted["broken"],
        p50=counted["p50_us"] / 1e3,
        p99=counted["p99_us"] / 1e3,
        slowest=counted["slowest_us"] / 1e3,
        cpu_sec=cpu_sec,
    )
