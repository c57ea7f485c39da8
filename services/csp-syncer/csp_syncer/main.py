"""Wiring of the csp-syncer: ticks and commands start syncs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette

from csp_syncer.handlers import Syncer
from csp_syncer.schedule import Schedule
from csp_syncer.settings import Settings
from sandbox_broker import health, logging, preflight, service, ticks, topology
from sandbox_broker.bus import Publisher, Requester, keep_connected
from sandbox_broker.csp import CspClient
from sandbox_broker.settings import load


def create_app(settings: Settings) -> Starlette:
    publisher = Publisher(settings.amqp_url, "csp-syncer")
    requester = Requester(settings.amqp_url, "csp-syncer", publisher)
    csp = CspClient(settings.csp_base_url, settings.csp_api_token.get_secret_value())
    syncer = Syncer(settings, csp, requester)
    schedule = Schedule(publisher, syncer)

    async def queue() -> str | None:
        return None if requester.connected else "not connected to RabbitMQ"

    tasks = service.lifespan(
        publisher.run,
        requester.run,
        partial(keep_connected, settings.amqp_url, "csp-syncer-commands", schedule.commands),
        partial(ticks.consume, settings.amqp_url, topology.SYNC_TICKS, settings.sync_interval_sec, schedule.tick),
        partial(ticks.publish, publisher, topology.SYNC_TICKS, settings.sync_interval_sec),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with csp:
            async with tasks(app):
                yield
            await syncer.stop()

    return Starlette(
        routes=health.routes({"queue": queue}),
        lifespan=lifespan,
    )


def main() -> None:
    settings = load(Settings)
    logging.configure(settings, "csp-syncer")
    preflight.check(amqp_url=settings.amqp_url)
    service.run(create_app(settings), settings.csp_syncer_port)
