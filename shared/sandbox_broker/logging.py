"""One line per thing that happened: a dotted event name and ids; JSON, or for the eye in a terminal."""

import logging
import sys
from collections.abc import Callable

import orjson
import structlog

from sandbox_broker.settings import ServiceSettings


def configure(settings: ServiceSettings, service: str) -> None:
    """Sends structlog and the libraries' own loggers to standard output in one form. Call once, in main."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor
    foreign_renderer: structlog.typing.Processor
    factory: Callable[..., structlog.typing.WrappedLogger]
    if settings.log_format == "json":
        # Without the local variables, which hold tokens and addresses with passwords.
        without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared.append(structlog.processors.ExceptionRenderer(without_locals))
        # A line or two for each request: orjson and bytes take a third of the time.
        renderer = structlog.processors.JSONRenderer(serializer=orjson.dumps)
        factory = structlog.BytesLoggerFactory(sys.stdout.buffer)
        foreign_renderer = structlog.processors.JSONRenderer()
    else:
        renderer = foreign_renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        factory = structlog.WriteLoggerFactory(sys.stdout)
    level = logging.getLevelNamesMapping()[settings.log_level]

    def add_service(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    structlog.configure(
        processors=[*shared, add_service, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, add_service],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, foreign_renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    # They tell of every lost connection with a traceback; the bus says it in one line.
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
