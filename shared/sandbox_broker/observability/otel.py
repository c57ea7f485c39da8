"""OpenTelemetry tracer for tracing.py. Imported only if a service traces, because the library takes memory."""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sandbox_broker.runtime.proxy import is_loopback

EXPORT_TIMEOUT_SEC = 5
"""Time limit, so that an unresponsive collector does not delay the stop of a service."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-01")


class Tracer:
    def __init__(self, endpoint: str, service: str) -> None:
        """`endpoint` is the base URL of the collector. OTLP paths are appended to it."""
        resource = Resource.create({"service.namespace": "sandbox-broker", "service.name": service})
        # Always on, because tracing.py has made the sampling decision.
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        session = requests.Session()
        session.trust_env = not is_loopback(urlsplit(endpoint).hostname or "")  # no proxy for this machine
        exporter = OTLPSpanExporter(
            f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_SEC, session=session
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("sandbox_broker")

    def start(
        self,
        name: str,
        kind: str,
        *,
        parent: Span | str | None,
        links: Sequence[str],
        attributes: Mapping[str, str | int | float | bool] | None,
        start_ns: int | None,
    ) -> Span | None:
        """Return None if `parent` is not a valid traceparent, because tracing must not fail the work."""
        if isinstance(parent, str):
            remote = _read(parent)
            if remote is None:
                return None
            parent = NonRecordingSpan(remote)
        return self._tracer.start_span(
            name,
            context=None if parent is None else set_span_in_context(parent),
            kind=SpanKind[kind.upper()],
            attributes=attributes,
            links=[Link(context) for context in map(_read, links) if context is not None],
            start_time=start_ns,
        )

    def mark_failed(self, span: Span, code: str) -> None:
        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR, code)

    def shutdown(self) -> None:
        """Export the remaining spans and stop."""
        self._provider.shutdown()


def _read(traceparent: str) -> SpanContext | None:
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(match[1], 16), int(match[2], 16), is_remote=True, trace_flags=flags)
