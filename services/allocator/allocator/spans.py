"""The traces of a batch.

Its commands belong to different requests, so each that is traced has a span of its own in the trace of its request,
with links to the others of the batch, and below it one for each commit that it shared with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandbox_broker.contract.codec import InvalidCommand
from sandbox_broker.contract.commands import Command
from sandbox_broker.observability import log_context, tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Spans = Mapping[int, "Span"]
"""By the id() of the command."""

MAX_LINKS = 32
_NONE: Spans = {}


@contextmanager
def of_batch(queue: str, entries: Sequence[Command | InvalidCommand]) -> Iterator[Spans]:
    """Ends when the replies are sent and the batch is acknowledged."""
    traced = [entry for entry in entries if not isinstance(entry, InvalidCommand) and entry.traceparent is not None]
    if not traced:
        yield _NONE
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
def commit(spans: Spans, commands: Sequence[Command], epoch: int) -> Iterator[None]:
    """Around the statements that commands of one kind share."""
    above = [spans[id(command)] for command in commands if id(command) in spans] if spans else []
    if not above:
        yield
        return
    began = tracing.now_ns()
    failure: str | None = None
    try:
        yield
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        for parent in above:
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
                start_ns=began,
            )
            if span is not None:
                if failure is not None:
                    tracing.failed(span, failure)
                span.end()
