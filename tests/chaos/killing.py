"""Services that die or freeze, at any moment or at the points of crash_points.py."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import asyncpg

from tests.chaos.crash_points import POINTS
from tests.chaos.faults import Fault, NotReached
from tests.chaos.stack import SERVICES, Chaos

KILLED_WITHIN_SEC = 3.0
FROZEN_WITHIN_SEC = 20.0
FREEZE_SEC = 40.0
"""Longer than RabbitMQ and PostgreSQL keep an allocator that does not answer."""
FREEZE_AT_SEC = 20.0
"""RabbitMQ gives up what does not answer within 15."""
CRASH_PATIENCE_SEC = 35.0
"""A csp_syncer waits for half a minute for an answer that an allocator before has lost."""
FREEZES_AT = ("before a student's commit", "after a student's commit", "before a student's ack")


def kill(name: str) -> Fault:
    async def inject(chaos: Chaos) -> None:
        chaos.process(name).kill()

    module = SERVICES[name]
    return _death(module, inject, kind=f"kill -9 of {_a(module)}", name=f"kill -9 of the {name}")


def kill_active_allocator() -> Fault:
    async def inject(chaos: Chaos) -> None:
        chaos.process(await active_allocator(chaos)).kill()

    name = "kill -9 of the active allocator"
    return _death("allocator", inject, kind=name, name=name)


def crash(module: str, point: str) -> Fault:
    """The next service that comes to the point dies there."""

    async def inject(chaos: Chaos) -> None:
        await _reach(chaos, module, point)

    name = f"kill -9 of {_a(module)}"
    return _death(module, inject, kind=f"{name} at a point", name=f"{name} {point}")


def _death(module: str, inject: Callable[[Chaos], Awaitable[None]], *, kind: str, name: str) -> Fault:
    return Fault(
        kind=kind,
        name=name,
        touches=frozenset({module}),
        inject=inject,
        served_within_sec=KILLED_WITHIN_SEC,
        standby=True,
        covered=module == "allocator",
    )


def freeze_active_allocator() -> Fault:
    """A zombie: the standby takes over, then the frozen one goes on where it was."""

    async def inject(chaos: Chaos) -> None:
        chaos.process(await active_allocator(chaos)).send(signal.SIGSTOP)

    return Fault(
        kind="active allocator frozen",
        name=f"active allocator frozen for {FREEZE_SEC:g} s",
        touches=frozenset({"allocator"}),
        inject=inject,
        heal=_thaw_allocators,
        lasts_sec=FREEZE_SEC,
        served_within_sec=FROZEN_WITHIN_SEC,
        standby=True,
    )


def freeze(point: str) -> Fault:
    """A zombie that was in the middle of something."""

    async def inject(chaos: Chaos) -> None:
        await _reach(chaos, "allocator", f"{point}, frozen")

    return Fault(
        kind="allocator frozen at a point",
        name=f"allocator frozen {point} for {FREEZE_AT_SEC:g} s",
        touches=frozenset({"allocator"}),
        inject=inject,
        heal=_thaw_allocators,
        lasts_sec=FREEZE_AT_SEC,
        served_within_sec=FROZEN_WITHIN_SEC,
        standby=True,
    )


def faults() -> list[Fault]:
    return [
        *(kill(name) for name in SERVICES),
        kill_active_allocator(),
        *(crash(module, point) for module, points in POINTS.items() for point in points),
        freeze_active_allocator(),
        *(freeze(point) for point in FREEZES_AT),
    ]


async def active_allocator(chaos: Chaos) -> str:
    """Raises NotReached where it cannot be told."""
    try:
        return await chaos.active_allocator()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise NotReached(str(error)) from error


async def _reach(chaos: Chaos, module: str, point: str) -> None:
    """Returns when a service of the module has come to the point; raises NotReached if none does."""
    told = chaos.crash_at(module)
    told.write_text(f"{module}: {point}")
    syncing = asyncio.create_task(_sync(chaos)) if module == "csp_syncer" else None  # or nobody would come
    try:
        async with asyncio.timeout(CRASH_PATIENCE_SEC):
            while told.exists():  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(0.01)
    except TimeoutError:
        told.unlink(missing_ok=True)
        raise NotReached("nobody came there") from None
    finally:
        if syncing is not None:
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)


async def _sync(chaos: Chaos) -> None:
    """For ever: a sync that runs already is only joined, and may be past the point."""
    while True:
        await chaos.sync()
        await asyncio.sleep(0.1)


async def _thaw_allocators(chaos: Chaos) -> None:
    for name, module in SERVICES.items():
        if module == "allocator":
            chaos.process(name).send(signal.SIGCONT)


def _a(module: str) -> str:
    return f"an {module}" if module == "allocator" else f"a {module}"
