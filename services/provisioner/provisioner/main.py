"""Wiring of the provisioner."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import structlog
from starlette.applications import Starlette

from provisioner import metrics
from provisioner.access import AccessWorker
from provisioner.access_runs import AccessRuns
from provisioner.creation import LOOK_UP_TIMEOUT_SEC, Creator
from provisioner.refill import Refill
from provisioner.settings import Settings
from provisioner.syncs import SyncRequests
from sandbox_broker.contract import topology
from sandbox_broker.csp.circuit_breaker import CircuitBreaker, CspCircuit
from sandbox_broker.csp.client import CspClient
from sandbox_broker.messaging import ticks
from sandbox_broker.messaging.connection import run_with_reconnect
from sandbox_broker.messaging.event_wakeups import wake_on_events
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.observability import health
from sandbox_broker.runtime import service, startup
from sandbox_broker.runtime.access_keys import parse_access_keys

log = structlog.get_logger()

REQUEST_TIMEOUT_SEC = 10.0
"""Longest wait for a reply of the allocator."""


def create_app(settings: Settings) -> Starlette:
    url = settings.amqp_url
    publisher = Publisher(url, "provisioner")
    rpc_client = RpcClient(url, "provisioner", publisher, exchange=topology.COMMANDS_FROM_PROVISIONER)
    allocator = MaintenanceClient(rpc_client, REQUEST_TIMEOUT_SEC)
    token = settings.csp_api_token.get_secret_value()
    csp = CspClient(settings.csp_base_url, token, timeout_sec=settings.create_timeout_sec)
    look_up = CspClient(settings.csp_base_url, token, timeout_sec=LOOK_UP_TIMEOUT_SEC)
    circuit = CspCircuit(settings.circuit_breaker_threshold, settings.circuit_breaker_timeout_sec)
    creator = Creator(settings, csp, look_up, allocator, circuit)
    syncs = SyncRequests(publisher, settings.create_sync_sec)
    refill = Refill(settings, allocator, creator, circuit, syncs)
    metrics.CIRCUIT.set_function(lambda: circuit.state)

    worker, runs = _build_access(settings, allocator)

    def wake() -> None:
        refill.wake()
        if runs is not None:
            runs.wake()

    async def handle_tick() -> None:
        wake()

    async def queue() -> str | None:
        return None if rpc_client.connected else "not connected to RabbitMQ"

    tasks = service.lifespan(
        publisher.run,
        rpc_client.run,
        refill.run,
        *([] if runs is None else [runs.run]),
        partial(
            run_with_reconnect,
            url,
            "provisioner-events",
            partial(wake_on_events, topology.PROVISIONER_EVENTS, wake),
        ),
        partial(ticks.consume_ticks, url, topology.STOCK_TICKS, settings.stock_interval_sec, handle_tick),
        partial(ticks.publish_ticks, publisher, topology.STOCK_TICKS, settings.stock_interval_sec),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with csp, look_up, AsyncExitStack() as stack:
            if worker is None:
                log.info("access.disabled", action="Set CSP_LOGIN_EMAIL to create logins inside sandboxes.")
            else:
                stack.push_async_callback(worker.aclose)
            await stack.enter_async_context(tasks(app))
            yield

    return Starlette(
        routes=health.routes({"queue": queue}),
        lifespan=lifespan,
    )


def _build_access(
    settings: Settings, allocator: MaintenanceClient
) -> tuple[AccessWorker, AccessRuns] | tuple[None, None]:
    """Return the parts for logins inside sandboxes, (None, None) without an administrator account."""
    keys = parse_access_keys(settings.access_keys)
    if keys is None or not settings.has_access:
        return None, None
    circuit = CircuitBreaker(settings.circuit_breaker_threshold, settings.circuit_breaker_timeout_sec)
    worker = AccessWorker(settings, keys, circuit)
    metrics.SIGN_IN_REFUSED.set_function(lambda: worker.is_sign_in_refused)
    metrics.ACCESS_CIRCUIT.set_function(lambda: circuit.state(time.monotonic()))
    return worker, AccessRuns(settings, allocator, worker, circuit)


def main() -> None:
    settings = startup.prepare(Settings, "provisioner")
    service.run(create_app(settings), settings.provisioner_port, bind_host=settings.bind_host)
