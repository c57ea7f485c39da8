"""Helpers for private servers: account, directory, files, waiting for readiness."""

import asyncio
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from devstack.errors import CannotRun
from devstack.processes import Process, ProcessDied, run_unless_process_dies

READY_SEC = 180.0
_BETWEEN_TRIES_SEC = 0.05


def service_account(preferred: str) -> str | None:
    """Return the account of the server's package if this process is root, else None for the current account."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(preferred)
    except KeyError:
        return None
    return preferred


def named_directory(variable: str, programs: Sequence[str]) -> Path | None:
    """Return the directory of server programs that an environment variable names, or None if it is not set.

    Raises CannotRun if a program is missing there.
    """
    if not (value := os.environ.get(variable)):
        return None
    missing = [name for name in programs if not (Path(value) / name).exists()]
    if missing:
        raise CannotRun(f"{variable} is {value}, and {' and '.join(missing)} are not there; set another directory")
    return Path(value)


def make_directory(name: str, user: str | None, *, within: Path | None = None) -> Path:
    """Create a directory that only `user` can read."""
    path = Path(tempfile.mkdtemp(prefix=f"sandbox-broker-{name}-", dir=within or _reachable_directory()))
    if user is not None:
        shutil.chown(path, user)
    return path


def write(path: Path, text: str, user: str | None, *, mode: int = 0o600) -> None:
    """Write a file and make `user` its owner."""
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    if user is not None:
        shutil.chown(path, user)


async def wait_until(check: Callable[[], Awaitable[str | None]], process: Process, what: str) -> None:
    """Wait until `check` returns None instead of a reason. `what` names the server in errors.

    Raises CannotRun if the process ends first, or after READY_SEC.
    """
    reason: str | None = "not checked yet"

    async def poll() -> None:
        nonlocal reason
        while (reason := await check()) is not None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(_BETWEEN_TRIES_SEC)

    try:
        await asyncio.wait_for(run_unless_process_dies(poll(), [process]), READY_SEC)
    except ProcessDied as death:
        output = " / ".join(list(process.tail)[-5:])
        raise CannotRun(f"{what} {death.process.ending}: {output}", status=1) from None
    except TimeoutError:
        raise CannotRun(f"{what} was not ready within {READY_SEC:.0f} s: {reason}", status=1) from None


def _reachable_directory() -> Path:
    """Return a directory for temporary files that every account can enter."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/tmp")]
    for candidate in candidates:
        if all(_is_walkable(part) for part in [candidate, *candidate.parents]):
            return candidate
    return candidates[0]


def _is_walkable(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IXOTH)
    except OSError:
        return False
