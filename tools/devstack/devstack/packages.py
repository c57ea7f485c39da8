"""Installation of missing programs from packages of Debian and Ubuntu."""

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
"""dpkg's package database. An installation locks this directory."""


async def find_or_install(names: Sequence[str], package: str, terminal: Terminal) -> str:
    """Return the path of the first program found. Installs `package` if it is missing. Raises CannotRun."""
    found = find_program(names)
    if found is None and can_install():
        await install(package, terminal)
        found = find_program(names)
    if found is None:
        raise CannotRun(f"{' or '.join(names)} not found: install it")
    return found


def find_program(names: Sequence[str]) -> str | None:
    """Return the path of the first program found in PATH or in the directories for root."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return next((found for name in names if (found := shutil.which(name, path=path)) is not None), None)


def can_install() -> bool:
    """Return True for root on Debian or a derivative."""
    return os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


async def install(package: str, terminal: Terminal) -> None:
    """Install a package without starting its services. Raises CannotRun if apt-get fails."""
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
    """Serialize installations of several processes.

    Two concurrent runs of `apt-get update` fail, and the policy file must exist until the last installation ends.
    """
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
    """Write Debian's policy script, whose exit code 101 forbids the start of services. Keeps an existing one."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
