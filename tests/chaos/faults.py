"""Faults as data: what each does to the broker, what ends it, and how soon students must be served again."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from tests.chaos.crash_points import POINTS
from tests.chaos.proxy import Proxy
from tests.chaos.stack import SERVICES, Chaos

Act = Callable[[Chaos], Awaitable[None]]
FREEZE_SEC = 40.0
"""Longer than RabbitMQ and PostgreSQL keep an allocator that does not answer."""
SLOW_SEC = 0.3
CRASH_PATIENCE_SEC = 10.0


class NotReached(Exception):
    """Nobody has come to the point at which it was to die: nothing has happened."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    """What the table at the end counts it as."""
    name: str
    inject: Act
    heal: Act
    lasts_sec: float = 0.0
    served_within_sec: float = 10.0
    """A new student, from the fault's end; from its beginning where a standby takes over."""
    standby: bool = False


def kill(name: str) -> Fault:
    async def inject(chaos: Chaos) -> None:
        chaos.process(name).kill()

    return Fault(f"kill -9 of {_a(SERVICES[name])}", f"kill -9 of the {name}", inject, _nothing, standby=True)


def crash(point: str) -> Fault:
    """The next service that comes to the point dies there."""
    module = point.partition(":")[0]

    async def inject(chaos: Chaos) -> None:
        chaos.crash_at.write_text(point)
        try:
            async with asyncio.timeout(CRASH_PATIENCE_SEC):
                while chaos.crash_at.exists():  # noqa: ASYNC110 (nothing tells us)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            chaos.crash_at.unlink(missing_ok=True)
            raise NotReached from None

    return Fault(f"kill -9 of {_a(module)} at a point", f"kill -9 of the {point}", inject, _nothing, standby=True)


def freeze_active_allocator(lasts_sec: float = FREEZE_SEC) -> Fault:
    """A zombie: the standby takes over, then the frozen one goes on where it was."""
    frozen: list[str] = []

    async def inject(chaos: Chaos) -> None:
        frozen.append(await chaos.active_allocator())
        chaos.process(frozen[-1]).send(signal.SIGSTOP)

    async def heal(chaos: Chaos) -> None:
        for name in frozen:
            chaos.process(name).send(signal.SIGCONT)
        frozen.clear()

    name = f"the active allocator frozen for {lasts_sec:g} s"
    return Fault("active allocator frozen", name, inject, heal, lasts_sec, served_within_sec=20, standby=True)


def link(name: str, how: str, act: Callable[[Proxy], None], lasts_sec: float) -> Fault:
    async def inject(chaos: Chaos) -> None:
        act(chaos.links[name])

    async def heal(chaos: Chaos) -> None:
        chaos.links[name].heal()

    process, _, server = name.partition(" to ")
    return Fault(f"{SERVICES[process]} to {server} {how}", f"{name} {how}", inject, heal, lasts_sec)


async def _nothing(_: Chaos) -> None:
    pass


async def _stop_rabbitmq(chaos: Chaos) -> None:
    await chaos.rabbitmq.stop()


async def _kill_rabbitmq(chaos: Chaos) -> None:
    await chaos.rabbitmq.kill()


async def _start_rabbitmq(chaos: Chaos) -> None:
    await chaos.rabbitmq.start()


async def _stop_postgres(chaos: Chaos) -> None:
    await chaos.postgres.stop()


async def _kill_postgres(chaos: Chaos) -> None:
    await chaos.postgres.kill()


async def _start_postgres(chaos: Chaos) -> None:
    await chaos.postgres.start()


def servers() -> list[Fault]:
    return [
        Fault("RabbitMQ restarted", "RabbitMQ restarted", _stop_rabbitmq, _start_rabbitmq),
        Fault("RabbitMQ killed", "RabbitMQ killed", _kill_rabbitmq, _start_rabbitmq),
        Fault("PostgreSQL stopped", "PostgreSQL stopped at once", _stop_postgres, _start_postgres, 1),
        Fault("PostgreSQL killed", "PostgreSQL killed", _kill_postgres, _start_postgres, 1),
    ]


def links() -> list[Fault]:
    disturbances: list[tuple[str, Callable[[Proxy], None], float]] = [
        ("black-holed", Proxy.swallow, 12.0),
        ("reset", Proxy.reset, 2.0),
        ("slowed down", partial(Proxy.slow_down, delay_sec=SLOW_SEC), 8.0),
    ]
    names = (
        "gateway to RabbitMQ",
        "allocator to RabbitMQ",
        "second allocator to RabbitMQ",
        "allocator to PostgreSQL",
        "second allocator to PostgreSQL",
        "reaper to CSP",
        "second reaper to CSP",
    )
    return [link(name, how, act, lasts_sec) for name in names for how, act, lasts_sec in disturbances]


def kills() -> list[Fault]:
    return [
        *(kill(name) for name in SERVICES),
        *(crash(f"{module}: {point}") for module, points in POINTS.items() for point in points),
    ]


def schedule(chance: random.Random) -> list[Fault]:
    """Every fault once, in an order of the seed."""
    faults = [*kills(), *servers(), *links(), freeze_active_allocator()]
    chance.shuffle(faults)
    return faults


def _a(module: str) -> str:
    return f"an {module}" if module == "allocator" else f"a {module}"
