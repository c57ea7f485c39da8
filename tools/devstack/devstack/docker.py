"""Docker containers that end together with this process."""

import os
import shutil
import signal
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.processes import Process, run, spawn

_PULL_SEC = 1800.0


async def unavailable_reason() -> str | None:
    """Return one line with the reason why Docker is not usable, or None if it is."""
    if shutil.which("docker") is None:
        return "not installed"
    try:
        code, output = await run(["docker", "info", "--format", "{{.ServerVersion}}"], timeout=15)
    except TimeoutError:
        return "does not answer"
    if code == 0:
        return None
    return output.splitlines()[-1] if output else f"docker info ended with exit code {code}"


class Container:
    """Container with its port published on a free port of 127.0.0.1, removed with its data on exit.

    `docker run` stays in the foreground as a child process. The end of the container is therefore the end of a
    process, and the container ends together with this process.
    """

    def __init__(self, name: str, image: str, *, port: int, env: Mapping[str, str], terminal: Terminal) -> None:
        self.name = name
        self.image = image
        self.process: Process | None = None
        self.published = 0
        """Port on 127.0.0.1; 0 before the start."""
        self._port = port
        self._env = env
        self._terminal = terminal

    async def __aenter__(self) -> Self:
        await self._pull()
        await self._remove()  # left by a killed run
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _pull(self) -> None:
        code, _ = await run(["docker", "image", "inspect", self.image])
        if code == 0:
            return
        self._terminal.print_step(f"Docker: pulling {self.image}")
        code, output = await run(["docker", "pull", "--quiet", self.image], timeout=_PULL_SEC)
        if code != 0:
            reason = output.splitlines()[-1] if output else f"exit code {code}"
            raise CannotRun(f"Docker cannot pull {self.image}: {reason}", status=1)

    async def _start(self) -> None:
        # Names only. Docker reads the values from its environment, because arguments are visible in process lists.
        names = [part for variable in self._env for part in ("--env", variable)]
        publish = f"127.0.0.1::{self._port}"
        self.process = await spawn(
            self.name,
            ["docker", "run", "--rm", "--name", self.name, "--publish", publish, *names, self.image],
            env={**os.environ, **self._env},
            parent_death_signal=signal.SIGTERM,
        )
        while self.published == 0:
            code, output = await run(["docker", "port", self.name, f"{self._port}/tcp"])
            if code == 0 and output:
                self.published = int(output.splitlines()[0].rpartition(":")[2])
            elif not self.process.running:
                await self.process.wait()
                raise CannotRun(
                    f"Docker cannot run {self.image}: {' / '.join(list(self.process.tail)[-3:])}", status=1
                )

    async def _end(self) -> None:
        await self._remove()
        if self.process is not None:
            await self.process.stop()

    async def _remove(self) -> None:
        await run(["docker", "rm", "--force", "--volumes", self.name])
