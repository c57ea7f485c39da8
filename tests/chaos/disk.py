"""A disk that can be full: a file system in memory. To mount one takes root."""

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from devstack.private import make_directory
from devstack.processes import run

SIZE = 2 << 30
SPARE = (0, 1 << 20, 4 << 20, 16 << 20)
"""Bytes that each try at filling it leaves free."""


class CannotMount(Exception):
    """The reason, as mount says it."""


class Disk:
    """Is there from entry to exit, which raises CannotMount where it cannot be."""

    def __init__(self) -> None:
        self.path: Path = make_directory("disk", None)

    async def __aenter__(self) -> Self:
        if problem := await _mount(
            "-t", "tmpfs", "-o", f"size={SIZE},mode=0755", "sandbox-broker-chaos", str(self.path)
        ):
            self.path.rmdir()
            raise CannotMount(problem)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await run(["umount", "--lazy", self.path])
        shutil.rmtree(self.path, ignore_errors=True)

    async def fill(self) -> None:
        """Leaves no room but for what is there. Raises CannotMount.

        The kernel refuses a size below what is there by then, and whoever writes adds to it between the two calls:
        then each further try leaves more room, which the same writer takes.
        """
        problem = None
        for spare in SPARE:
            of = os.statvfs(self.path)
            problem = await self._resize((of.f_blocks - of.f_bfree) * of.f_frsize + spare)
            if problem is None:
                return
        raise CannotMount(problem)

    async def empty(self) -> None:
        """Gives the room back."""
        if problem := await self._resize(SIZE):
            raise CannotMount(problem)

    async def _resize(self, size: int) -> str | None:
        return await _mount("-o", f"remount,size={size}", str(self.path))


async def _mount(*arguments: str) -> str | None:
    """None, or what is in the way."""
    try:
        code, said = await run(["mount", *arguments])
    except OSError as error:
        return str(error)
    return None if code == 0 else said or f"exit code {code}"
