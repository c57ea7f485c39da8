"""Running broker with services that crash at a chosen point."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

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
