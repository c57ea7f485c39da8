"""Startup of a service: settings, logs, traces, and the check of its servers."""

from typing import TypeVar

from sandbox_broker.observability import logging, tracing
from sandbox_broker.runtime import preflight
from sandbox_broker.runtime.settings import DatabaseSettings, ProcessSettings, ServiceSettings, load

S = TypeVar("S", bound=ProcessSettings)


def prepare(settings_class: type[S], service: str) -> S:
    """Return the settings after configuring logs and traces for `service`. Call once, in main.

    Exit with status 2 and one line if a setting is invalid, or RabbitMQ or the database of the service does not
    answer.
    """
    settings = load(settings_class)
    logging.configure(settings, service)
    tracing.configure(settings, service)
    if isinstance(settings, ServiceSettings):
        database_url = settings.database_url if isinstance(settings, DatabaseSettings) else None
        preflight.check(amqp_url=settings.amqp_url, database_url=database_url)
    return settings
