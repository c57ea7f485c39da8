"""Raw HTTP requests, which HTTP clients would refuse to send."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from devstack.wire import connected

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | None]:
        """Status and error code; the code is None for a success."""
        return self.status, None if self.status < 300 else self.json["detail"]["code"]


def build_request(method: str, path: str, headers: Headers | Mapping[str, str]) -> bytes:
    """Build a request without a body. The server closes the connection after it."""
    if isinstance(headers, Mapping):
        headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    fields = [(b"Host", b"gateway"), (b"Connection", b"close"), *headers]
    head = b"".join(b"%b: %b\r\n" % field for field in fields)
    return f"{method} {path} HTTP/1.1\r\n".encode() + head + b"\r\n"


async def send_request(url: str, request: bytes) -> Response:
    """Send the bytes unchanged and read until the server closes the connection."""
    async with asyncio.timeout(60), connected(url) as client:
        client.writer.write(request)
        head, _, body = (await client.read_to_end()).partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, status, *_ = status_line.split(" ")
    assert version == "HTTP/1.1"
    pairs = [line.partition(": ") for line in lines]
    response = Response(int(status), httpx.Headers([(name, value) for name, _, value in pairs]), body)
    assert int(response.headers["Content-Length"]) == len(body)
    return response
