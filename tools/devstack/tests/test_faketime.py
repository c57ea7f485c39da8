import asyncio
import sys
import time
from pathlib import Path

import pytest

from devstack import faketime
from devstack.output import Terminal
from devstack.processes import spawn

pytest_plugins = ("devstack.fixtures",)

CLOCK = """
import select, time
while True:
    print(time.time(), time.monotonic(), flush=True)
    select.select([], [], [], 0.05)
"""
HOUR_SEC = 3600


@pytest.mark.usefixtures("server_programs")  # may install libfaketime
async def test_the_clock_of_a_running_process_is_changed_and_restored(tmp_path: Path, terminal: Terminal) -> None:
    offset_file = tmp_path / "clock"
    faketime.set_offset(offset_file, 0)
    lines: asyncio.Queue[str] = asyncio.Queue()
    clock = await spawn(
        "clock",
        [sys.executable, "-c", CLOCK],
        env=faketime.build_environment(await faketime.find_library(terminal), offset_file),
        on_line=lines.put_nowait,
    )

    async def wait_for_offset(expected_sec: int) -> None:
        async with asyncio.timeout(60):
            while True:
                wall, monotonic = map(float, (await lines.get()).split())
                assert abs(monotonic - time.monotonic()) < HOUR_SEC / 2
                if abs(wall - time.time() - expected_sec) < HOUR_SEC / 2:
                    return

    try:
        await wait_for_offset(0)
        for offset_sec in (HOUR_SEC, -HOUR_SEC, 0):
            faketime.set_offset(offset_file, offset_sec)
            await wait_for_offset(offset_sec)
    finally:
        clock.kill()
        await clock.wait()
    faketime.remove_shared_memory()
    assert not list(Path("/dev/shm").glob(f"*faketime*_{clock.pid}"))
