"""The least that an answer costs: the services' HTTP server with a constant answer. `python -m bench.floor PORT`"""

import sys

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from sandbox_broker import service

_BODY = (
    b'{"sandbox_id":"1000001","name":"sandbox-1","external_id":"00000000-0000-0000-0000-000000000001",'
    b'"allocated_at":1728054123,"expires_at":1728068523,"sfdc_account_id":null}'
)
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


class Floor(Starlette):
    """Answers before Starlette looks at the request; Starlette serves the server's start and stop."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        status = 201 if scope["path"] == "/v1/allocate" else 200
        await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    service.run(Floor(), int(sys.argv[1]))
