"""The answers that go wrong, in the shape that CSP gives its errors."""

import asyncio
import functools
import zlib
from collections.abc import Callable, Mapping

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from csp_simulator.switches import BOMB, CUT, DRIP, FLOOD, HANG

BOMB_MIB = 256
FLOOD_CHUNK = b" " * 64 * 1024
DRIP_PAUSE_SEC = 0.05

ERROR_PAGE = "<html><head><title>Error</title></head><body><h1>upstream error</h1></body></html>"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": [{"message": message}]}, status, headers)


def failure(status: int | str, *, html: bool, retry_after_sec: float | None) -> Response:
    if isinstance(status, str):
        return WITHOUT_STATUS[status]()
    headers = {}
    if retry_after_sec is not None and status in (429, 503):
        headers["Retry-After"] = f"{retry_after_sec:g}"
    if html:
        return HTMLResponse(ERROR_PAGE, status, headers)
    return refusal(status, "injected by the simulator", headers)


class Hang(Response):
    """Nothing, until the client has gone."""

    async def __call__(self, _: Scope, receive: Receive, __: Send) -> None:
        await _disconnected(receive)


class Cut(Response):
    """The beginning of an answer, after which the server ends the connection."""

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"results": [', "more_body": True})


class Bomb(Response):
    """Spaces, compressed to a thousandth of their size. It is sent without regard to Accept-Encoding."""

    def __init__(self) -> None:
        super().__init__(media_type="application/json", headers={"Content-Encoding": "gzip"})

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        body = await asyncio.to_thread(gzip_bomb)  # takes a second, the first time
        self.headers["Content-Length"] = str(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})


class Endless(Response):
    """`chunk` again and again, until the client has gone."""

    def __init__(self, chunk: bytes, pause_sec: float) -> None:
        super().__init__(media_type="application/json")
        del self.headers["Content-Length"]
        self._chunk = chunk
        self._pause_sec = pause_sec

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = asyncio.create_task(_disconnected(receive))
        try:
            while not gone.done():
                await send({"type": "http.response.body", "body": self._chunk, "more_body": True})
                await asyncio.sleep(self._pause_sec)
        finally:
            gone.cancel()


@functools.cache
def gzip_bomb() -> bytes:
    """256 MiB of spaces as 255 KiB of gzip."""
    compressor = zlib.compressobj(level=9, wbits=zlib.MAX_WBITS | 16)
    chunk = b" " * 1024 * 1024
    return b"".join([*(compressor.compress(chunk) for _ in range(BOMB_MIB)), compressor.flush()])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


WITHOUT_STATUS: Mapping[str, Callable[[], Response]] = {
    HANG: Hang,
    CUT: Cut,
    BOMB: Bomb,
    FLOOD: lambda: Endless(FLOOD_CHUNK, pause_sec=0),
    DRIP: lambda: Endless(b" ", pause_sec=DRIP_PAUSE_SEC),
}
