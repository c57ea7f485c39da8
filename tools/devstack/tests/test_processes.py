import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from devstack import processes
from devstack.conditions import wait_until
from devstack.processes import Process, ProcessDied, run, run_unless_process_dies, spawn

READS_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("cleaned up", flush=True), sys.exit(0)))
print("ready", flush=True)
while True: time.sleep(60)
"""
IGNORES_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True: time.sleep(60)
"""


async def start_python(code: str, on_line: Callable[[str], None] | None = None) -> Process:
    return await spawn("child", [sys.executable, "-c", code], on_line=on_line)


def is_alive(pid: int) -> bool:
    """Return False for a process that has ended, also for a zombie."""
    with suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


async def test_lines_of_both_streams_arrive_in_order_also_a_last_line_without_newline() -> None:
    lines: list[str] = []

    process = await start_python(
        "import sys\n"
        "for n in range(5000): print(n, file=(sys.stdout, sys.stderr)[n % 2], flush=True)\n"
        "sys.stdout.write('the end')",
        lines.append,
    )

    assert await process.wait() == 0
    assert lines == [*map(str, range(5000)), "the end"]


async def test_a_long_line_arrives_complete() -> None:
    lines: list[str] = []

    process = await start_python("print('x' * 500_000); print('next')", lines.append)
    await process.wait()

    assert [len(line) for line in lines] == [500_000, 4]


async def test_invalid_utf_8_is_replaced() -> None:
    lines: list[str] = []

    process = await start_python("import sys; sys.stdout.buffer.write(b'\\xff\\nfine\\n')", lines.append)
    await process.wait()

    assert lines == ["\ufffd", "fine"]


async def test_a_stopped_process_can_clean_up() -> None:
    process = await start_python(READS_SIGTERM)
    await wait_until(lambda: "ready" in process.tail)

    assert await process.stop() == 0
    assert list(process.tail) == ["ready", "cleaned up"]
    assert process.ending == "ended with exit code 0"


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period() -> None:
    process = await start_python(IGNORES_SIGTERM)
    await wait_until(lambda: "ready" in process.tail)

    assert await process.stop(grace=0.1) == -signal.SIGKILL
    assert process.ending == "was ended by SIGKILL"


async def test_a_kill_includes_grandchildren() -> None:
    process = await start_python(
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    await wait_until(lambda: len(process.tail) == 1)
    grandchild = int(process.tail[0])

    process.kill()
    await process.wait()

    await wait_until(lambda: not is_alive(grandchild))


async def test_the_end_of_a_process_cancels_the_work() -> None:
    steady, failing = (
        await start_python(READS_SIGTERM),
        await start_python("print('output'); raise SystemExit(3)"),
    )

    with pytest.raises(ProcessDied, match="child ended with exit code 3") as caught:
        await run_unless_process_dies(asyncio.Event().wait(), [steady, failing])

    assert caught.value.process is failing
    assert list(failing.tail) == ["output"]
    assert steady.running
    await steady.stop()


async def test_the_result_of_completed_work_is_returned() -> None:
    steady = await start_python(READS_SIGTERM)

    assert await run_unless_process_dies(asyncio.sleep(0, "done"), [steady]) == "done"

    await steady.stop()


async def test_a_command_is_killed_after_its_timeout() -> None:
    pids: list[str] = []

    with pytest.raises(TimeoutError):
        await run(
            [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
            timeout=1,
            on_line=pids.append,
        )

    assert not is_alive(int(pids[0]))


async def test_a_child_has_its_own_session() -> None:
    process = await start_python("import os; print(os.getsid(0) == os.getpid())")
    await process.wait()

    assert list(process.tail) == ["True"]


@pytest.mark.skipif(processes._setpriv() is None, reason="parent death signals need Linux")
async def test_a_child_ends_after_a_kill_of_its_parent() -> None:
    parent = subprocess.Popen(  # noqa: ASYNC220 - it must not end with this process
        [
            sys.executable,
            "-c",
            "import asyncio, sys\n"
            "from devstack.processes import spawn\n"
            "async def main():\n"
            "    child = await spawn('child', [sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "    print(child.pid, flush=True)\n"
            "    await child.wait()\n"
            "asyncio.run(main())\n",
        ],
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        # setpriv sets the signal before it executes the command.
        await wait_until(lambda: Path(f"/proc/{child}/cmdline").read_bytes().startswith(sys.executable.encode()))
        assert is_alive(child)
        os.kill(parent.pid, signal.SIGKILL)

    await wait_until(lambda: not is_alive(child))


async def test_a_signal_to_an_ending_process_does_not_change_its_exit_code() -> None:
    for _ in range(30):
        process = await spawn("child", ["sh", "-c", "exit 7"])
        while process.running:
            process.send(signal.SIGCONT)
            await asyncio.sleep(0)
        assert await process.wait() == 7
