"""Raw HTTP connections for tests and benchmarks with misbehaving clients."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

GET_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    """One HTTP connection. Sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""
        """Head of the last response."""

    async def send(self, data: bytes) -> None:
        """Send bytes. Returns after the kernel has accepted them; large data stays in a buffer."""
        self.writer.write(data)
        await self.writer.drain()

    async def response(self) -> tuple[int, dict[str, Any]]:
        """Read the next response. Return its status and its JSON body."""
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", self.head, re.IGNORECASE)
        assert length
        return int(self.head.split()[1]), json.loads(await self.reader.readexactly(int(length[1])))

    async def read_to_end(self) -> bytes:
        """Read until the server closes the connection."""
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := await self.reader.read(1 << 16):
                received += chunk
        return bytes(received)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
