"""Fixtures for every test that needs PostgreSQL or RabbitMQ: real ones, those that DATABASE_URL and AMQP_URL name,
or in containers where a Docker engine answers, or else found in the order of `make run`.

Each test session has a database and a virtual host of its own, which go when it ends, so that sessions run
beside each other and beside `make run`. Containers are those of the whole run: where several processes work on it,
the one that controls them starts and removes what they share.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import asyncpg
import pytest
from aio_pika import connect

from devstack import containers, infrastructure, temporary
from devstack.containers import Containers
from devstack.errors import CannotRun
from devstack.infrastructure import Server
from devstack.output import Terminal
from devstack.settings import load
from sandbox_broker.contract import topology
from sandbox_broker.migrate import migrate

_PREFIX = "broker_test"


_shared = pytest.StashKey[Containers]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Before each worker, in the process that controls them."""
    config: pytest.Config = node.config
    if _shared not in config.stash:
        # A loop that outlives this call: what has been started is stopped at the very end.
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        config.add_cleanup(runner.close)
        stack = AsyncExitStack()
        config.add_cleanup(lambda: runner.run(stack.aclose()))
        try:
            config.stash[_shared] = runner.run(stack.enter_async_context(containers.start_containers(load())))
        except CannotRun as reason:
            _exit_without_servers(reason)
    node.workerinput["containers"] = asdict(config.stash[_shared])


@pytest.fixture(scope="session")
async def servers(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Server, Server]]:
    """PostgreSQL and RabbitMQ."""
    async with AsyncExitStack() as stack:
        try:
            settings = load()
            shared = getattr(request.config, "workerinput", {}).get("containers")
            shared_servers: Containers = (
                Containers(**shared)
                if shared is not None
                else await stack.enter_async_context(containers.start_containers(settings))
            )
            yield await infrastructure.find_servers(
                settings, Terminal(), stack, database=shared_servers.database, broker=shared_servers.broker
            )
        except CannotRun as reason:
            _exit_without_servers(reason)


def _exit_without_servers(reason: CannotRun) -> NoReturn:
    pytest.exit(f"the tests need real servers: {reason}", returncode=2)


NewDatabase = Callable[[], AbstractAsyncContextManager[str]]


@pytest.fixture(scope="session")
def new_database(servers: tuple[Server, Server]) -> NewDatabase:
    """`async with new_database() as url`: a database with nothing in it, which goes at the end of the block."""
    found, _ = servers
    return partial(temporary.create_database, found, _PREFIX)


@pytest.fixture(scope="session")
async def empty_database_url(new_database: NewDatabase) -> AsyncIterator[str]:
    """A database with nothing in it."""
    async with new_database() as url:
        yield url


@pytest.fixture(scope="session")
async def database_url(empty_database_url: str) -> str:
    """A database with our tables. Ask for `clean_database` to have them empty."""
    await migrate(empty_database_url)
    return empty_database_url


@pytest.fixture
async def clean_database(database_url: str) -> str:
    """The database with our tables, all of them empty."""
    connection = await asyncpg.connect(database_url)
    await empty(connection)
    await connection.close()
    return database_url


_TABLES = (
    "sandboxes, leases, outbox, history, pool_changes, pool_counts, jobs, csp_listings, csp_accounts, dead_letters"
)
# A table that was never written to has no pages, and to truncate it takes as long as any other. Locked before it is
# looked at: a relay at work moves the counts from one table to another.
_EMPTY = f"""
DO $$
DECLARE
    written text;
BEGIN
    LOCK {_TABLES};
    SELECT string_agg(name, ', ') INTO written
    FROM unnest(string_to_array('{_TABLES}', ', ')) name
    WHERE pg_relation_size(name::regclass) > 0;
    IF written IS NOT NULL THEN
        EXECUTE 'TRUNCATE ' || written;
    END IF;
END $$;
UPDATE cleanup_duty SET run_id = NULL, until = 'epoch'
"""


async def empty(database: asyncpg.Connection | asyncpg.Pool) -> None:
    """Removes everything from our tables, whoever is looking at them."""
    await temporary.truncate_tables(database, _EMPTY)


NewVhost = Callable[[], AbstractAsyncContextManager[str]]


@pytest.fixture(scope="session")
def new_vhost(servers: tuple[Server, Server]) -> NewVhost:
    """`async with new_vhost() as url`: a virtual host of one's own, which goes at the end of the block."""
    _, found = servers
    return partial(temporary.create_vhost, found, _PREFIX)


@pytest.fixture(scope="session")
async def amqp_url(new_vhost: NewVhost) -> AsyncIterator[str]:
    """A virtual host for tests that leave no consumer behind. Ask for `clean_queues` to have it empty."""
    async with new_vhost() as url:
        yield url


@pytest.fixture
async def clean_queues(amqp_url: str) -> str:
    """The virtual host with the topology declared anew and every queue empty."""
    connection = await connect(amqp_url)
    async with connection, connection.channel() as channel:
        for queue in topology.QUEUES:
            await channel.queue_delete(queue.name)
        await topology.declare(channel)
    return amqp_url
