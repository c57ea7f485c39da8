import errno
import os
from pathlib import Path

import pytest

from tests.chaos.disk import CannotMount, Disk


async def test_a_full_disk_takes_nothing_more_until_there_is_room_again() -> None:
    disk = Disk()
    refusal = ""
    try:
        await disk.__aenter__()
    except CannotMount as reason:
        refusal = str(reason)
    if not disk.path.exists():  # it takes root: the fault comes to nothing, and says why
        assert refusal
        return
    try:
        (disk.path / "before").write_bytes(b"x" * 10_000)
        await disk.fill()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (disk.path / "within").write_bytes(b"x" * 10_000)
        assert (disk.path / "before").read_bytes() == b"x" * 10_000
        await disk.empty()
        (disk.path / "after").write_bytes(b"x" * 10_000)
    finally:
        await disk.__aexit__(None, None, None)
    assert not disk.path.exists()
    assert str(disk.path) not in Path("/proc/mounts").read_text()
