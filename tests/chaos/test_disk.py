import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chaos.disk import CannotMount, Disk
from tests.integration.stack import eventually


@pytest.fixture
async def disk() -> AsyncIterator[Disk | None]:
    """None where it cannot be: it takes root. Then the fault comes to nothing, and says why."""
    disk = Disk()
    try:
        async with disk:
            yield disk
    except CannotMount as reason:
        refusal = str(reason)
        assert refusal
        yield None
    assert not disk.path.exists()
    assert str(disk.path) not in Path("/proc/mounts").read_text()


async def test_a_full_disk_takes_nothing_more_until_there_is_room_again(disk: Disk | None) -> None:
    if disk is None:
        return
    (disk.path / "before").write_bytes(b"x" * 10_000)
    await disk.fill()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (disk.path / "within").write_bytes(b"x" * 10_000)
    assert (disk.path / "before").read_bytes() == b"x" * 10_000
    await disk.empty()
    (disk.path / "after").write_bytes(b"x" * 10_000)


async def test_a_disk_is_filled_even_while_somebody_writes_to_it(disk: Disk | None) -> None:
    if disk is None:
        return
    (disk.path / "before").write_bytes(b"x")
    writing = 'while :; do head -c 20000 /dev/zero; done 2>/dev/null >>"$0"'
    writer = await asyncio.create_subprocess_exec("sh", "-c", writing, str(disk.path / "growing"))
    try:
        for _ in range(20):
            await disk.fill()
            await eventually(lambda: is_full(disk))
            await disk.empty()
    finally:
        writer.kill()
        await writer.wait()


async def is_full(disk: Disk) -> bool:
    return os.statvfs(disk.path).f_bfree == 0
