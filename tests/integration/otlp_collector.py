"""Minimal OpenTelemetry collector: receives spans by OTLP over HTTP and stores them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from csp_simulator.testing import serving


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[str, ...]
    """Ids of the linked traces."""
    attributes: dict[str, Any]
    failed: bool


@dataclass
class Collector:
    url: str = ""
    spans: list[Span] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)

    async def receive(self, request: Request) -> Response:
        body = await request.body()
        self.raw.append(body)
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {entry.key: _read_value(entry.value) for entry in resource_spans.resource.attributes}
            for scope in resource_spans.scope_spans:
                self.spans += [_build_span(str(resource["service.name"]), span) for span in scope.spans]
        return Response(ExportTraceServiceResponse().SerializeToString(), media_type="application/x-protobuf")

    def find_trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def find_request(self, request_id: str) -> list[Span]:
        """Return all spans of the trace of a request, or an empty list before its first span arrives."""
        roots = [
            span
            for span in self.spans
            if span.service == "gateway" and span.attributes.get("broker.request_id") == request_id
        ]
        return self.find_trace(roots[0].trace_id) if roots else []


@asynccontextmanager
async def run_collector() -> AsyncIterator[Collector]:
    collector = Collector()
    app = Starlette(routes=[Route("/v1/traces", collector.receive, methods=["POST"])])
    async with serving(app) as url:
        collector.url = url
        yield collector


def _build_span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        links=tuple(link.trace_id.hex() for link in span.links),
        attributes={entry.key: _read_value(entry.value) for entry in span.attributes},
        failed=span.status.code == 2,
    )


def _read_value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
