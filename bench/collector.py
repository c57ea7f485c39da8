"""Takes traces and forgets them, as an OpenTelemetry collector would take them. `python -m bench.collector PORT`"""

import sys

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox_broker import health, service


async def _take(request: Request) -> Response:
    async for _ in request.stream():
        pass
    return Response(media_type="application/x-protobuf")


if __name__ == "__main__":
    routes = [*health.routes({}), Route("/v1/traces", _take, methods=["POST"])]
    service.run(Starlette(routes=routes), int(sys.argv[1]))
