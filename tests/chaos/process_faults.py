"""Services killed or frozen, at random or at a point of crash_points.py."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import asyncpg

from tests.chaos.crash_points import POINTS
from tests.chaos.faults import Fault, FaultNotReached
from tests.chaos.stack import SERVICES, ChaosBroker

KILLED_WITHIN_SEC = 3.0
FROZEN_WITHIN_SEC = 20.0
FREEZE_SEC = 40.0
"""Longer than RabbitMQ and PostgreSQL keep the connections of a silent allocator."""
FREEZE_AT_SEC = 20.0
"""Longer than the 15 s after which RabbitMQ closes a silent connection."""
CRASH_PATIENCE_SEC = 35.0
"""Longer than the 30 s for which a csp-syncer waits for a reply that a killed allocator has lost."""
FREEZE_POINTS = ("before a student's commit", "after a student's commit", "before a student's ack")


def build_kill(name: str) -> Fault:
    async def inject(broker: ChaosBroker) -> None:
        broker.process(name).kill()

    module = SERVICES[name]
    return _build_process_death(
        module, inject, kind=f"kill -9 of {_with_article(module)}", name=f"kill -9 of the {name}"
    )


def build_kill_of_active_allocator() -> Fault:
    async def inject(broker: ChaosBroker) -> None:
        broker.process(await find_active_allocator(broker)).kill()

    name = "kill -9 of the active allocator"
    return _build_process_death("allocator", inject, kind=name, name=name)


def build_crash(module: str, point: str) -> Fault:
    """Kill the next process of the module that reaches the point."""

    async def inject(broker: ChaosBroker) -> None:
        await _wait_for_crash(broker, module, point)

    name = f"kill -9 of {_with_article(module)}"
    return _build_process_death(module, inject, kind=f"{name} at a point", name=f"{name} {point}")


def _build_process_death(
    module: str, inject: Callable[[ChaosBroker], Awaitable[None]], *, kind: str, name: str
) -> Fault:
    return Fault(
        kind=kind,
        name=name,
        affects=frozenset({module}),
        inject=inject,
        served_within_sec=KILLED_WITHIN_SEC,
        has_standby=True,
        standby_answers_pending=module == "allocator",
    )


def build_freeze_of_active_allocator() -> Fault:
    """Freeze the active allocator. After the takeover by the standby it resumes with outdated state."""

    async def inject(broker: ChaosBroker) -> None:
        broker.process(await find_active_allocator(broker)).send(signal.SIGSTOP)

    return Fault(
        kind="active allocator frozen",
        name=f"active allocator frozen for {FREEZE_SEC:g} s",
        affects=frozenset({"allocator"}),
        inject=inject,
        heal=_resume_allocators,
        duration_sec=FREEZE_SEC,
        served_within_sec=FROZEN_WITHIN_SEC,
        has_standby=True,
    )


def build_freeze_at(point: str) -> Fault:
    """Freeze the next allocator that reaches the point."""

    async def inject(broker: ChaosBroker) -> None:
        await _wait_for_crash(broker, "allocator", f"{point}, frozen")

    return Fault(
        kind="allocator frozen at a point",
        name=f"allocator frozen {point} for {FREEZE_AT_SEC:g} s",
        affects=frozenset({"allocator"}),
        inject=inject,
        heal=_resume_allocators,
        duration_sec=FREEZE_AT_SEC,
        served_within_sec=FROZEN_WITHIN_SEC,
        has_standby=True,
    )


def list_faults() -> list[Fault]:
    return [
        *(build_kill(name) for name in SERVICES),
        build_kill_of_active_allocator(),
        *(build_crash(module, point) for module, points in POINTS.items() for point in points),
        build_freeze_of_active_allocator(),
        *(build_freeze_at(point) for point in FREEZE_POINTS),
    ]


async def find_active_allocator(broker: ChaosBroker) -> str:
    """Return the name of the active allocator. Raises `FaultNotReached` if it cannot be determined."""
    try:
        return await broker.find_active_allocator()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise FaultNotReached(str(error)) from error


async def _wait_for_crash(broker: ChaosBroker, module: str, point: str) -> None:
    """Wait until a process of the module reaches the point. Raises `FaultNotReached` after a time-out."""
    crash_file = broker.crash_file(module)
    crash_file.write_text(f"{module}: {point}")
    # The csp-syncer reaches its points only during a sync.
    syncing = asyncio.create_task(_keep_syncing(broker)) if module == "csp_syncer" else None
    try:
        async with asyncio.timeout(CRASH_PATIENCE_SEC):
            while crash_file.exists():  # noqa: ASYNC110 (the process deletes the file, which sends no event)
                await asyncio.sleep(0.01)
    except TimeoutError:
        crash_file.unlink(missing_ok=True)
        raise FaultNotReached("no process reached the point") from None
    finally:
        if syncing is not None:
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)


async def _keep_syncing(broker: ChaosBroker) -> None:
    """Request syncs for ever, because a request may join a running sync that is past the point."""
    while True:
        await broker.sync()
        await asyncio.sleep(0.1)


async def _resume_allocators(broker: ChaosBroker) -> None:
    for name, module in SERVICES.items():
        if module == "allocator":
            broker.process(name).send(signal.SIGCONT)


def _with_article(module: str) -> str:
    return f"an {module}" if module == "allocator" else f"a {module}"
