"""OpenTelemetry traces. Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set.

A trace starts with an HTTP request or a tick. The sampling decision is made there, once. Work that is not sampled
has no span and carries no context. A sampled trace travels as a W3C traceparent in commands, and in the database
with a deletion that waits for its turn. A receiver of a traceparent continues that trace. The gateway ignores a
traceparent from a client, because the client would decide how much is traced.

Spans describe the work and its outcome by codes and ids. Error texts stay in the log, which hides secrets.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from sandbox_broker.runtime.settings import ServiceSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from sandbox_broker.observability.otel import Tracer

Kind = Literal["internal", "server", "client", "consumer"]
Attributes = Mapping[str, str | int | float | bool]

_tracer: "Tracer | None" = None
_ratio = 0.0
_current: ContextVar["Span | None"] = ContextVar("span", default=None)


def configure(settings: ServiceSettings, service: str) -> None:
    """Begins to trace, if the settings say so. Call once, in main."""
    global _tracer, _ratio  # noqa: PLW0603 (one for the process, as the loggers are)
    if settings.otel_exporter_otlp_endpoint is not None:
        from sandbox_broker.observability.otel import Tracer  # noqa: PLC0415 (see there)

        _tracer = Tracer(settings.otel_exporter_otlp_endpoint, service)
        _ratio = settings.otel_traces_sampler_arg


def shutdown() -> None:
    """Sends what has not been sent yet, and ends."""
    global _tracer, _ratio
    tracer, _tracer, _ratio = _tracer, None, 0.0
    if tracer is not None:
        tracer.shutdown()


def begin() -> bool:
    """Whether a trace is to begin here: all that work without a trace is asked."""
    return random.random() < _ratio  # noqa: S311 (chance, no secret)


def traceparent() -> str | None:
    """What commands for the work at hand carry; None where it is not traced."""
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
    """A span for the caller to end; None where this service does not trace. `parent` is a span or a traceparent,
    and without one a trace begins; `links` are traceparents."""
    if _tracer is None:
        return None
    return _tracer.start(name, kind, parent=parent, links=links, attributes=attributes, start_ns=start_ns)


def failed(span: "Span", code: str) -> None:
    if _tracer is not None:
        _tracer.failed(span, code)


@contextmanager
def using(span: "Span | None") -> Iterator[None]:
    """Within the block, and in tasks begun there, the work at hand is this span's."""
    if span is None:
        yield
        return
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def within(
    name: str, kind: Kind = "internal", *, parent: str | None = None, attributes: Attributes | None = None
) -> Iterator["Span | None"]:
    """A span around the block, below the traceparent `parent` or else the span of the work at hand. None where
    neither is."""
    above = parent or _current.get()
    span = None if above is None else start(name, kind, parent=above, attributes=attributes)
    with _around(span):
        yield span


@contextmanager
def beginning(name: str) -> Iterator["Span | None"]:
    """A trace around the block, if one is to begin here."""
    span = start(name, "internal") if begin() else None
    with _around(span):
        yield span


@contextmanager
def _around(span: "Span | None") -> Iterator[None]:
    if span is None:
        yield
        return
    with using(span):
        try:
            yield
        except BaseException as error:
            failed(span, type(error).__name__)
            raise
        finally:
            span.end()


def now_ns() -> int:
    return time.time_ns()
