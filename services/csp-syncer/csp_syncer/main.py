"""Wiring of the csp-syncer: ticks and commands start syncs."""

from functools import partial

from sandbox_broker import health, logging, preflight, service, ticks, topology
from sandbox_broker.bus import Publisher, Requester, keep_connected
from sandbox_broker.csp import CspClient
from sandbox_broker.settings import load
from starlette.applications import Starlette

from csp_syncer.handlers import Syncer
from csp_syncer.schedule import Schedule
from csp_syncer.settings import Settings


def create_app(settings: Settings) -> Starlette:
    publisher = Publisher(settings.amqp_url, "csp-syncer")
    requester = Requester(settings.amqp_url, "csp-syncer", publisher)
    csp = CspClient(settings.csp_base_url, settings.csp_api_token.get_secret_value())
    schedule = Schedule(publisher, Syncer(settings, csp, requester))

    async def queue() -> str | None:
        return None if requester.connected else "not connected to RabbitMQ"

    return Starlette(
        routes=health.routes({"queue": queue}),
        lifespan=service.lifespan(
            publisher.run,
            requester.run,
            partial(keep_connected, settings.amqp_url, "csp-syncer-commands", schedule.commands),
            partial(ticks.consume, settings.amqp_url, topology.SYNC_TICKS, schedule.tick),
            partial(ticks.publish, publisher, topology.SYNC_TICKS, settings.sync_interval_sec),
        ),
    )


def main() -> None:
    settings = load(Settings)
    logging.configure(settings, "csp-syncer")
    preflight.check(amqp_url=settings.amqp_url)
    service.run(create_app(settings), settings.csp_syncer_port)
