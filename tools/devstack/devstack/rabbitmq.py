"""RabbitMQ: does one answer, and a private one from the binaries on this machine."""

import asyncio
import os
import secrets
import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, ChannelPreconditionFailed

from devstack.errors import CannotRun
from devstack.ports import free_port, is_free
from devstack.private import account, make_directory, wait_until, write
from devstack.processes import Process, run, spawn
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_connection

_DEBIAN = Path("/usr/lib/rabbitmq/bin")
_HOST = "127.0.0.1"
_STOP_SEC = 30.0
_CTL_SEC = 150.0
"""It starts a virtual machine of its own: two seconds, or a minute where many others want the processors."""


async def refusal(url: str, *, timeout: float = 5.0) -> str | None:
    """Why the broker does not answer, in one line; None when it does."""
    try:
        if urlsplit(url).scheme not in {"amqp", "amqps"} or not urlsplit(url).hostname:
            return "it is not like amqp://user:password@host:5672/"
        async with asyncio.timeout(timeout):
            await _knock(url)
            async with open_connection(url):
                pass
    except TimeoutError:
        return f"no answer within {timeout:.0f} s"
    except (AMQPError, OSError, ValueError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


async def has_consumers(url: str, queue: str) -> bool:
    """Whether somebody consumes from the queue; a queue that is not there has no consumers."""
    async with open_connection(url, timeout=5) as connection:
        channel = await connection.channel()
        try:
            declared = await channel.declare_queue(queue, passive=True)
        except ChannelNotFoundEntity:
            return False
        return bool(declared.declaration_result.consumer_count)


async def delete_outdated(url: str) -> list[str]:
    """Deletes the broker's queues that another version has left with other arguments, which the services could
    not declare; returns their names. What they held was only there to wake somebody: the database has the work.
    A queue that somebody uses stays."""
    outdated: list[str] = []
    async with open_connection(url, timeout=5) as connection:
        for queue in topology.QUEUES:
            channel = await connection.channel()
            try:
                await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
            except ChannelPreconditionFailed:
                channel = await connection.channel()
                there = await channel.declare_queue(queue.name, passive=True)
                if not there.declaration_result.consumer_count:  # quorum queues know no if_unused
                    await there.delete(if_unused=False, if_empty=False)
                    outdated.append(queue.name)
            await channel.close()
    return outdated


def place(url: str) -> str:
    """Host, port and virtual host, without the password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 5672}{parts.path}".removesuffix("/")


def binaries() -> Path | None:
    """The directory of `rabbitmq-server` and `rabbitmqctl`.

    Debian's own scripts on PATH insist on root and fixed directories; they wrap the ones looked for first.
    """
    candidates = [_DEBIAN]
    if (found := shutil.which("rabbitmq-server")) is not None:
        candidates.append(Path(found).parent)
    for candidate in candidates:
        if all((candidate / name).exists() for name in ("rabbitmq-server", "rabbitmqctl")):
            return candidate if shutil.which("erl") else None
    return None


class PrivateRabbitMQ:
    """A RabbitMQ node of our own: its own name, ports, port mapper (epmd), cookie and files, and no plugins.

    As a context manager it starts on entry, and on exit ends and leaves nothing. User guest, password guest,
    reachable from this machine only.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.process: Process | None = None
        self.node = f"sandbox-broker-{secrets.token_hex(4)}@localhost"
        self._distribution_port = free_port()
        self._mapper_port = free_port()
        self._mapper: Process | None = None
        self._user = account("rabbitmq")
        self._directory: Path | None = None

    @property
    def url(self) -> str:
        """Of the virtual host `/`."""
        return f"amqp://guest:guest@{_HOST}:{self.port}/"

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
        """Starts it, on the data it had if it ran before; returns when it answers AMQP."""
        binary = _required_binaries()
        if self._directory is None:
            self._directory = make_directory("rabbitmq", self._user)
            self._write_files(self._directory)
        if self._mapper is None or not self._mapper.running:
            await self._start_mapper(self._directory)
        self.process = await spawn(
            "rabbitmq",
            [binary / "rabbitmq-server"],
            env=self._environment(self._directory),
            cwd=self._directory,
            user=self._user,
            dies_with_us=signal.SIGTERM,
        )
        await wait_until(lambda: refusal(self.url), self.process, "the private RabbitMQ")

    async def stop(self) -> None:
        """Ends it in order; queues and messages that are durable stay."""
        if self.process is not None:
            await self.process.stop(_STOP_SEC)

    async def settle(self) -> None:
        """Has it write down at once what it would within a second or two: where its quorum queues have their files.
        Killed before, RabbitMQ 3.10 starts with a queue that answers nobody until it is deleted."""
        await self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    async def kill(self) -> None:
        """Ends it as a crash would; what it has confirmed stays, in queues that are `settle`d."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def ctl(self, *arguments: str) -> str:
        """What rabbitmqctl answers; raises RuntimeError, with what it said, when it fails."""
        if self._directory is None:
            raise RuntimeError("this RabbitMQ was not started")
        code, said = await run(
            [_required_binaries() / "rabbitmqctl", "--quiet", "--node", self.node, *arguments],
            env=self._environment(self._directory),
            cwd=self._directory,
            user=self._user,
            timeout=_CTL_SEC,
        )
        if code != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {said}")
        return said

    async def close(self) -> None:
        """Ends it and its port mapper, and removes its files."""
        await self.stop()
        if self._mapper is not None:
            # It knows no order to keep: without a node it has nothing to remember.
            self._mapper.kill()
            await self._mapper.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    async def _start_mapper(self, directory: Path) -> None:
        """Erlang would start a shared epmd that stays for ever; a node that finds one does not."""
        epmd = shutil.which("epmd")
        if epmd is None:
            raise CannotRun("Erlang's epmd is not installed on this machine")
        self._mapper = await spawn(
            "epmd",
            [epmd, "-port", str(self._mapper_port), "-address", _HOST],
            env=os.environ,
            cwd=directory,
            user=self._user,
        )

        async def listening() -> str | None:
            return "it does not listen" if is_free(self._mapper_port, host=_HOST) else None

        await wait_until(listening, self._mapper, "the private epmd")

    def _write_files(self, directory: Path) -> None:
        write(directory / ".erlang.cookie", secrets.token_hex(16), self._user, mode=0o400)
        write(directory / "enabled_plugins", "[].\n", self._user)
        write(directory / "rabbitmq-env.conf", "", self._user)
        lines = (
            f"listeners.tcp.1 = {_HOST}:{self.port}",
            "disk_free_limit.absolute = 64MB",
            "log.file.level = warning",
            "log.console = false",
        )
        write(directory / "rabbitmq.conf", "".join(f"{line}\n" for line in lines), self._user)

    def _environment(self, directory: Path) -> dict[str, str]:
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RABBITMQ_", "ERL_")) and name != "NOTIFY_SOCKET"
        }
        return ours | {
            "HOME": str(directory),
            "ERL_EPMD_ADDRESS": _HOST,
            "ERL_EPMD_PORT": str(self._mapper_port),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            # Without these the script stays as a parent that hands signals on to the node, and that a SIGKILL
            # would separate from it; with them it becomes the node.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }


async def _knock(url: str) -> None:
    """Raises OSError when nobody listens: aio-pika would log that as an error, on each try."""
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port or 5672)
    writer.close()
    await writer.wait_closed()


def _required_binaries() -> Path:
    binary = binaries()
    if binary is None:
        raise CannotRun("rabbitmq-server and Erlang are not installed on this machine")
    return binary
