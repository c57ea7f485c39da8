"""RabbitMQ and PostgreSQL that are stopped, killed, or run out of memory or disk space."""

import asyncpg

from devstack.conditions import wait_until
from tests.chaos.faults import Fault, FaultAction, FaultNotReached
from tests.chaos.stack import ChaosBroker

ALARM_SEC = 6.0
DISK_FULL_SEC = 6.0
CREATE_FILLER = "CREATE TABLE filler AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)"
DROP_FILLER = "DROP TABLE IF EXISTS filler"
WATERMARK = "0.4"
"""RabbitMQ's default: the share of memory above which it blocks publishers."""


async def _restart_rabbitmq(broker: ChaosBroker) -> None:
    await broker.rabbitmq.stop()


async def _kill_rabbitmq(broker: ChaosBroker) -> None:
    await broker.rabbitmq.kill()


async def _start_rabbitmq(broker: ChaosBroker) -> None:
    await broker.rabbitmq.start()


async def _stop_postgres(broker: ChaosBroker) -> None:
    await broker.postgres.stop(immediately=True)


async def _kill_postgres(broker: ChaosBroker) -> None:
    await broker.postgres.kill()


async def _start_postgres(broker: ChaosBroker) -> None:
    await broker.postgres.start()


async def _raise_alarm(broker: ChaosBroker) -> None:
    await broker.rabbitmq.run_rabbitmqctl("set_vm_memory_high_watermark", "0")


async def _end_alarm(broker: ChaosBroker) -> None:
    await broker.rabbitmq.run_rabbitmqctl("set_vm_memory_high_watermark", WATERMARK)


async def _fill_disk(broker: ChaosBroker) -> None:
    if broker.servers.disk is None:
        raise FaultNotReached("no file system can be mounted here")
    await broker.servers.disk.fill()
    try:
        await broker.stack.database.execute(CREATE_FILLER)
    except asyncpg.DiskFullError:
        return
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return  # PostgreSQL has stopped during the statement
    raise FaultNotReached("the disk did not fill up")


async def _empty_disk(broker: ChaosBroker) -> None:
    """Free space, and start PostgreSQL if it has stopped, as an operator would."""
    assert broker.servers.disk is not None
    await broker.servers.disk.empty()
    if not (broker.postgres.process and broker.postgres.process.running):
        await broker.postgres.start()

    async def is_filler_dropped() -> bool:
        try:
            await broker.stack.database.execute(DROP_FILLER)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False  # PostgreSQL is recovering
        return True

    await wait_until(is_filler_dropped)


def list_faults() -> list[Fault]:
    rabbitmq, postgres = frozenset({"RabbitMQ"}), frozenset({"PostgreSQL"})

    def build_fault(
        name: str, affects: frozenset[str], inject: FaultAction, heal: FaultAction, duration_sec: float = 0
    ) -> Fault:
        return Fault(kind=name, name=name, affects=affects, inject=inject, heal=heal, duration_sec=duration_sec)

    return [
        build_fault("RabbitMQ restarted", rabbitmq, _restart_rabbitmq, _start_rabbitmq),
        build_fault("RabbitMQ killed", rabbitmq, _kill_rabbitmq, _start_rabbitmq),
        build_fault("memory alarm of RabbitMQ", rabbitmq, _raise_alarm, _end_alarm, ALARM_SEC),
        build_fault("PostgreSQL stopped at once", postgres, _stop_postgres, _start_postgres, 1),
        build_fault("PostgreSQL killed", postgres, _kill_postgres, _start_postgres, 1),
        build_fault("disk of PostgreSQL full", postgres, _fill_disk, _empty_disk, DISK_FULL_SEC),
    ]
