"""One TCP link that can be disturbed: it listens on a port of its own and passes on to another."""

import asyncio
import socket
import struct
from types import TracebackType
from typing import Literal, Self

from devstack.ports import free_port

HOST = "127.0.0.1"
_PIECE = 1 << 16
_RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)

State = Literal["passing", "slow", "black hole", "resetting"]


class Proxy:
    """A link to `target`, a port of this machine or of `host`. As a context manager it listens from entry to exit.

    A black hole is that of a network: nothing goes through, ends of connections included, and what was held up
    arrives when it is over, if somebody still waits. A link that is resetting has reset what it carried, and
    resets whoever connects.
    """

    def __init__(self, target: int, host: str = HOST) -> None:
        self.port = free_port()
        self.state: State = "passing"
        self.carried = 0
        """Bytes, in both directions."""
        self._target = target
        self._delay_sec = 0.0
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._host = host

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, HOST, self.port)
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
        """By which the target knows the connections that go through here."""
        names = (writer.get_extra_info("sockname") for writer in self._writers if not writer.is_closing())
        return {name[1] for name in names if name is not None}

    def heal(self) -> None:
        self._become("passing")

    def slow_down(self, delay_sec: float) -> None:
        """Every piece, in both directions, stays on its way for so long."""
        self._become("slow", delay_sec)

    def swallow(self) -> None:
        self._become("black hole")

    def reset(self) -> None:
        self._become("resetting")
        self._reset_all()

    def _become(self, state: State, delay_sec: float = 0.0) -> None:
        self.state, self._delay_sec = state, delay_sec
        if state == "black hole":
            self._open.clear()
        else:
            self._open.set()

    def _reset_all(self) -> None:
        for writer in self._writers:
            _reset(writer)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._writers.add(writer)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass  # the proxy ends; asyncio's server would complain of it
        finally:
            self._writers.discard(writer)
            self._connections.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        if self.state == "resetting":
            _reset(writer)
            return
        try:
            there, back = await asyncio.open_connection(self._host, self._target)
        except OSError:
            _reset(writer)  # as the target's machine would, where nobody listens
            return
        self._writers.add(back)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pump(reader, back))
                directions.create_task(self._pump(there, writer))
            back.close()
            writer.close()
        except* OSError:
            pass  # one side is gone, and the other is to learn it
        finally:
            for side in (back, writer):
                if not side.is_closing():
                    _reset(side)
            self._writers.discard(back)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        piece = b"more"
        while piece:
            piece = await reader.read(_PIECE)
            if self._delay_sec:
                await asyncio.sleep(self._delay_sec)
            await self._open.wait()
            if piece:
                writer.write(piece)
                self.carried += len(piece)
                await writer.drain()
        writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection so that the other side sees a reset; what was on its way is lost."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_WHEN_CLOSED)
    writer.transport.abort()
