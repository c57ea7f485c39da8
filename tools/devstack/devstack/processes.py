"""Start a process, follow its lines, notice its end, stop it."""

import asyncio
import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

GRACE_SEC = 10.0
_LONGEST_LINE = 1 << 20
_DRAIN_SEC = 1.0

_alive: set["Process"] = set()


class ProcessDied(Exception):
    """A process that was to keep running has ended."""

    def __init__(self, process: "Process") -> None:
        super().__init__(f"{process.name} {process.ending}")
        self.process = process


class Process:
    """A child in a session of its own, its standard output and error merged and read line by line.

    Made by `spawn`. The session keeps a Ctrl-C in the terminal away from it: whoever started it decides in
    which order things stop.
    """

    def __init__(self, name: str, child: asyncio.subprocess.Process, on_line: Callable[[str], None] | None) -> None:
        self.name = name
        self.pid = child.pid
        self.tail: deque[str] = deque(maxlen=30)
        """The last lines it wrote."""
        self._child = child
        self._on_line = on_line
        self._reading = asyncio.create_task(self._read())
        self._ended = asyncio.create_task(self._end())
        _alive.add(self)

    @property
    def running(self) -> bool:
        return self._child.returncode is None

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._child.returncode

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.returncode
        if code is None:
            return "is running"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def wait(self) -> int:
        """Its exit code, once it has ended and all that it wrote has been passed on."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process; nothing happens if it has ended."""
        # Not send_signal of the child, which looks whether it has ended and so may take its exit code away from
        # asyncio, which then says 255.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and every process it has started in its session, at once."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace: float = GRACE_SEC, *, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """Asks it to end, and ends it when it has not done so within `grace` seconds."""
        self.send(with_signal)
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            self.kill()
            return await self.wait()

    async def _end(self) -> int:
        code = await self._child.wait()
        _alive.discard(self)
        # A grandchild may hold the pipe open for ever; what the process itself wrote is there already.
        await asyncio.wait([self._reading], timeout=_DRAIN_SEC)
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        return code

    async def _read(self) -> None:
        assert self._child.stdout is not None
        rest = b""
        try:
            while chunk := await self._child.stdout.read(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._pass_on(line)
                if len(rest) > _LONGEST_LINE:
                    self._pass_on(rest)
                    rest = b""
        finally:
            if rest:
                self._pass_on(rest)

    def _pass_on(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self.tail.append(text)
        if self._on_line is not None:
            self._on_line(text)


async def spawn(
    name: str,
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
    on_line: Callable[[str], None] | None = None,
    parent_death_signal: signal.Signals = signal.SIGKILL,
) -> Process:
    """Starts a command. `user` needs root; `parent_death_signal` is what the kernel sends it should we be killed.

    Raises OSError when the command cannot be run.
    """
    account = _account(user)
    child = await asyncio.create_subprocess_exec(
        *_parent_death_prefix(parent_death_signal),
        *(str(part) for part in command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=None if env is None else dict(env),
        cwd=cwd,
        start_new_session=True,
        user=account[0],
        group=account[1],
        extra_groups=account[2],
    )
    return Process(name, child, on_line)


async def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
    timeout: float = 60,
    on_line: Callable[[str], None] | None = None,
) -> tuple[int, str]:
    """Runs a command to its end: the exit code and what it wrote. A cancelled or late one is killed.

    Raises TimeoutError, and OSError when the command cannot be run.
    """
    lines: list[str] = []

    def collect(line: str) -> None:
        lines.append(line)
        if on_line is not None:
            on_line(line)

    process = await spawn(str(command[0]), command, env=env, cwd=cwd, user=user, on_line=collect)
    try:
        code = await asyncio.wait_for(process.wait(), timeout)
    finally:
        if process.running:
            process.kill()
            await process.wait()
    return code, "\n".join(lines)


async def run_unless_process_dies(work: Awaitable[T], processes: Iterable[Process]) -> T:
    """The result of `work`; raises ProcessDied as soon as one of the processes ends before it is there."""
    watched = {asyncio.ensure_future(process.wait()): process for process in processes}
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait([working, *watched], return_when=asyncio.FIRST_COMPLETED)
        for ended, process in watched.items():
            if ended.done():
                raise ProcessDied(process)
        return await working
    finally:
        unfinished = [task for task in (working, *watched) if not task.done()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)


async def stop_all(processes: Iterable[Process], grace: float = GRACE_SEC) -> None:
    """Stops them at the same time."""
    await asyncio.gather(*(process.stop(grace) for process in processes))


def kill_all() -> None:
    """Ends everything that this process has started, at once and in no order."""
    for process in list(_alive):
        process.kill()


@functools.cache
def _setpriv() -> str | None:
    path = shutil.which("setpriv")
    if path is None:
        return None
    probe = subprocess.run([path, "--pdeathsig", "KILL", "true"], capture_output=True, check=False)
    return path if probe.returncode == 0 else None


def _parent_death_prefix(number: signal.Signals) -> list[str]:
    """A prefix that makes the kernel signal the command when we are gone, so that SIGKILL leaves no orphans.

    Linux only. setpriv sets this and becomes the command, keeping the process id; a function run between fork
    and exec would do the same, but is unsafe once there are threads.
    """
    setpriv = _setpriv()
    return [] if setpriv is None else [setpriv, "--pdeathsig", number.name.removeprefix("SIG"), "--"]


def _account(user: str | None) -> tuple[int | None, int | None, list[int] | None]:
    """User id, group id and further groups; nothing changes without a user."""
    if user is None:
        return None, None, None
    entry = pwd.getpwnam(user)
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid)
