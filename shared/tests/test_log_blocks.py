"""Log lines in blocks: what is written together, and what is written at once."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading

import pytest

from devstack.conditions import wait_until
from sandbox_broker.observability.log_blocks import MAX_LINES, LogBlocks

SERVICE = """
import asyncio, os, signal
import structlog
from sandbox_broker.observability import logging
from sandbox_broker.runtime.settings import ServiceSettings

logging.configure(ServiceSettings(_env_file=None), "gateway")

async def main():
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    print("ready", flush=True)
    await stopped.wait()
    for number in range(2500):
        structlog.get_logger().info("lease.granted", number=number)
    {end}

asyncio.run(main())
"""


class Output(io.BytesIO):
    """Binary stream that records its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.writes.append(data)
        return len(data)


@pytest.fixture
def output() -> Output:
    return Output()


def test_without_an_event_loop_each_line_is_written_at_once(output: Output) -> None:
    blocks = LogBlocks(lambda: output)
    blocks.info("one")
    blocks.info(b"two")
    assert output.writes == [b"one\n", b"two\n"]


async def test_lines_wait_for_the_end_of_their_block(output: Output) -> None:
    blocks = LogBlocks(lambda: output)
    for line in (b"one", b"two", b"three"):
        blocks.info(line)
    assert output.writes == []
    await wait_until(lambda: output.writes)
    blocks.info(b"four")
    await wait_until(lambda: len(output.writes) == 2)
    assert output.writes == [b"one\ntwo\nthree\n", b"four\n"]


async def test_a_warning_ends_the_block(output: Output) -> None:
    blocks = LogBlocks(lambda: output)
    blocks.info(b"one")
    blocks.warning(b"two")
    assert output.writes == [b"one\ntwo\n"]


async def test_a_full_block_is_written_at_once(output: Output) -> None:
    blocks = LogBlocks(lambda: output)
    for _ in range(MAX_LINES):
        blocks.info(b"line")
    assert output.writes == [b"line\n" * MAX_LINES]


async def test_no_line_of_a_thread_is_lost(output: Output) -> None:
    blocks = LogBlocks(lambda: output)

    def log_repeatedly() -> None:
        for _ in range(1000):
            blocks.info(b"thread")

    threads = [threading.Thread(target=log_repeatedly) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(1000):
        blocks.info(b"loop")
        await asyncio.sleep(0)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    blocks.flush()
    lines = b"".join(output.writes).splitlines()
    assert (lines.count(b"thread"), lines.count(b"loop")) == (4000, 1000)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(1)", "raise ValueError"])
def test_a_stopped_service_loses_no_line(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE.format(end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AMQP_URL": "amqp://gateway:of-the-queue@h/", "LOG_FORMAT": "json", "LOG_LEVEL": "INFO"},
    ) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == b"ready\n"
        service.send_signal(signal.SIGTERM)
        assert len(service.stdout.readlines()) == 2500
