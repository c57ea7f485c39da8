"""RabbitMQ: connection check, clean-up of a virtual host, private servers."""

import asyncio
import os
import secrets
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, ChannelPreconditionFailed

from devstack.errors import CannotRun
from devstack.ports import free_port, is_free
from devstack.private import make_directory, named_directory, service_account, wait_until, write
from devstack.processes import Process, run, spawn
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_connection
from sandbox_broker.runtime.server_urls import HostPort, amqp_host, split_amqp_urls

_DEBIAN = Path("/usr/lib/rabbitmq/bin")
_PROGRAMS = ("rabbitmq-server", "rabbitmqctl")
_HOST = "127.0.0.1"
_STOP_SEC = 30.0
_NOTE_CHARACTERS = 10_000
_CTL_SEC = 150.0
"""rabbitmqctl starts an Erlang virtual machine. That takes 2 s, and up to a minute on a busy machine."""


async def unavailable_reason(url: str, *, timeout: float = 5.0) -> str | None:
    """Return one line with the reason why a connection fails, or None if it succeeds."""
    try:
        servers = [amqp_host(node) for node in split_amqp_urls(url)]
        async with asyncio.timeout(timeout):
            await _connect_tcp(servers)
            async with open_connection(url):
                pass
    except TimeoutError:
        return f"no response within {timeout:.0f} s"
    except (AMQPError, OSError, ValueError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


async def has_consumers(url: str, queue: str) -> bool:
    """Return True if the queue has a consumer, and False if the queue does not exist."""
    async with open_connection(url, timeout=5) as connection:
        channel = await connection.channel()
        try:
            declared = await channel.declare_queue(queue, passive=True)
        except ChannelNotFoundEntity:
            return False
        return bool(declared.declaration_result.consumer_count)


async def delete_outdated(url: str) -> list[str]:
    """Delete queues that another version declared with other arguments. Return their names.

    The services could not declare such a queue. No work is lost, because its messages only wake a service and the
    database contains the work. A queue with a consumer is kept. Then the topology is declared with its bindings,
    because the services would not notice that a deleted queue exists again without them.
    """
    outdated: list[str] = []
    async with open_connection(url, timeout=5) as connection:
        for queue in topology.QUEUES:
            channel = await connection.channel()
            try:
                await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
            except ChannelPreconditionFailed:
                channel = await connection.channel()
                existing = await channel.declare_queue(queue.name, passive=True)
                if not existing.declaration_result.consumer_count:  # quorum queues do not support if_unused
                    await existing.delete(if_unused=False, if_empty=False)
                    outdated.append(queue.name)
            await channel.close()
        with suppress(ChannelPreconditionFailed):  # a queue was kept, and the services will report it
            await topology.declare(await connection.channel())
    return outdated


def location(url: str) -> str:
    """Return host, port and virtual host of a URL, without the password."""
    nodes = split_amqp_urls(url)
    return ", ".join(f"{amqp_host(node)}{urlsplit(node).path}".removesuffix("/") for node in nodes)


def named_binaries() -> Path | None:
    """Return the directory of RABBITMQ_BIN_DIR, or None if it is not set."""
    return named_directory("RABBITMQ_BIN_DIR", _PROGRAMS)


def find_binaries() -> Path | None:
    """Return the directory of `rabbitmq-server` and `rabbitmqctl`: RABBITMQ_BIN_DIR, Debian's, or the one in PATH.

    Debian's wrappers in PATH require root and fixed directories. The wrapped programs are therefore searched first.
    RABBITMQ_BIN_DIR may contain Erlang's `erl` and `epmd`, too. Raises CannotRun if it lacks a program of RabbitMQ.
    """
    if (named := named_binaries()) is not None:
        return named
    candidates = [_DEBIAN]
    if (found := shutil.which("rabbitmq-server")) is not None:
        candidates.append(Path(found).parent)
    for candidate in candidates:
        if all((candidate / name).exists() for name in _PROGRAMS):
            return candidate if shutil.which("erl") else None
    return None


class PrivateRabbitMQ:
    """Private RabbitMQ node with its own name, ports, port mapper (epmd), cookie and files.

    The context manager starts it and, on exit, stops it and removes all files. The user is guest with password
    guest. The node accepts connections from this machine only. Its only plugin is the HTTP API, with `management`.

    `cookie`, `configuration` (lines of rabbitmq.conf) and `advanced_configuration` (content of advanced.config) are
    for the nodes of a cluster.
    """

    def __init__(
        self,
        *,
        cookie: str | None = None,
        configuration: Sequence[str] = (),
        advanced_configuration: str = "[].",
        management: bool = False,
    ) -> None:
        self.port = free_port()
        self.process: Process | None = None
        self.node = f"sandbox-broker-{secrets.token_hex(4)}@localhost"
        self.distribution_port = free_port()
        self.mapper_port = free_port()
        self.configuration = tuple(configuration)
        self.advanced_configuration = advanced_configuration
        self._management_port = free_port() if management else None
        self._mapper: Process | None = None
        self._cookie = cookie or secrets.token_hex(16)
        self._user = service_account("rabbitmq")
        self._directory: Path | None = None

    @property
    def url(self) -> str:
        """URL of the virtual host `/`."""
        return self.build_url(self.port)

    def build_url(self, port: int) -> str:
        """URL of the virtual host `/` at another port, for example the port of a proxy."""
        return f"amqp://guest:guest@{_HOST}:{port}/"

    @property
    def management_url(self) -> str | None:
        """URL of the HTTP API, or None without `management`."""
        port = self._management_port
        return None if port is None else f"http://guest:guest@{_HOST}:{port}"

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
        """Start the node, after a stop with the same data. Returns after the first successful connection."""
        binary = _required_binaries()
        directory = await self.start_mapper()
        self.process = await spawn(
            "rabbitmq",
            [binary / "rabbitmq-server"],
            env=self._environment(directory),
            cwd=directory,
            user=self._user,
            parent_death_signal=signal.SIGTERM,
        )
        await wait_until(lambda: unavailable_reason(self.url), self.process, "the private RabbitMQ")

    async def start_mapper(self) -> Path:
        """Create the files and start the port mapper, unless that has been done. Return the node's directory."""
        if self._directory is None:
            self._directory = make_directory("rabbitmq", self._user)
            self._write_files(self._directory)
        if self._mapper is None or not self._mapper.running:
            await self._start_mapper(self._directory)
        return self._directory

    async def stop(self) -> None:
        """Stop the node and keep durable queues and messages."""
        if self.process is not None:
            await self.process.stop(_STOP_SEC)

    async def sync_queue_metadata(self) -> None:
        """Write the file names of quorum queues to disk now instead of within two seconds.

        After a kill before that write, a queue of RabbitMQ 3.10 does not respond until it is deleted.
        """
        await self.run_rabbitmqctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    async def kill(self) -> None:
        """Kill the node. After `sync_queue_metadata`, confirmed messages are kept."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    def freeze(self) -> None:
        """Suspend the node until `thaw`."""
        if self.process is not None:
            self.process.send(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.process is not None:
            self.process.send(signal.SIGCONT)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def run_rabbitmqctl(self, *arguments: str) -> str:
        """Return the output of rabbitmqctl. Raises RuntimeError with the output if it fails."""
        if self._directory is None:
            raise RuntimeError("the private RabbitMQ has not been started")
        code, output = await run(
            [_required_binaries() / "rabbitmqctl", "--quiet", "--node", self.node, *arguments],
            env=self._environment(self._directory),
            cwd=self._directory,
            user=self._user,
            timeout=_CTL_SEC,
        )
        if code != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {output}")
        return output

    def read_log(self) -> str:
        """Return the node's log since its first start: warnings and errors."""
        files = [] if self._directory is None else sorted((self._directory / "log").glob("*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    @contextmanager
    def log_in_errors(self) -> Iterator[None]:
        """Add the end of the node's log to an error of the block, because `close` removes the log."""
        try:
            yield
        except Exception as error:
            error.add_note(f"the end of RabbitMQ's log:\n{self.read_log()[-_NOTE_CHARACTERS:]}")
            raise

    async def close(self) -> None:
        """Stop the node and its port mapper, and remove its files."""
        await self.stop()
        if self._mapper is not None:
            # epmd needs no graceful stop, because it stores only the ports of running nodes.
            self._mapper.kill()
            await self._mapper.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    async def _start_mapper(self, directory: Path) -> None:
        """Start a private epmd, because Erlang would start a shared one that never ends."""
        epmd = shutil.which("epmd", path=_search_path())
        if epmd is None:
            raise CannotRun("Erlang's epmd is not installed on this machine")
        self._mapper = await spawn(
            "epmd",
            [epmd, "-port", str(self.mapper_port), "-address", _HOST],
            env=os.environ,
            cwd=directory,
            user=self._user,
        )

        async def check() -> str | None:
            return "it does not listen" if is_free(self.mapper_port, host=_HOST) else None

        await wait_until(check, self._mapper, "the private epmd")

    def _write_files(self, directory: Path) -> None:
        write(directory / ".erlang.cookie", self._cookie, self._user, mode=0o400)
        plugins = "" if self._management_port is None else "rabbitmq_management"
        write(directory / "enabled_plugins", f"[{plugins}].\n", self._user)
        write(directory / "rabbitmq-env.conf", "", self._user)
        write(directory / "advanced.config", f"{self.advanced_configuration}\n", self._user)
        lines = (
            f"listeners.tcp.1 = {_HOST}:{self.port}",
            "disk_free_limit.absolute = 64MB",
            "log.file.level = warning",
            "log.console = false",
            *self._management_lines(),
            *self.configuration,
        )
        write(directory / "rabbitmq.conf", "".join(f"{line}\n" for line in lines), self._user)

    def _management_lines(self) -> tuple[str, ...]:
        port = self._management_port
        return () if port is None else (f"management.tcp.ip = {_HOST}", f"management.tcp.port = {port}")

    def _environment(self, directory: Path) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RABBITMQ_", "ERL_")) and name != "NOTIFY_SOCKET"
        }
        return environment | {
            "PATH": _search_path(),
            "HOME": str(directory),
            "ERL_EPMD_ADDRESS": _HOST,
            "ERL_EPMD_PORT": str(self.mapper_port),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            # With these variables the start script executes the node. Otherwise it stays as a parent, and a SIGKILL
            # of the script would leave the node running.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }


async def _connect_tcp(servers: Sequence[HostPort]) -> None:
    """Raise OSError if no server listens. aio-pika would log each failed attempt as an error."""
    for position, server in enumerate(servers, start=1):
        try:
            _, writer = await asyncio.open_connection(*server)
        except OSError:
            if position == len(servers):
                raise
        else:
            writer.close()
            await writer.wait_closed()
            return


def _search_path() -> str:
    """Return PATH with the directory of RabbitMQ's programs first, because it may contain another Erlang."""
    return f"{_required_binaries()}:{os.environ.get('PATH', os.defpath)}"


def _required_binaries() -> Path:
    binary = find_binaries()
    if binary is None:
        raise CannotRun("rabbitmq-server and Erlang are not installed on this machine")
    return binary
