"""HTTP server of the services with a constant response: `python -m bench.floor PORT`.

Its cost is the lower bound for any service.
"""

import sys

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from sandbox_broker.runtime import service

_BODY = (
    b'{"sandbox_id":"1000001","name":"sandbox-1","external_id":"00000000-0000-0000-0000-000000000001",'
    b'"allocated_at":1728054123,"expires_at":1728068523,"sfdc_account_id":null}'
)
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


class ConstantResponseApp(Starlette):
    """Application that responds without routing. Starlette only handles the lifespan events."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        status = 201 if scope["path"] == "/v1/allocate" else 200
        await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    service.run(ConstantResponseApp(), int(sys.argv[1]))
