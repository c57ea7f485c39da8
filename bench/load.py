"""Load on an HTTP server, made by wrk: a process of its own, whose price is small and known."""

import asyncio
import json
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from bench import cpu
from devstack import packages
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.processes import spawn
from sandbox_broker.service import cancel

_SCRIPT = Path(__file__).with_name("students.lua")
_TIMEOUT_SEC = 10
_GRACE_SEC = 60
_numbers: Iterator[int] = count(1)


@dataclass(frozen=True, slots=True)
class Students:
    """Who asks, and for what: `POST /v1/allocate` on all connections, each request for a new student, unless said
    otherwise. What the fields mean is told in students.lua."""

    name: str = field(default_factory=lambda: f"student-{next(_numbers)}")
    once: int = 0
    repeats: int = 0
    prefixes: int = 0
    think_ms: int = 0
    hold: int = 0


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
    new: int | None = None
    """Allocations answered with 201; None, as with the next two, where it does not look at the answers."""
    known: int | None = None
    """Allocations answered with 200."""
    released: int | None = None
    """Releases answered with 200."""


async def have_wrk(terminal: Terminal) -> None:
    """Installs wrk where it is missing; raises CannotRun where that is not ours to do."""
    if shutil.which("wrk") is not None:
        return
    if not packages.can_install():
        raise CannotRun("wrk not found: install it (Debian, Ubuntu: apt-get install wrk; macOS: brew install wrk)")
    await packages.install("wrk", terminal)


async def put(
    url: str,
    token: str,
    students: Students,
    *,
    connections: int,
    seconds: int,
    until: Callable[[], Awaitable[object]] | None = None,
) -> Load:
    """Ends after so many seconds, or earlier when `until` has ended before."""
    said: list[str] = []
    program = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds:d}s"]
    script = ["--timeout", f"{_TIMEOUT_SEC}s", "--script", str(_SCRIPT), url]
    options = {name: getattr(students, name) for name in students.__slots__}
    arguments = [f"{name}={value}" for name, value in {"token": token, **options}.items()]
    with cpu.of_children() as used:
        wrk = await spawn("wrk", [*program, *script, "--", *arguments], on_line=said.append)
        try:
            async with asyncio.timeout(seconds + _GRACE_SEC):
                if until is not None:
                    await _wait(until(), seconds)
                    wrk.send(signal.SIGINT)
                code = await wrk.wait()
        finally:
            wrk.kill()
            await wrk.wait()
    if code != 0:
        raise CannotRun(f"wrk ended with exit code {code}: {' / '.join(said)}", status=1)
    return parse("\n".join(said), cpu_sec=used.seconds)


async def _wait(work: Awaitable[object], seconds: int) -> None:
    """For its end, or as long; raises what it raises."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            task.result()
    finally:
        await cancel(task)


def parse(said: str, *, cpu_sec: float = 0.0) -> Load:
    """Reads the line that students.lua writes at the end of wrk's own words."""
    counted = json.loads(said.splitlines()[-1])
    return Load(
        requests=counted["requests"] - counted["refused"],
        seconds=counted["duration_us"] / 1e6,
        errors=counted["refused"] + counted["broken"],
        p50=counted["p50_us"] / 1e3,
        p99=counted["p99_us"] / 1e3,
        slowest=counted["slowest_us"] / 1e3,
        cpu_sec=cpu_sec,
        **{kind: None if counted[kind] < 0 else counted[kind] for kind in ("new", "known", "released")},
    )
