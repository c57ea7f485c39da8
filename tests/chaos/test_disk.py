"""Disk that can be filled."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devstack.conditions import wait_until
from tests.chaos.disk import Disk, MountError


@pytest.fixture
async def disk() -> AsyncIterator[Disk | None]:
    """Yield a mounted disk, or None without root. The fault then reports the reason instead."""
    disk = Disk()
    try:
        async with disk:
            yield disk
    except MountError as error:
        message = str(error)
        assert message
        yield None
    assert not disk.path.exists()
    assert str(disk.path) not in Path("/proc/mounts").read_text()


async def test_full_disk_refuses_writes_until_it_is_emptied(disk: Disk | None) -> None:
    if disk is None:
        return
    (disk.path / "before").write_bytes(b"x" * 10_000)
    await disk.fill()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (disk.path / "during").write_bytes(b"x" * 10_000)
    assert (disk.path / "before").read_bytes() == b"x" * 10_000
    await disk.empty()
    (disk.path / "after").write_bytes(b"x" * 10_000)


async def test_disk_is_filled_during_concurrent_writes(disk: Disk | None) -> None:
    if disk is None:
        return
    (disk.path / "before").write_bytes(b"x")
    script = 'while :; do head -c 20000 /dev/zero; done 2>/dev/null >>"$0"'
    writer = await asyncio.create_subprocess_exec("sh", "-c", script, str(disk.path / "growing"))
    try:
        for _ in range(20):
            await disk.fill()
            await wait_until(lambda: is_full(disk))
            await disk.empty()
    finally:
        writer.kill()
        await writer.wait()


async def is_full(disk: Disk) -> bool:
    return os.statvfs(disk.path).f_bfree == 0
