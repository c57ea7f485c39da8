"""What private servers have in common: a place for their files, the account they run as, waiting for them."""

import asyncio
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from devstack.errors import CannotRun
from devstack.processes import Process, ProcessDied, run_unless_process_dies

READY_SEC = 180.0
_BETWEEN_TRIES_SEC = 0.05


def service_account(preferred: str) -> str | None:
    """The account a server is to run as when we are root, as its package has made it; None means our own."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(preferred)
    except KeyError:
        return None
    return preferred


def make_directory(name: str, user: str | None, *, within: Path | None = None) -> Path:
    """A new directory for one server, which its account can reach and nobody else can read."""
    path = Path(tempfile.mkdtemp(prefix=f"sandbox-broker-{name}-", dir=within or _reachable_directory()))
    if user is not None:
        shutil.chown(path, user)
    return path


def write(path: Path, text: str, user: str | None, *, mode: int = 0o600) -> None:
    """Writes a file that belongs to the server's account."""
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    if user is not None:
        shutil.chown(path, user)


async def wait_until(answers: Callable[[], Awaitable[str | None]], process: Process, what: str) -> None:
    """Waits until `answers` gives None instead of a reason.

    Raises CannotRun when the process ends first, or after READY_SEC.
    """
    reason: str | None = "it was not asked yet"

    async def ask() -> None:
        nonlocal reason
        while (reason := await answers()) is not None:  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(_BETWEEN_TRIES_SEC)

    try:
        await asyncio.wait_for(run_unless_process_dies(ask(), [process]), READY_SEC)
    except ProcessDied as death:
        output = " / ".join(list(process.tail)[-5:])
        raise CannotRun(f"{what} {death.process.ending}: {output}", status=1) from None
    except TimeoutError:
        raise CannotRun(f"{what} did not answer within {READY_SEC:.0f} s: {reason}", status=1) from None


def _reachable_directory() -> Path:
    """A directory for temporary files that every account can walk into."""
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
