"""TCP proxy that can delay, hold back or reset its connections."""

import asyncio
import socket
import struct
from types import TracebackType
from typing import Literal, Self

from devstack.ports import free_port

HOST = "127.0.0.1"
_CHUNK_SIZE = 1 << 16
_LINGER_RESET = struct.pack("ii", 1, 0)

State = Literal["passing", "slow", "black hole", "resetting"]


class Proxy:
    """TCP proxy to the port `target` of `host`. As a context manager it listens from entry to exit.

    A black hole behaves like a network partition: it holds back all data and connection ends, and delivers them
    after `heal` if the connection still exists. `reset` resets all connections, and new ones until `heal`.
    """

    def __init__(self, target: int, host: str = HOST) -> None:
        self.port = free_port()
        self.state: State = "passing"
        self.bytes_carried = 0
        """Total of both directions."""
        self._target = target
        self._delay_sec = 0.0
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._host = host

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._handle_connection, HOST, self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self._reset_all()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def outgoing_ports(self) -> set[int]:
        """Return the local ports of the open connections to the target, which are the target's client ports."""
        names = (writer.get_extra_info("sockname") for writer in self._writers if not writer.is_closing())
        return {name[1] for name in names if name is not None}

    def heal(self) -> None:
        self._set_state("passing")

    def slow_down(self, delay_sec: float) -> None:
        """Delay every chunk of data in both directions."""
        self._set_state("slow", delay_sec)

    def black_hole(self) -> None:
        self._set_state("black hole")

    def reset(self) -> None:
        self._set_state("resetting")
        self._reset_all()

    def _set_state(self, state: State, delay_sec: float = 0.0) -> None:
        self.state, self._delay_sec = state, delay_sec
        if state == "black hole":
            self._open.clear()
        else:
            self._open.set()

    def _reset_all(self) -> None:
        for writer in self._writers:
            _reset(writer)

    async def _handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._writers.add(writer)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass  # the proxy is stopping; asyncio's server would log the error
        finally:
            self._writers.discard(writer)
            self._connections.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        if self.state == "resetting":
            _reset(writer)
            return
        try:
            target_reader, target_writer = await asyncio.open_connection(self._host, self._target)
        except OSError:
            _reset(writer)  # like a host without a listener on the port
            return
        self._writers.add(target_writer)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pump(reader, target_writer))
                directions.create_task(self._pump(target_reader, writer))
            target_writer.close()
            writer.close()
        except* OSError:
            pass  # one side is gone; the finally block resets the other
        finally:
            for side in (target_writer, writer):
                if not side.is_closing():
                    _reset(side)
            self._writers.discard(target_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunk = b"start"
        while chunk:
            chunk = await reader.read(_CHUNK_SIZE)
            if self._delay_sec:
                await asyncio.sleep(self._delay_sec)
            await self._open.wait()
            if chunk:
                writer.write(chunk)
                self.bytes_carried += len(chunk)
                await writer.drain()
        writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with a TCP reset. Data in transit is lost."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    writer.transport.abort()
