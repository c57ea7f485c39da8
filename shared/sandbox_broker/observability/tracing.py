"""OpenTelemetry traces. Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set.

A trace starts with an HTTP request or a tick. The sampling decision is made there, once. Work that is not sampled
has no span and carries no context. A sampled trace is passed on as a W3C traceparent in commands, and in the
database for a pending deletion. A receiver of a traceparent continues the trace. The gateway ignores a traceparent
from a client, because the client would decide how much is traced.

Spans describe the work and its outcome by codes and ids. Error texts stay in the log, because it is redacted.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from sandbox_broker.runtime.settings import ProcessSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from sandbox_broker.observability.otel import Tracer

Kind = Literal["internal", "server", "client", "consumer"]
Attributes = Mapping[str, str | int | float | bool]

_tracer: "Tracer | None" = None
_ratio = 0.0
_current: ContextVar["Span | None"] = ContextVar("span", default=None)


def configure(settings: ProcessSettings, service: str) -> None:
    """Enable tracing if an OTLP endpoint is set. Call once, in main."""
    global _tracer, _ratio  # noqa: PLW0603 (one per process, like the loggers)
    if settings.otel_exporter_otlp_endpoint is not None:
        from sandbox_broker.observability.otel import Tracer  # noqa: PLC0415 (see its docstring)

        _tracer = Tracer(settings.otel_exporter_otlp_endpoint, service)
        _ratio = settings.otel_traces_sampler_arg


def shutdown() -> None:
    """Export the remaining spans and disable tracing."""
    global _tracer, _ratio
    tracer, _tracer, _ratio = _tracer, None, 0.0
    if tracer is not None:
        tracer.shutdown()


def should_sample() -> bool:
    """Return whether to start a trace here, by chance. Call it for work without a trace."""
    return random.random() < _ratio  # noqa: S311 (sampling, not a secret)


def traceparent() -> str | None:
    """Return the traceparent of the current span for commands. None without a span."""
    span = _current.get()
    if span is None:
        return None
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def start(
    name: str,
    kind: Kind,
    *,
    parent: "Span | str | None" = None,
    links: Sequence[str] = (),
    attributes: Attributes | None = None,
    start_ns: int | None = None,
) -> "Span | None":
    """Start a span. The caller ends it. Return None if tracing is off. `parent` is a span or a traceparent;
    without one, a new trace starts. `links` are traceparents."""
    if _tracer is None:
        return None
    return _tracer.start(name, kind, parent=parent, links=links, attributes=attributes, start_ns=start_ns)


def mark_failed(span: "Span", code: str) -> None:
    if _tracer is not None:
        _tracer.mark_failed(span, code)


@contextmanager
def use_span(span: "Span | None") -> Iterator[None]:
    """Make `span` the current span of the block and of tasks started in it."""
    if span is None:
        yield
        return
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def child_span(
    name: str, kind: Kind = "internal", *, parent: str | None = None, attributes: Attributes | None = None
) -> Iterator["Span | None"]:
    """Run the block in a child span of the traceparent `parent`, or of the current span. Yield None without a
    parent."""
    parent_span = parent or _current.get()
    span = None if parent_span is None else start(name, kind, parent=parent_span, attributes=attributes)
    with _ended_span(span):
        yield span


@contextmanager
def root_span(name: str) -> Iterator["Span | None"]:
    """Run the block in the root span of a new trace, if it is sampled. Otherwise yield None."""
    span = start(name, "internal") if should_sample() else None
    with _ended_span(span):
        yield span


@contextmanager
def _ended_span(span: "Span | None") -> Iterator[None]:
    if span is None:
        yield
        return
    with use_span(span):
        try:
            yield
        except BaseException as error:
            mark_failed(span, type(error).__name__)
            raise
        finally:
            span.end()


def now_ns() -> int:
    return time.time_ns()
