"""Log configuration: one line per event, with a dotted event name and ids, as JSON or console text.

Each line carries the log context (log_context.py) and no secret (redaction.py). Repeated warnings and errors are
counted, not written (log_rate_limit.py). Lines are written in blocks (log_blocks.py). The lines of each request
take a shorter way (frequent_log.py).
"""

import atexit
import logging
import sys
from typing import Any

import orjson
import structlog

from sandbox_broker.observability import frequent_log, log_context, metrics
from sandbox_broker.observability.log_blocks import LogBlocks
from sandbox_broker.observability.log_rate_limit import LogRateLimit
from sandbox_broker.observability.redaction import Redaction, secrets_of
from sandbox_broker.runtime.settings import ProcessSettings

log = structlog.get_logger()

_blocks = LogBlocks()


def configure(settings: ProcessSettings, service: str) -> None:
    """Configure structlog and the loggers of libraries to write to standard output in one format. Call once, in
    main."""
    shared: list[structlog.typing.Processor] = [
        _add_ids,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    redaction = Redaction(secrets_of(settings))

    def redact(_: object, __: str, line: Any) -> Any:
        return redaction.of_bytes(line) if isinstance(line, bytes) else redaction.of_text(line)

    renderer: structlog.typing.Processor
    foreign_renderer: structlog.typing.Processor
    if settings.log_format == "json":
        # Without local variables, because they hold tokens and URLs with passwords.
        without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared.append(structlog.processors.ExceptionRenderer(without_locals))
        # orjson and bytes, because they take a third of the time and every request logs a line or two.
        renderer = structlog.processors.JSONRenderer(serializer=orjson.dumps)
        foreign_renderer = structlog.processors.JSONRenderer()
    else:
        renderer = foreign_renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    level = logging.getLevelNamesMapping()[settings.log_level]
    log_limit = LogRateLimit(_report_suppressed)
    atexit.register(_blocks.flush)
    atexit.register(log_limit.flush)  # runs first, because the last registered function does

    def limit_rate(_: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if method not in ("info", "debug") and not log_limit.allow(event["event"]):
            raise structlog.DropEvent
        return event

    def add_service(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    structlog.configure(
        processors=[limit_rate, *shared, add_service, renderer, redact],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _blocks,
        cache_logger_on_first_use=True,
    )
    if settings.log_format == "json" and level <= logging.INFO:
        frequent_log.configure(service, lambda line: _blocks.info(redaction.of_bytes(line)))
    handler = _BlockHandler()
    handler.addFilter(lambda record: record.levelno < logging.WARNING or log_limit.allow(record.name))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, add_service],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                foreign_renderer,
                redact,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    # These libraries log a traceback for every lost connection. messaging/connection.py logs it in one line.
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def flush() -> None:
    """Write all lines that still wait for the end of their block."""
    _blocks.flush()


class _BlockHandler(logging.Handler):
    """Handler for the loggers of libraries, which write warnings and errors only."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _blocks.warning(self.format(record))
        except Exception:  # noqa: BLE001 (the rule of logging: a line that cannot be written never fails its caller)
            self.handleError(record)


def _add_ids(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    ids = log_context.ids()
    return {**ids, **event} if ids else event


def _report_suppressed(event: str, lines: int) -> None:
    metrics.SUPPRESSED.labels(event).inc(lines)
    log.warning("log.suppressed", suppressed_event=event, lines=lines)
