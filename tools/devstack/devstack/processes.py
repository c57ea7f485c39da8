"""Child processes: start, output by line, end, stop."""

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
from typing import Protocol, TypeVar

T = TypeVar("T")

GRACE_SEC = 10.0
_LONGEST_LINE = 1 << 20
_DRAIN_SEC = 1.0

_alive: set["Process"] = set()


class ProcessDied(Exception):
    """A process has ended unexpectedly."""

    def __init__(self, process: "Process") -> None:
        super().__init__(f"{process.name} {process.ending}")
        self.process = process


class Child(Protocol):
    """The part of asyncio.subprocess.Process that Process uses."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    @property
    def stdout(self) -> asyncio.StreamReader | None: ...
    async def wait(self) -> int: ...


class Process:
    """Child process in its own session, with merged standard output and error, read line by line.

    Created by `spawn` or `fork_server.fork`. The session shields it from Ctrl-C in the terminal, so this process
    determines the order of the stop.
    """

    def __init__(self, name: str, child: Child, on_line: Callable[[str], None] | None) -> None:
        self.name = name
        self.pid = child.pid
        self.tail: deque[str] = deque(maxlen=30)
        """Last lines of its output."""
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
        """Exit code, negative number of the signal that ended it, or None while it runs."""
        return self._child.returncode

    @property
    def ending(self) -> str:
        """Description of its end for messages."""
        code = self.returncode
        if code is None:
            return "is running"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def wait(self) -> int:
        """Wait for its end and for all of its output. Return the exit code."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process. Has no effect after its end."""
        # Not send_signal of the child, because its poll can consume the exit code, and asyncio then reports 255.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and all processes of its session."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace: float = GRACE_SEC, *, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and kill the process if it still runs after `grace` seconds."""
        self.send(with_signal)
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            self.kill()
            return await self.wait()

    async def _end(self) -> int:
        code = await self._child.wait()
        _alive.discard(self)
        # A grandchild can hold the pipe open. The output of the process itself has already arrived.
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
    """Start a command. `user` requires root. The kernel sends `parent_death_signal` if this process is killed.

    Raises OSError if the command cannot be started.
    """
    account = _account(user)
    child = await asyncio.create_subprocess_exec(
        *parent_death_prefix(parent_death_signal),
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
    """Run a command to its end. Return the exit code and the output. Kills it on cancellation or time-out.

    Raises TimeoutError, and OSError if the command cannot be started.
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
    """Return the result of `work`. Raises ProcessDied if one of the processes ends first."""
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
    """Stop the processes concurrently."""
    await asyncio.gather(*(process.stop(grace) for process in processes))


def kill_all() -> None:
    """Kill all running child processes."""
    for process in list(_alive):
        process.kill()


@functools.cache
def _setpriv() -> str | None:
    path = shutil.which("setpriv")
    if path is None:
        return None
    probe = subprocess.run([path, "--pdeathsig", "KILL", "true"], capture_output=True, check=False)
    return path if probe.returncode == 0 else None


def parent_death_prefix(number: signal.Signals) -> list[str]:
    """Return a command prefix. The kernel then signals the command after a SIGKILL of this process.

    Linux only. setpriv sets the signal and executes the command under the same process id. A function between fork
    and exec could do the same, but is unsafe with threads.
    """
    setpriv = _setpriv()
    return [] if setpriv is None else [setpriv, "--pdeathsig", number.name.removeprefix("SIG"), "--"]


def _account(user: str | None) -> tuple[int | None, int | None, list[int] | None]:
    """Return user id, group id and supplementary groups, or None for each without a user."""
    if user is None:
        return None, None, None
    entry = pwd.getpwnam(user)
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid)
