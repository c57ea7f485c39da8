"""Tracing spans of a batch.

The commands of a batch belong to different traces. Each traced command has a span in the trace of its request, with
links to the other commands, and a child span for each shared commit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandbox_broker.contract.codec import InvalidCommand
from sandbox_broker.contract.commands import Command
from sandbox_broker.observability import log_context, tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

BatchSpans = Mapping[int, "Span"]
"""Span by the id() of its command."""

MAX_LINKS = 32
_NO_SPANS: BatchSpans = {}


@contextmanager
def batch_spans(queue: str, entries: Sequence[Command | InvalidCommand]) -> Iterator[BatchSpans]:
    """Open a span per traced command; end the spans on exit, after replies and acknowledgement."""
    traced = [entry for entry in entries if not isinstance(entry, InvalidCommand) and entry.traceparent is not None]
    if not traced:
        yield _NO_SPANS
        return
    spans: dict[int, Span] = {}
    for command in traced:
        others = [other.traceparent for other in traced if other is not command and other.traceparent]
        span = tracing.start(
            f"process {command.type}",
            "consumer",
            parent=command.traceparent,
            links=others[:MAX_LINKS],
            attributes={
                "messaging.system": "rabbitmq",
                "messaging.operation.type": "process",
                "messaging.destination.name": queue,
                "messaging.batch.message_count": len(entries),
                "broker.batch_id": str(log_context.ids().get("batch_id", "")),
                "broker.request_id": command.request_id or "",
            },
        )
        if span is not None:
            spans[id(command)] = span
    try:
        yield spans
    finally:
        for span in spans.values():
            span.end()


@contextmanager
def commit_spans(spans: BatchSpans, commands: Sequence[Command], epoch: int) -> Iterator[None]:
    """Record a commit span for each traced command around the statements of all commands of one type."""
    parents = [spans[id(command)] for command in commands if id(command) in spans] if spans else []
    if not parents:
        yield
        return
    started_ns = tracing.now_ns()
    failure: str | None = None
    try:
        yield
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        for parent in parents:
            span = tracing.start(
                f"commit {commands[0].type}",
                "client",
                parent=parent,
                attributes={
                    "db.system.name": "postgresql",
                    "db.operation.name": commands[0].type,
                    "db.operation.batch.size": len(commands),
                    "broker.epoch": epoch,
                },
                start_ns=started_ns,
            )
            if span is not None:
                if failure is not None:
                    tracing.mark_failed(span, failure)
                span.end()
