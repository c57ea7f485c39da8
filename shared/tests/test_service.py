"""Service runtime: start and stop of the tasks, drain, ports and exit codes."""

import asyncio
import http.client
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import structlog
from starlette.applications import Starlette

from devstack.ports import free_port
from sandbox_broker.runtime.service import lifespan, run_periodically, run_uninterrupted
from sandbox_broker.runtime.sockets import open_listeners

PATIENCE_SEC = 60.0
TOO_LONG_SEC = 600.0
"""Longer than the time limit of a test."""

PROGRAM = """
import asyncio, sys
from functools import partial
from starlette.applications import Starlette
from sandbox_broker.observability import health
from sandbox_broker.runtime import service

async def holds(name):
    print("started", name, flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.05)
        print("ended", name, flush=True)

async def fails():
    {failure}

app = Starlette(
    routes=health.routes({{}}),
    lifespan=service.lifespan(partial(holds, "first"), partial(holds, "second"), {tasks}),
)
service.run(
    app, int(sys.argv[1]), ops_port={ops_port}, bind_host={bind_host!r}, drain_sec={drain_sec}
)
"""


def start(
    tmp_path: Path,
    tasks: str = "",
    failure: str = "pass",
    drain_sec: float = 0,
    bind_host: str = "",
    ops_port: int | None = None,
) -> tuple[subprocess.Popen[str], int]:
    port = free_port()
    program = tmp_path / "service.py"
    program.write_text(
        PROGRAM.format(tasks=tasks, failure=failure, drain_sec=drain_sec, bind_host=bind_host, ops_port=ops_port)
    )
    return (
        subprocess.Popen(
            [sys.executable, str(program), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ),
        port,
    )


def serving(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def ask(port: int, path: str) -> tuple[int, str | None]:
    """Return the status and the Connection header."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SEC)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers["Connection"]


ALL_IN_ORDER = "started first\nstarted second\nended second\nended first\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_tasks_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    process, port = start(tmp_path, drain_sec=0.3)
    with process:
        deadline = time.monotonic() + PATIENCE_SEC
        while not serving(port):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 0
    assert [line for line in out.splitlines() if line.startswith(("started", "ended"))] == ALL_IN_ORDER.splitlines()
    assert err == ""


def test_a_draining_service_is_not_ready_and_still_serves(tmp_path: Path) -> None:
    process, port = start(tmp_path, drain_sec=TOO_LONG_SEC)
    with process:
        deadline = time.monotonic() + PATIENCE_SEC
        while not serving(port):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(port, "/readyz") == (200, None)
        process.send_signal(signal.SIGTERM)
        while ask(port, "/readyz")[0] != 503:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(port, "/readyz") == (503, "close")
        assert ask(port, "/healthz") == (200, "close")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 0


def test_sigint_skips_the_drain(tmp_path: Path) -> None:
    process, port = start(tmp_path, drain_sec=TOO_LONG_SEC)
    with process:
        deadline = time.monotonic() + PATIENCE_SEC
        while not serving(port):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 0


@pytest.mark.parametrize(
    "failure",
    ["raise ValueError('boom')", "pass", "asyncio.current_task().cancel(); await asyncio.sleep(1)"],
    ids=["fails", "ends", "is cancelled"],
)
def test_a_task_that_ends_stops_the_process_with_1(tmp_path: Path, failure: str) -> None:
    process, _ = start(tmp_path, tasks="fails", failure=failure)
    with process:
        out, _ = process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 1
    assert "service.task_failed" in out
    assert [line for line in out.splitlines() if line in ALL_IN_ORDER.splitlines()] == ALL_IN_ORDER.splitlines()


def test_a_port_in_use_stops_the_process(tmp_path: Path) -> None:
    first, port = start(tmp_path)
    with first:
        deadline = time.monotonic() + PATIENCE_SEC
        while not serving(port):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = subprocess.run(
            [sys.executable, str(tmp_path / "service.py"), str(port)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SEC,
            check=False,
        )
        first.terminate()
        first.communicate(timeout=PATIENCE_SEC)
    assert (second.returncode, second.stderr) == (
        2,
        f"cannot start: cannot listen on 0.0.0.0:{port}: Address already in use\n",
    )
    assert "started" not in second.stdout


@pytest.mark.parametrize(
    ("bind_host", "answering"),
    [
        ("", {"127.0.0.1", "127.0.0.2", "[::1]"}),
        ("127.0.0.1", {"127.0.0.1"}),
        ("127.0.0.2, ::1", {"127.0.0.2", "[::1]"}),
    ],
)
def test_a_service_listens_on_both_families_or_on_the_listed_addresses(
    tmp_path: Path, bind_host: str, answering: set[str]
) -> None:
    process, port = start(tmp_path, bind_host=bind_host)
    with process:
        deadline = time.monotonic() + PATIENCE_SEC
        while not serving(port, min(answering)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert {host for host in ("127.0.0.1", "127.0.0.2", "[::1]") if serving(port, host)} == answering
        process.terminate()
        process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 0


def test_a_second_port_drains_and_stops_with_the_first(tmp_path: Path) -> None:
    ops_port = free_port()
    process, port = start(tmp_path, drain_sec=TOO_LONG_SEC, ops_port=ops_port)
    with process:
        deadline = time.monotonic() + PATIENCE_SEC
        while not (serving(port) and serving(ops_port)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(ops_port, "/readyz") == (200, None)
        process.send_signal(signal.SIGTERM)
        while ask(ops_port, "/readyz")[0] != 503:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in (port, ops_port):
            assert ask(number, "/readyz") == (503, "close")
            assert ask(number, "/healthz") == (200, "close")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 0
    assert not serving(port)
    assert not serving(ops_port)


def test_a_second_port_in_use_stops_the_process(tmp_path: Path) -> None:
    (taken,) = open_listeners(free_port(), ["::"])
    with taken:
        taken.listen()
        number = taken.getsockname()[1]
        process, _ = start(tmp_path, ops_port=number)
        with process:
            out, err = process.communicate(timeout=PATIENCE_SEC)
    assert (process.returncode, err) == (
        2,
        f"cannot start: cannot listen on [::]:{number}: Address already in use\n",
    )
    assert "started" not in out


async def test_tasks_stop_one_by_one_in_reverse_order() -> None:
    happened: list[str] = []

    def holding(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
        async def hold() -> None:
            happened.append(f"start {name}")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                happened.append(f"end {name}")

        return hold

    app = Starlette()
    async with lifespan(holding("a"), holding("b"), holding("c"))(app):
        await asyncio.sleep(0)
    assert happened == ["start a", "start b", "start c", "end c", "end b", "end a"]
    assert not getattr(app.state, "failed", False)


async def test_a_task_that_fails_on_stop_is_logged_and_the_other_tasks_stop() -> None:
    ended: list[str] = []

    async def first() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("first")

    async def second() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("boom")

    with structlog.testing.capture_logs() as logged:
        async with lifespan(first, second)(Starlette()):
            await asyncio.sleep(0)
    assert ended == ["first"]
    assert [entry["event"] for entry in logged] == ["service.task_failed"]


async def test_run_uninterrupted_finishes_the_work_before_the_cancellation() -> None:
    gate = asyncio.Event()
    done: list[str] = []

    async def work() -> str:
        await gate.wait()
        done.append("work")
        return "result"

    async def outer() -> None:
        await run_uninterrupted(work())
        done.append("not reached")

    task = asyncio.create_task(outer())
    for _ in range(3):  # repeated cancellation
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert done == ["work"]


async def test_run_uninterrupted_returns_the_result_or_raises_the_error() -> None:
    async def succeed() -> int:
        return 7

    async def fail() -> int:
        raise ValueError("boom")

    assert await run_uninterrupted(succeed()) == 7
    with pytest.raises(ValueError, match="boom"):
        await run_uninterrupted(fail())


async def test_work_that_fails_after_a_cancellation_is_logged() -> None:
    gate = asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise ValueError("boom")

    with structlog.testing.capture_logs() as logged:
        task = asyncio.create_task(run_uninterrupted(fail()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait([task])
    assert task.cancelled()
    assert [entry["event"] for entry in logged] == ["service.work_failed"]


async def test_run_periodically_starts_at_once_and_repeats() -> None:
    times = 0
    enough = asyncio.Event()

    async def work() -> None:
        nonlocal times
        times += 1
        if times == 3:
            enough.set()

    task = asyncio.create_task(run_periodically(0.001, work))
    await asyncio.sleep(0)
    assert times == 1
    async with asyncio.timeout(PATIENCE_SEC):
        await enough.wait()
    task.cancel()
    await asyncio.wait([task])


def test_a_service_runs_on_the_loop_that_tries_all_addresses(tmp_path: Path) -> None:
    process, _ = start(tmp_path, tasks="fails", failure="raise OSError(type(asyncio.get_running_loop()).__name__)")
    out, _ = process.communicate(timeout=PATIENCE_SEC)
    assert "OSError: EventLoop" in out


def test_the_modules_of_a_service_are_not_searched_for_garbage(tmp_path: Path) -> None:
    process, _ = start(
        tmp_path, tasks="fails", failure="raise OSError(f'{__import__(\"gc\").get_freeze_count()} frozen')"
    )
    out, _ = process.communicate(timeout=PATIENCE_SEC)
    frozen = re.search(r"OSError: ([0-9]+) frozen", out)
    assert frozen is not None
    assert int(frozen[1]) > 10_000
