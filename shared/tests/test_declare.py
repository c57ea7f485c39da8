"""The command `python -m sandbox_broker.declare`."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity

from devstack.ports import free_port
from devstack.testing import NewVhost
from sandbox_broker.contract import topology


def declare(cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox_broker.declare"],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def test_the_command_declares_all_queues_and_is_idempotent(tmp_path: Path, new_vhost: NewVhost) -> None:
    async with new_vhost() as url:
        for _ in range(2):
            done = declare(tmp_path, AMQP_URL=url)
            assert (done.returncode, done.stderr) == (0, "")

        connection = await aio_pika.connect(url)
        async with connection, connection.channel() as channel:
            for queue in topology.QUEUES:
                await channel.declare_queue(queue.name, passive=True)


async def test_the_command_deletes_replaced_queues_without_a_consumer(tmp_path: Path, new_vhost: NewVhost) -> None:
    old = [queue.replaces for queue in topology.QUEUES if queue.replaces is not None]
    assert len(old) == 4
    async with new_vhost() as url, await aio_pika.connect(url) as connection, connection.channel() as channel:
        used, *unused = [await channel.declare_queue(name, durable=True) for name in old]
        await used.consume(asyncio.Queue[object]().put)
        done = declare(tmp_path, AMQP_URL=url)
        assert done.returncode == 0, done.stderr

        await channel.declare_queue(used.name, passive=True)
        for queue in unused:
            async with connection.channel() as probe_channel:
                with pytest.raises(ChannelNotFoundEntity):
                    await probe_channel.declare_queue(queue.name, passive=True)


def test_a_missing_setting_or_server_is_reported_in_one_line(tmp_path: Path) -> None:
    unset = declare(tmp_path)
    away = declare(tmp_path, AMQP_URL=f"amqp://guest:secret@127.0.0.1:{free_port()}/")

    assert (unset.returncode, unset.stderr) == (2, "cannot start: AMQP_URL: is not set\n")
    assert away.returncode == 2
    assert away.stderr.startswith("cannot start: AMQP_URL: ")
    assert away.stderr.count("\n") == 1
    assert "secret" not in away.stderr
