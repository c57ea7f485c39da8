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
from devstack.processes import Process, ProcessDied, run, run_unless_process_dies, spawn

READS_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("tidied up", flush=True), sys.exit(0)))
print("ready", flush=True)
while True: time.sleep(60)
"""
IGNORES_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True: time.sleep(60)
"""


async def python(code: str, on_line: Callable[[str], None] | None = None) -> Process:
    return await spawn("child", [sys.executable, "-c", code], on_line=on_line)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - processes tell no event
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A zombie that its new parent has not collected yet has ended."""
    with suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


async def test_all_lines_arrive_in_order_from_both_streams_and_the_last_needs_no_newline() -> None:
    lines: list[str] = []

    process = await python(
        "import sys\n"
        "for n in range(5000): print(n, file=(sys.stdout, sys.stderr)[n % 2], flush=True)\n"
        "sys.stdout.write('the end')",
        lines.append,
    )

    assert await process.wait() == 0
    assert lines == [*map(str, range(5000)), "the end"]


async def test_a_line_longer_than_any_buffer_arrives_whole() -> None:
    lines: list[str] = []

    process = await python("print('x' * 500_000); print('next')", lines.append)
    await process.wait()

    assert [len(line) for line in lines] == [500_000, 4]


async def test_bytes_that_are_no_text_do_not_stop_the_reading() -> None:
    lines: list[str] = []

    process = await python("import sys; sys.stdout.buffer.write(b'\\xff\\nfine\\n')", lines.append)
    await process.wait()

    assert lines == ["\ufffd", "fine"]


async def test_stopping_lets_a_process_tidy_up() -> None:
    process = await python(READS_SIGTERM)
    await until(lambda: "ready" in process.tail)

    assert await process.stop() == 0
    assert list(process.tail) == ["ready", "tidied up"]
    assert process.ending == "ended with exit code 0"


async def test_a_process_that_ignores_the_request_to_stop_is_killed_after_the_grace() -> None:
    process = await python(IGNORES_SIGTERM)
    await until(lambda: "ready" in process.tail)

    assert await process.stop(grace=0.1) == -signal.SIGKILL
    assert process.ending == "was ended by SIGKILL"


async def test_killing_a_process_ends_what_it_has_started_too() -> None:
    process = await python(
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    await until(lambda: len(process.tail) == 1)
    grandchild = int(process.tail[0])

    process.kill()
    await process.wait()

    await until(lambda: not is_alive(grandchild))


async def test_the_end_of_one_process_interrupts_the_work() -> None:
    steady, failing = await python(READS_SIGTERM), await python("print('no luck'); raise SystemExit(3)")

    with pytest.raises(ProcessDied, match="child ended with exit code 3") as caught:
        await run_unless_process_dies(asyncio.Event().wait(), [steady, failing])

    assert caught.value.process is failing
    assert list(failing.tail) == ["no luck"]
    assert steady.running
    await steady.stop()


async def test_work_that_ends_first_gives_its_result() -> None:
    steady = await python(READS_SIGTERM)

    assert await run_unless_process_dies(asyncio.sleep(0, "done"), [steady]) == "done"

    await steady.stop()


async def test_a_command_that_takes_too_long_is_ended() -> None:
    pids: list[str] = []

    with pytest.raises(TimeoutError):
        await run(
            [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
            timeout=1,
            on_line=pids.append,
        )

    assert not is_alive(int(pids[0]))


async def test_a_child_gets_no_signals_of_our_terminal() -> None:
    process = await python("import os; print(os.getsid(0) == os.getpid())")
    await process.wait()

    assert list(process.tail) == ["True"]


@pytest.mark.skipif(processes._setpriv() is None, reason="the kernel's help against orphans is Linux's")
async def test_a_child_ends_when_we_are_killed() -> None:
    parent = subprocess.Popen(  # noqa: ASYNC220 - not one of ours: it is to be killed
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
        # It is tethered by setpriv, which then becomes what was asked for.
        await until(lambda: Path(f"/proc/{child}/cmdline").read_bytes().startswith(sys.executable.encode()))
        assert is_alive(child)
        os.kill(parent.pid, signal.SIGKILL)

    await until(lambda: not is_alive(child))


async def test_a_signal_to_a_process_that_is_just_ending_does_not_change_its_exit_code() -> None:
    for _ in range(30):
        process = await spawn("child", ["sh", "-c", "exit 7"])
        while process.running:
            process.send(signal.SIGCONT)
            await asyncio.sleep(0)
        assert await process.wait() == 7
