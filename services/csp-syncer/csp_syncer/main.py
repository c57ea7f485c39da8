"""Wiring of the csp-syncer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette

from csp_syncer.purge import purge
from csp_syncer.settings import Settings
from csp_syncer.syncer import LISTING_TIMEOUT_SEC, Syncer
from csp_syncer.triggers import CommandConsumer, send_sync_command
from sandbox_broker.contract import topology
from sandbox_broker.csp.client import CspClient
from sandbox_broker.messaging import ticks
from sandbox_broker.messaging.connection import run_with_reconnect
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.observability import health
from sandbox_broker.runtime import service, startup

PURGE_INTERVAL_SEC = 3600.0
REQUEST_TIMEOUT_SEC = 30.0
"""Longest wait for a reply of the allocator, unless a request names another one."""


def create_app(settings: Settings) -> Starlette:
    url = settings.amqp_url
    publisher = Publisher(url, "csp-syncer")
    rpc_client = RpcClient(url, "csp-syncer", publisher, exchange=topology.COMMANDS_FROM_SYNCER)
    allocator = MaintenanceClient(rpc_client, REQUEST_TIMEOUT_SEC)
    csp = CspClient(
        settings.csp_base_url, settings.csp_api_token.get_secret_value(), timeout_sec=LISTING_TIMEOUT_SEC
    )
    syncer = Syncer(settings, csp, allocator)
    commands = CommandConsumer(publisher, syncer)

    async def queue() -> str | None:
        return None if rpc_client.connected else "not connected to RabbitMQ"

    tasks = service.lifespan(
        publisher.run,
        rpc_client.run,
        partial(run_with_reconnect, url, "csp-syncer-commands", commands.consume),
        partial(
            ticks.consume_ticks,
            url,
            topology.SYNC_TICKS,
            settings.sync_interval_sec,
            partial(send_sync_command, publisher),
        ),
        partial(ticks.publish_ticks, publisher, topology.SYNC_TICKS, settings.sync_interval_sec),
        partial(
            ticks.consume_ticks, url, topology.PURGE_TICKS, PURGE_INTERVAL_SEC, partial(purge, settings, allocator)
        ),
        partial(ticks.publish_ticks, publisher, topology.PURGE_TICKS, PURGE_INTERVAL_SEC),
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
    settings = startup.prepare(Settings, "csp-syncer")
    service.run(create_app(settings), settings.csp_syncer_port, bind_host=settings.bind_host)
