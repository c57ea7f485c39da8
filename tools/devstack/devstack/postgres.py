"""PostgreSQL: connection check and private servers."""

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import asyncpg

from devstack.errors import CannotRun
from devstack.ports import free_port
from devstack.private import make_directory, named_directory, service_account, wait_until, write
from devstack.processes import Process, run, spawn
from sandbox_broker.runtime.server_urls import format_database, split_database_url

_DEBIAN = Path("/usr/lib/postgresql")
_HOST = "127.0.0.1"
_SUPERUSER = "postgres"


async def unavailable_reason(url: str, *, timeout: float = 5.0) -> str | None:
    """Return one line with the reason why a connection fails, or None if it succeeds."""
    try:
        split_database_url(driver_neutral(url))  # because asyncpg would choose a host itself if there is none
        connection = await asyncpg.connect(driver_neutral(url), timeout=timeout)
    except TimeoutError:
        return f"no response within {timeout:.0f} s"
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    await connection.close(timeout=timeout)
    return None


def driver_neutral(url: str) -> str:
    """Remove SQLAlchemy's driver name, because asyncpg does not accept it."""
    return url.replace("postgresql+asyncpg://", "postgresql://", 1)


def location(url: str) -> str:
    """Return host, port and database of a URL, without the password."""
    return format_database(driver_neutral(url)).removesuffix("/")


def named_binaries() -> Path | None:
    """Return the directory of POSTGRES_BIN_DIR, or None if it is not set."""
    return named_directory("POSTGRES_BIN_DIR", ("initdb", "postgres"))


def find_binaries() -> Path | None:
    """Return the directory of `initdb` and `postgres`: POSTGRES_BIN_DIR, Debian's newest version, or that in PATH.

    Raises CannotRun if POSTGRES_BIN_DIR lacks one of them.
    """
    if (named := named_binaries()) is not None:
        return named
    versions = [
        path for path in _DEBIAN.glob("*/bin") if (path / "initdb").exists() and (path / "postgres").exists()
    ]
    if versions:
        return max(versions, key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0)
    found = shutil.which("initdb")
    if found is None or shutil.which("postgres", path=str(Path(found).parent)) is None:
        return None
    return Path(found).parent


class PrivatePostgres:
    """Private PostgreSQL server with its own port and a temporary data directory, created in `within` if given.

    The context manager starts it and, on exit, stops it and removes all files. Writes are not synced to disk, so
    they survive a kill of the server but not a crash of the machine.

    `name` is the cluster name, under which a standby connects to its primary. `password` is for a standby, because
    it has the password of its primary.
    """

    def __init__(self, *, within: Path | None = None, name: str = "", password: str | None = None) -> None:
        self.port = free_port()
        self.process: Process | None = None
        self.name = name
        self._within = within
        self._password = password or secrets.token_urlsafe(12)
        self._user = service_account("postgres")
        self._directory: Path | None = None

    @property
    def url(self) -> str:
        """URL of the database `postgres` for the superuser."""
        return f"postgresql://{_SUPERUSER}:{self._password}@{_HOST}:{self.port}/postgres"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the server, after a stop with the same data. Returns after the first successful connection."""
        binary = _required_binaries()
        if self._directory is None:
            self._directory = make_directory("postgres", self._user, within=self._within)
            await self._initialise(binary, self._directory)
        self.process = await spawn(
            "postgres",
            [binary / "postgres", "-D", self._directory / "data", *self._options()],
            env=_environment(),
            cwd=self._directory,
            user=self._user,
            parent_death_signal=signal.SIGINT,
        )
        await wait_until(lambda: unavailable_reason(self.url), self.process, "the private PostgreSQL")

    async def stop(self, *, immediately: bool = False) -> None:
        """Stop the server without waiting for clients and keep the data.

        `immediately` skips the shutdown checkpoint; the next start then recovers from the log.
        """
        if self.process is not None:
            await self.process.stop(with_signal=signal.SIGQUIT if immediately else signal.SIGINT)

    async def kill(self) -> None:
        """Kill the server and keep the data."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    async def start_as_standby(self, primary: Self) -> None:
        """Stop the server, replace its data by a copy of the primary, and start it as a standby of the primary."""
        self.thaw()  # frozen processes would survive the death of the server
        await self.kill()
        if self._directory is None:
            self._directory = make_directory("postgres", self._user, within=self._within)
        data = self._directory / "data"
        await self._remove_shared_memory(data / "postmaster.pid")
        shutil.rmtree(data, ignore_errors=True)
        await _run_tool(
            [
                _required_binaries() / "pg_basebackup",
                f"--dbname={primary.url}",
                f"--pgdata={data}",
                "--write-recovery-conf",
                "--checkpoint=fast",
                "--no-sync",
            ],
            cwd=self._directory,
            user=self._user,
        )
        await self.start()

    def freeze(self) -> None:
        """Suspend all processes of the server until `thaw`."""
        self._send_to_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send_to_all(signal.SIGCONT)

    def _send_to_all(self, number: signal.Signals) -> None:
        if self.process is None or not self.process.running:
            return
        # The server first, because it starts processes. Each of them is the leader of its own group.
        self.process.send(number)
        for pid in _list_children(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def close(self) -> None:
        """Stop the server and remove its files."""
        await self.stop()
        if self._directory is None:
            return
        await self._remove_shared_memory(self._directory / "data" / "postmaster.pid")
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None

    async def _initialise(self, binary: Path, directory: Path) -> None:
        password_file = directory / "password"
        write(password_file, self._password, self._user)
        # --no-locale, because only the C locale exists on every machine.
        options = ["--no-sync", "--no-instructions", "--no-locale", "-E", "UTF8", "-U", _SUPERUSER]
        await _run_tool(
            [
                binary / "initdb",
                "-D",
                directory / "data",
                "-A",
                "scram-sha-256",
                f"--pwfile={password_file}",
                *options,
            ],
            cwd=directory,
            user=self._user,
        )

    def _options(self) -> list[str]:
        settings = {
            "listen_addresses": _HOST,
            "port": str(self.port),
            "cluster_name": self.name,
            "unix_socket_directories": "",
            "fsync": "off",
            # Log to files, because a pipe not read by a busy test would fill up and block the server.
            "logging_collector": "on",
            # Memory-mapped files in the data directory, so that a killed server leaves no files in /dev/shm.
            "dynamic_shared_memory_type": "mmap",
        }
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    async def _remove_shared_memory(self, pid_file: Path) -> None:
        """Remove the System V segment left by a killed server. Its number is in the pid file."""
        segment = _segment(pid_file)
        if segment is not None and shutil.which("ipcrm") is not None:
            await run(["ipcrm", "-m", segment], cwd=Path("/"), user=self._user)


async def _run_tool(command: Sequence[str | Path], *, cwd: Path, user: str | None) -> None:
    """Run a program of PostgreSQL. Raises CannotRun with its output if it fails."""
    code, output = await run(command, env=_environment(), cwd=cwd, user=user)
    if code != 0:
        program = Path(command[0]).name
        raise CannotRun(f"{program} ended with exit code {code}: {output.replace(chr(10), ' / ')}", status=1)


def _required_binaries() -> Path:
    binary = find_binaries()
    if binary is None:
        raise CannotRun("PostgreSQL's initdb and postgres are not installed on this machine")
    return binary


def _list_children(pid: int) -> list[int]:
    """Return the child processes. Linux only: elsewhere the list is empty."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _segment(pid_file: Path) -> str | None:
    """Return the number of the shared memory segment from the pid file, or None."""
    try:
        return pid_file.read_text().splitlines()[6].split()[1]
    except (OSError, IndexError):
        return None


def _environment() -> dict[str, str]:
    """Return the environment without PG* variables, because a server would use settings meant for clients."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}
