"""Wiring of the allocator: command consumers and background tasks."""

from functools import partial

from starlette.applications import Starlette

from allocator.background.dead_letter_collector import DeadLetterCollector
from allocator.background.invariant_check import check_invariants
from allocator.background.node_check import check_node_periodically
from allocator.background.outbox_relay import OutboxRelay
from allocator.background.pool_history import PoolHistory
from allocator.background.pool_metrics import PoolMetrics
from allocator.background.presence import Presence
from allocator.background.stock_metrics import StockMetrics
from allocator.background.waiting_line_watch import WaitingLineWatch
from allocator.consumer import Consumer
from allocator.newest_lease import NewestLease
from allocator.routing import MAINTENANCE, STUDENTS
from allocator.settings import Settings
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.observability import health
from sandbox_broker.runtime import service, startup


def create_app(settings: Settings) -> Starlette:
    primary = Primary(settings.database_url)
    engine = connections.create_engine(primary, pool_size=1, max_overflow=2)
    publisher = Publisher(settings.amqp_url, "allocator")
    relay = OutboxRelay(primary, publisher, NewestLease(settings.amqp_url))
    collector = DeadLetterCollector(settings.amqp_url, engine)
    pool_metrics, stock_metrics = PoolMetrics(engine), StockMetrics(engine)
    pool_history = PoolHistory(engine)
    waiting_line_watch = WaitingLineWatch(publisher, engine)
    presence = Presence(settings.amqp_url, engine)
    students, maintenance = (
        Consumer(lane, settings, primary, publisher, relay) for lane in (STUDENTS, MAINTENANCE)
    )

    async def queue() -> str | None:
        return None if publisher.connected else "not connected to RabbitMQ"

    async def database() -> str | None:
        return await connections.check_connection(engine)

    async def other_broker() -> str | None:
        return None if presence.is_checked else "checking whether another broker uses the database"

    async def update_pool_metrics() -> None:
        try:
            await pool_metrics.run()
        finally:
            await engine.dispose()

    async def check_invariants_periodically() -> None:
        await service.run_periodically(
            settings.invariant_check_sec, lambda: check_invariants(primary, maintenance.epoch)
        )

    return Starlette(
        routes=health.routes({"queue": queue, "database": database, "other_broker": other_broker}),
        # Tasks stop in reverse order: each task stops before its dependencies.
        lifespan=service.lifespan(
            publisher.run,
            primary.watch,
            update_pool_metrics,
            stock_metrics.run,
            pool_history.run,
            check_invariants_periodically,
            collector.run,
            relay.run,
            waiting_line_watch.run,
            partial(check_node_periodically, publisher),
            presence.run,
            partial(run_when_checked, presence, maintenance),
            partial(run_when_checked, presence, students),
        ),
    )


async def run_when_checked(presence: Presence, consumer: Consumer) -> None:
    """Run the consumer after the check for another broker, because its first command would fence that broker."""
    await presence.wait_checked()
    await consumer.run()


def main() -> None:
    settings = startup.prepare(Settings, "allocator")
    service.run(create_app(settings), settings.allocator_port, bind_host=settings.bind_host)
