"""HTTP byte by byte, for tests and benchmarks whose clients do not behave."""

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
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""
        """Of the last response."""

    async def send(self, sent: bytes) -> None:
        """Returns when the kernel has all of it, if it is not much."""
        self.writer.write(sent)
        await self.writer.drain()

    async def response(self) -> tuple[int, dict[str, Any]]:
        """The next one: its status, and its JSON."""
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", self.head, re.IGNORECASE)
        assert length
        return int(self.head.split()[1]), json.loads(await self.reader.readexactly(int(length[1])))

    async def read_to_end(self) -> bytes:
        """What comes until the server has ended the connection."""
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
