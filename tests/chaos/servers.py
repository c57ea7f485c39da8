"""RabbitMQ and PostgreSQL that stop, die, and run out of what they need."""

import asyncpg

from tests.chaos.faults import Act, Fault, NotReached
from tests.chaos.stack import Chaos
from tests.integration.stack import eventually

ALARM_SEC = 6.0
FULL_SEC = 6.0
FILLER = "CREATE TABLE filler AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)"
EMPTY = "DROP TABLE IF EXISTS filler"
WATERMARK = "0.4"
"""RabbitMQ's own: the share of memory above which nobody may publish."""


async def _restart_rabbitmq(chaos: Chaos) -> None:
    await chaos.rabbitmq.stop()


async def _kill_rabbitmq(chaos: Chaos) -> None:
    await chaos.rabbitmq.kill()


async def _start_rabbitmq(chaos: Chaos) -> None:
    await chaos.rabbitmq.start()


async def _stop_postgres(chaos: Chaos) -> None:
    await chaos.postgres.stop(immediately=True)


async def _kill_postgres(chaos: Chaos) -> None:
    await chaos.postgres.kill()


async def _start_postgres(chaos: Chaos) -> None:
    await chaos.postgres.start()


async def _raise_alarm(chaos: Chaos) -> None:
    await chaos.rabbitmq.run_rabbitmqctl("set_vm_memory_high_watermark", "0")


async def _end_alarm(chaos: Chaos) -> None:
    await chaos.rabbitmq.run_rabbitmqctl("set_vm_memory_high_watermark", WATERMARK)


async def _fill_disk(chaos: Chaos) -> None:
    if chaos.disk is None:
        raise NotReached("no file system can be mounted here")
    await chaos.disk.fill()
    try:
        await chaos.stack.database.execute(FILLER)
    except asyncpg.DiskFullError:
        return
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return  # it has ended in the middle of it
    raise NotReached("there was room left")


async def _empty_disk(chaos: Chaos) -> None:
    """As somebody would who finds the disk full: makes room, and starts PostgreSQL if that has given up."""
    assert chaos.disk is not None
    await chaos.disk.empty()
    if not (chaos.postgres.process and chaos.postgres.process.running):
        await chaos.postgres.start()

    async def removed() -> bool:
        try:
            await chaos.stack.database.execute(EMPTY)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False  # it recovers
        return True

    await eventually(removed)


def faults() -> list[Fault]:
    rabbitmq, postgres = frozenset({"RabbitMQ"}), frozenset({"PostgreSQL"})

    def fault(name: str, touches: frozenset[str], inject: Act, heal: Act, lasts_sec: float = 0) -> Fault:
        return Fault(kind=name, name=name, touches=touches, inject=inject, heal=heal, lasts_sec=lasts_sec)

    return [
        fault("RabbitMQ restarted", rabbitmq, _restart_rabbitmq, _start_rabbitmq),
        fault("RabbitMQ killed", rabbitmq, _kill_rabbitmq, _start_rabbitmq),
        fault("memory alarm of RabbitMQ", rabbitmq, _raise_alarm, _end_alarm, ALARM_SEC),
        fault("PostgreSQL stopped at once", postgres, _stop_postgres, _start_postgres, 1),
        fault("PostgreSQL killed", postgres, _kill_postgres, _start_postgres, 1),
        fault("disk of PostgreSQL full", postgres, _fill_disk, _empty_disk, FULL_SEC),
    ]
