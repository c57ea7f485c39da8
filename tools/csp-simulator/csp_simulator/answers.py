"""The answers that go wrong, in the shape that CSP gives its errors."""

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from csp_simulator.switches import CUT, HANG

ERROR_PAGE = "<html><head><title>Error</title></head><body><h1>upstream error</h1></body></html>"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": [{"message": message}]}, status, headers)


def failure(status: int | str, *, html: bool, retry_after_sec: float | None) -> Response:
    if status == HANG:
        return Hang()
    if status == CUT:
        return Cut()
    assert isinstance(status, int)
    headers = {}
    if retry_after_sec is not None and status in (429, 503):
        headers["Retry-After"] = f"{retry_after_sec:g}"
    if html:
        return HTMLResponse(ERROR_PAGE, status, headers)
    return refusal(status, "injected by the simulator", headers)


class Hang(Response):
    """Nothing, until the client has gone."""

    async def __call__(self, _: Scope, receive: Receive, __: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class Cut(Response):
    """The beginning of an answer, after which the server ends the connection."""

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"results": [', "more_body": True})
