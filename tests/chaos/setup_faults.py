"""Mistakes in the set-up of a broker that is at work."""

from devstack.conditions import wait_until
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_connection
from tests.chaos.faults import Fault
from tests.chaos.stack import NEWCOMER, ChaosBroker

OTHER_VHOST = "other"
NOTICED_WITHIN_SEC = 30.0
SERVED_WITHIN_SEC = 3.0


async def _start_second_broker(broker: ChaosBroker) -> None:
    """Start an allocator on another virtual host with the database of the broker. It must stop by itself."""
    await broker.rabbitmq.run_rabbitmqctl("add_vhost", OTHER_VHOST)
    await broker.rabbitmq.run_rabbitmqctl("set_permissions", "--vhost", OTHER_VHOST, "guest", ".*", ".*", ".*")
    amqp_url = ",".join(f"{url.rstrip('/')}/{OTHER_VHOST}" for url in broker.servers.amqp_url.split(","))
    async with open_connection(amqp_url) as connection, connection.channel() as channel:
        await topology.declare(channel)
    settings = {"AMQP_URL": amqp_url, "DATABASE_URL": broker.servers.database_url}
    newcomer, _ = await broker.stack.launch("allocator", name=NEWCOMER, launcher=("-m",), settings=settings)

    def has_stopped() -> bool:
        return not newcomer.running

    try:
        await wait_until(has_stopped, within_sec=NOTICED_WITHIN_SEC)
    finally:
        newcomer.kill()
        broker.stack.processes.pop(NEWCOMER)


async def _delete_second_vhost(broker: ChaosBroker) -> None:
    await broker.rabbitmq.run_rabbitmqctl("delete_vhost", OTHER_VHOST)


def list_faults() -> list[Fault]:
    return [
        Fault(
            kind="second broker on the database",
            name="second broker on the database, by another virtual host",
            affects=frozenset({"allocator", "RabbitMQ", "PostgreSQL"}),
            inject=_start_second_broker,
            heal=_delete_second_vhost,
            served_within_sec=SERVED_WITHIN_SEC,
            has_standby=True,
        )
    ]
