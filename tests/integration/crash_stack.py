"""Running broker with services that crash at a chosen point."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from devstack.conditions import evaluate, wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import Stack, run_stack

LAUNCHER = str(Path(__file__).with_name("crash_runner.py"))


@asynccontextmanager
async def run_crashing_stack(
    new_database: NewDatabase, new_vhost: NewVhost, directory: Path, settings: Mapping[str, str]
) -> AsyncIterator[Stack]:
    """Run the broker with servers of its own. A point of crash_runner.py in the file `DIE_AT`, which is in
    `directory`, kills the service that reaches it."""
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(
            database_url,
            amqp_url,
            launcher=(LAUNCHER,),
            settings={**settings, "DIE_AT": str(directory / "point")},
        ) as stack,
    ):
        yield stack


async def kill_at(stack: Stack, point: str, is_over: Callable[[], object] | None = None) -> bool:
    """Start the service of the point again after its death.

    Return False if `is_over`, a function or a coroutine function, is true and the point was not reached. Without
    `is_over` the point must be reached within two minutes.
    """
    service = stack.processes[point.partition(":")[0]]

    async def is_dead() -> bool:
        return not service.running

    async def is_dead_or_over() -> bool:
        return not service.running or (is_over is not None and bool(await evaluate(is_over)))

    await wait_until(is_dead_or_over)
    try:
        Path(stack.environment["DIE_AT"]).unlink()
    except FileNotFoundError:  # the service removed it, and is about to die
        await wait_until(is_dead)
        await stack.forget_allocators()
        await stack.start_service(point.partition(":")[0])
        return True
    return False
