"""Packages of Debian and Ubuntu, installed when their programs are missing."""

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.processes import run

_INSTALL_SEC = 900.0
_POLICY = Path("/usr/sbin/policy-rc.d")
_DATABASE = Path("/var/lib/dpkg")
"""Of packages; who installs holds a lock on this directory."""


async def find_or_install(names: Sequence[str], package: str, terminal: Terminal) -> str:
    """The path of the first of them that is on this machine; else the package is installed. Raises CannotRun."""
    found = find_program(names)
    if found is None and can_install():
        await install(package, terminal)
        found = find_program(names)
    if found is None:
        raise CannotRun(f"no {', '.join(names)} found: install one of them")
    return found


def find_program(names: Sequence[str]) -> str | None:
    """The path of the first of them that is on this machine, also where only root looks for programs."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return next((found for name in names if (found := shutil.which(name, path=path)) is not None), None)


def can_install() -> bool:
    """Whether this is Debian, or made of it, and we are root."""
    return os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


async def install(package: str, terminal: Terminal) -> None:
    """Installs a package without starting what it brings along, after whoever else installs one. Raises CannotRun
    when apt-get fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    async with _exclusive_install():
        for command in (["update"], ["install", "-y", "--no-install-recommends", package]):
            code, output = await run(
                ["apt-get", "-q", "-o", f"DPkg::Lock::Timeout={_INSTALL_SEC:.0f}", *command],
                env=environment,
                timeout=_INSTALL_SEC,
                on_line=lambda line: terminal.print_log_line("apt-get", line),
            )
            if code != 0:
                reason = output.splitlines()[-1] if output else f"exit code {code}"
                raise CannotRun(f"apt-get {command[0]} for {package} failed: {reason}", status=1)


@contextlib.asynccontextmanager
async def _exclusive_install() -> AsyncIterator[None]:
    """One of our processes at a time: apt-get itself waits for no other that updates its lists, and the policy
    must stay until the last is done."""
    directory = os.open(_DATABASE, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.2)
        with _services_kept_stopped():
            yield
    finally:
        os.close(directory)


@contextlib.contextmanager
def _services_kept_stopped() -> Iterator[None]:
    """Debian asks this script before it starts a service; 101 means no. One that is there already stays."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
