"""Error responses in the format of CSP, and responses that hang, break or flood the client."""

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


def build_error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": [{"message": message}]}, status, headers)


def build_failure(status: int | str, *, html: bool, retry_after_sec: float | None) -> Response:
    """Build an injected failure. `status` is an HTTP status or one of `SPECIAL_RESPONSES`."""
    if isinstance(status, str):
        return SPECIAL_RESPONSES[status]()
    headers = {}
    if retry_after_sec is not None and status in (429, 503):
        headers["Retry-After"] = f"{retry_after_sec:g}"
    if html:
        return HTMLResponse(ERROR_PAGE, status, headers)
    return build_error(status, "injected by the simulator", headers)


class HangingResponse(Response):
    """Response that sends no byte until the client disconnects."""

    async def __call__(self, _: Scope, receive: Receive, __: Send) -> None:
        await _wait_for_disconnect(receive)


class CutResponse(Response):
    """Response that ends in the middle of the body."""

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"results": [', "more_body": True})


class GzipBombResponse(Response):
    """Response with a small gzip body that decodes to 256 MiB. It ignores Accept-Encoding."""

    def __init__(self) -> None:
        super().__init__(media_type="application/json", headers={"Content-Encoding": "gzip"})

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        body = await asyncio.to_thread(build_gzip_bomb)  # in a thread, because the first call takes a second
        self.headers["Content-Length"] = str(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})


class EndlessResponse(Response):
    """Response that repeats `chunk`, with pauses, until the client disconnects."""

    def __init__(self, chunk: bytes, pause_sec: float) -> None:
        super().__init__(media_type="application/json")
        del self.headers["Content-Length"]
        self._chunk = chunk
        self._pause_sec = pause_sec

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        disconnect = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            while not disconnect.done():
                await send({"type": "http.response.body", "body": self._chunk, "more_body": True})
                await asyncio.sleep(self._pause_sec)
        finally:
            disconnect.cancel()


@functools.cache
def build_gzip_bomb() -> bytes:
    """Compress 256 MiB of spaces to 255 KiB."""
    compressor = zlib.compressobj(level=9, wbits=zlib.MAX_WBITS | 16)
    chunk = b" " * 1024 * 1024
    return b"".join([*(compressor.compress(chunk) for _ in range(BOMB_MIB)), compressor.flush()])


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


SPECIAL_RESPONSES: Mapping[str, Callable[[], Response]] = {
    HANG: HangingResponse,
    CUT: CutResponse,
    BOMB: GzipBombResponse,
    FLOOD: lambda: EndlessResponse(FLOOD_CHUNK, pause_sec=0),
    DRIP: lambda: EndlessResponse(b" ", pause_sec=DRIP_PAUSE_SEC),
}
