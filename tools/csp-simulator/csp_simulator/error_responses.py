"""Error responses in the format of CSP, and responses that hang or break."""

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from csp_simulator.switches import CUT, HANG

ERROR_PAGE = "<html><head><title>Error</title></head><body><h1>upstream error</h1></body></html>"


def build_error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": [{"message": message}]}, status, headers)


def build_failure(status: int | str, *, html: bool, retry_after_sec: float | None) -> Response:
    """Build an injected failure. `status` is an HTTP status, HANG or CUT."""
    if status == HANG:
        return HangingResponse()
    if status == CUT:
        return CutResponse()
    assert isinstance(status, int)
    headers = {}
    if retry_after_sec is not None and status in (429, 503):
        headers["Retry-After"] = f"{retry_after_sec:g}"
    if html:
        return HTMLResponse(ERROR_PAGE, status, headers)
    return build_error(status, "injected by the simulator", headers)


class HangingResponse(Response):
    """Response that sends no byte until the client disconnects."""

    async def __call__(self, _: Scope, receive: Receive, __: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class CutResponse(Response):
    """Response whose connection closes in the middle of the body."""

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"results": [', "more_body": True})
