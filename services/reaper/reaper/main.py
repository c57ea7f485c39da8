"""Wiring of the reaper."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from starlette.applications import Starlette

from reaper import metrics, niosxaas_cleanup
from reaper.admin_jobs import AdminJobs
from reaper.cleanup import CleanUp
from reaper.deletion import CSP_TIMEOUT_SEC, Deleter
from reaper.expiry import expire_overdue
from reaper.settings import Settings
from reaper.triggers import Triggers
from sandbox_broker.contract import topology
from sandbox_broker.csp.client import CspClient
from sandbox_broker.messaging import ticks
from sandbox_broker.messaging.connection import run_with_reconnect
from sandbox_broker.messaging.event_wakeups import wake_on_events
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.observability import health
from sandbox_broker.runtime import service, startup

REQUEST_TIMEOUT_SEC = 10.0
"""Longest wait for a reply of the allocator."""


def create_app(settings: Settings) -> Starlette:
    url = settings.amqp_url
    publisher = Publisher(url, "reaper")
    rpc_client = RpcClient(url, "reaper", publisher, exchange=topology.COMMANDS_FROM_REAPER)
    allocator = MaintenanceClient(rpc_client, REQUEST_TIMEOUT_SEC)
    csp = CspClient(settings.csp_base_url, settings.csp_api_token.get_secret_value(), timeout_sec=CSP_TIMEOUT_SEC)
    niosxaas = niosxaas_cleanup.build_client(settings)
    deleter = Deleter(settings, csp, niosxaas, allocator)
    jobs = AdminJobs(allocator)
    cleanup = CleanUp(settings, allocator, deleter, jobs)
    triggers = Triggers(cleanup, jobs, publisher)
    expire = partial(expire_overdue, settings, allocator)
    metrics.CIRCUIT.set_function(lambda: deleter.state)

    async def queue() -> str | None:
        return None if rpc_client.connected else "not connected to RabbitMQ"

    tasks = service.lifespan(
        publisher.run,
        rpc_client.run,
        cleanup.run,
        jobs.report,
        partial(
            run_with_reconnect,
            url,
            "reaper-events",
            partial(wake_on_events, topology.REAPER_EVENTS, cleanup.wake),
        ),
        partial(run_with_reconnect, url, "reaper-commands", triggers.consume_commands),
        partial(
            ticks.consume_ticks,
            url,
            topology.CLEANUP_TICKS,
            settings.cleanup_interval_sec,
            triggers.handle_tick,
        ),
        partial(ticks.consume_ticks, url, topology.EXPIRY_TICKS, settings.auto_expiry_interval_sec, expire),
        partial(ticks.publish_ticks, publisher, topology.CLEANUP_TICKS, settings.cleanup_interval_sec),
        partial(ticks.publish_ticks, publisher, topology.EXPIRY_TICKS, settings.auto_expiry_interval_sec),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(csp)
            if niosxaas is not None:
                await stack.enter_async_context(niosxaas)
            await stack.enter_async_context(tasks(app))
            yield

    return Starlette(
        routes=health.routes({"queue": queue}),
        lifespan=lifespan,
    )


def main() -> None:
    settings = startup.prepare(Settings, "reaper")
    service.run(create_app(settings), settings.reaper_port, bind_host=settings.bind_host)
