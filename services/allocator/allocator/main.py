"""Wiring of the allocator: the consumers of commands, the relay of events, the collector of dead letters, the
gauges of the pool, the look at its rules."""

import time

import structlog
from sqlalchemy import text
from starlette.applications import Starlette

from allocator import dead_letters, invariants, listings, metrics, store
from allocator.consumer import Consumer
from allocator.forecast import Forecast
from allocator.lanes import MAINTENANCE, STUDENTS
from allocator.outbox import Relay
from allocator.settings import Settings
from sandbox_broker.database import connections
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.observability import health, logging, tracing
from sandbox_broker.runtime import preflight, service
from sandbox_broker.runtime.settings import load

GAUGES_PERIOD_SEC = 5

log = structlog.get_logger()


def create_app(settings: Settings) -> Starlette:
    engine = connections.engine(settings.database_url, pool_size=1, max_overflow=1)
    publisher = Publisher(settings.amqp_url, "allocator")
    relay = Relay(settings.database_url, publisher)
    collector = dead_letters.Collector(settings.amqp_url, engine)
    forecast = Forecast()
    students, maintenance = (Consumer(lane, settings, publisher, relay) for lane in (STUDENTS, MAINTENANCE))

    async def queue() -> str | None:
        return None if publisher.connected else "not connected to RabbitMQ"

    async def database() -> str | None:
        return await connections.ping(engine)

    async def count_pool() -> None:
        try:
            async with engine.connect() as connection:
                rows = (await connection.execute(text(store.COUNT_BY_STATUS))).all()
                oldest_deletion_sec = await connection.scalar(text(store.OLDEST_DELETION))
                dead = await connection.scalar(text(dead_letters.COUNT))
                sync = (await connection.execute(text(listings.SYNC_STATE))).one()
                outbox_lag_sec = await connection.scalar(text(store.OUTBOX_LAG))
                leases = await connection.scalar(text(store.LEASES_EVER))
        except connections.CONNECTION_ERRORS as error:
            log.warning("pool.not_counted", error=connections.reason(error))
            return
        counts = {status: int(number) for status, number in rows}
        metrics.SYNC_HELD.set(sync.held)
        metrics.LEAKS.labels("in_csp").set(sync.leaked)
        metrics.LEAKS.labels("missing").set(sync.missing)
        metrics.OLDEST_DELETION.set(oldest_deletion_sec)
        metrics.DEAD_LETTERS.set(dead or 0)
        metrics.OUTBOX_LAG.set(outbox_lag_sec)
        exhaustion_sec = forecast.exhaustion_sec(time.monotonic(), counts.get("available", 0), leases)
        metrics.EXHAUSTION.set(exhaustion_sec)
        metrics.POOL_COUNTED.set_to_current_time()
        for status, gauge in metrics.POOL.items():
            gauge.set(counts.get(status, 0))
        metrics.POOL_TOTAL.set(sum(counts.get(status, 0) for status in metrics.STATUSES))

    async def gauges() -> None:
        try:
            await service.every(GAUGES_PERIOD_SEC, count_pool)
        finally:
            await engine.dispose()

    async def check_invariants() -> None:
        await invariants.check(settings.database_url, maintenance.epoch)

    async def look() -> None:
        await service.every(settings.invariant_check_sec, check_invariants)

    return Starlette(
        routes=health.routes({"queue": queue, "database": database}),
        lifespan=service.lifespan(
            publisher.run, gauges, look, collector.run, relay.run, maintenance.run, students.run
        ),
    )


def main() -> None:
    settings = load(Settings)
    logging.configure(settings, "allocator")
    tracing.configure(settings, "allocator")
    preflight.check(amqp_url=settings.amqp_url, database_url=settings.database_url)
    service.run(create_app(settings), settings.allocator_port, bind_host=settings.bind_host)
