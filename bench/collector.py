"""Trace collector that discards all traces: `python -m bench.collector PORT`.

It receives exported traces as an OpenTelemetry collector does, so that tracing has its real cost.
"""

import sys

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox_broker.observability import health
from sandbox_broker.runtime import service


async def _discard_traces(request: Request) -> Response:
    async for _ in request.stream():
        pass
    return Response(media_type="application/x-protobuf")


if __name__ == "__main__":
    routes = [*health.routes({}), Route("/v1/traces", _discard_traces, methods=["POST"])]
    service.run(Starlette(routes=routes), int(sys.argv[1]))
