"""Disk that can be filled: a tmpfs. Mounting it requires root."""

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from devstack.private import make_directory
from devstack.processes import run

SIZE_BYTES = 2 << 30
SPARE_BYTES = (0, 1 << 20, 4 << 20, 16 << 20)
"""Free bytes that each attempt of `fill` leaves."""


class MountError(Exception):
    """The error output of mount."""


class Disk:
    """Temporary disk, as a context manager. Entering raises `MountError` if the disk cannot be mounted."""

    def __init__(self) -> None:
        self.path: Path = make_directory("disk", None)

    async def __aenter__(self) -> Self:
        if problem := await _mount(
            "-t", "tmpfs", "-o", f"size={SIZE_BYTES},mode=0755", "sandbox-broker-chaos", str(self.path)
        ):
            self.path.rmdir()
            raise MountError(problem)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await run(["umount", "--lazy", self.path])
        shutil.rmtree(self.path, ignore_errors=True)

    async def fill(self) -> None:
        """Shrink the disk to its used size. Raises `MountError`.

        The kernel refuses a size below the used size, and a writer may add data between the two calls. Each retry
        therefore leaves more free space, which the same writer then fills.
        """
        problem = None
        for spare in SPARE_BYTES:
            usage = os.statvfs(self.path)
            problem = await self._resize((usage.f_blocks - usage.f_bfree) * usage.f_frsize + spare)
            if problem is None:
                return
        raise MountError(problem)

    async def empty(self) -> None:
        """Restore the original size."""
        if problem := await self._resize(SIZE_BYTES):
            raise MountError(problem)

    async def _resize(self, size: int) -> str | None:
        return await _mount("-o", f"remount,size={size}", str(self.path))


async def _mount(*arguments: str) -> str | None:
    """Run mount. Return its error output, or None on success."""
    try:
        code, output = await run(["mount", *arguments])
    except OSError as error:
        return str(error)
    return None if code == 0 else output or f"exit code {code}"
