"""Fixtures for tests with real PostgreSQL and RabbitMQ servers.

The servers are those of DATABASE_URL and AMQP_URL. Otherwise the programs in POSTGRES_BIN_DIR and RABBITMQ_BIN_DIR
are started. Otherwise the servers run in containers if a Docker engine is available, or are found in the order of
`make run`. Each test session has its own database and virtual host, so
sessions can run in parallel and beside `make run`. With pytest-xdist, the controller starts and
stops the servers shared by all workers.
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

from devstack import infrastructure, shared_servers, temporary
from devstack.errors import CannotRun
from devstack.infrastructure import Server
from devstack.output import Terminal
from devstack.settings import load
from devstack.shared_servers import SharedServers
from devstack.vhost_pool import VhostPool
from sandbox_broker.contract import topology
from sandbox_broker.migrate import migrate

_PREFIX = "broker_test"


_shared = pytest.StashKey[SharedServers]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Start the shared servers in the controller before the first worker, and pass their URLs to each worker."""
    config: pytest.Config = node.config
    if _shared not in config.stash:
        # This event loop outlives the call, because the servers stop at the end of the test run.
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        config.add_cleanup(runner.close)
        stack = AsyncExitStack()
        config.add_cleanup(lambda: runner.run(stack.aclose()))
        try:
            config.stash[_shared] = runner.run(
                stack.enter_async_context(shared_servers.start_shared_servers(load()))
            )
        except CannotRun as reason:
            _exit_without_servers(reason)
    node.workerinput["shared_servers"] = asdict(config.stash[_shared])


@pytest.fixture(scope="session")
async def servers(
    request: pytest.FixtureRequest,
    server_programs: None,  # noqa: ARG001 - puts the test into the server lane
) -> AsyncIterator[tuple[Server, Server]]:
    """Return the PostgreSQL server and the RabbitMQ server."""
    async with AsyncExitStack() as stack:
        try:
            settings = load()
            shared = getattr(request.config, "workerinput", {}).get("shared_servers")
            started: SharedServers = (
                SharedServers(**shared)
                if shared is not None
                else await stack.enter_async_context(shared_servers.start_shared_servers(settings))
            )
            yield await infrastructure.find_servers(
                settings, Terminal(), stack, database=started.database, broker=started.broker
            )
        except CannotRun as reason:
            _exit_without_servers(reason)


def _exit_without_servers(reason: CannotRun) -> NoReturn:
    pytest.exit(f"the tests need real servers: {reason}", returncode=2)


NewDatabase = Callable[[], AbstractAsyncContextManager[str]]


@pytest.fixture(scope="session")
def new_database(servers: tuple[Server, Server]) -> NewDatabase:
    """Factory of temporary databases: `async with new_database() as url`."""
    server, _ = servers
    return partial(temporary.create_database, server, _PREFIX)


@pytest.fixture(scope="session")
async def empty_database_url(new_database: NewDatabase) -> AsyncIterator[str]:
    """URL of an empty database."""
    async with new_database() as url:
        yield url


@pytest.fixture(scope="session")
async def database_url(empty_database_url: str) -> str:
    """URL of a database with the broker's tables. Use `clean_database` for empty tables."""
    await migrate(empty_database_url)
    return empty_database_url


@pytest.fixture
async def clean_database(database_url: str) -> str:
    """URL of the database with empty tables."""
    connection = await asyncpg.connect(database_url)
    await clear_tables(connection)
    await connection.close()
    return database_url


_TABLES = (
    "sandboxes, leases, lease_extensions, outbox, history, pool_changes, pool_counts, jobs, csp_listings, "
    "csp_accounts, dead_letters, policies, waiting, creations, stock_prefixes, tokens, token_uses, audit, "
    "accesses, pool_samples"
)
# The version of policies and tokens rises, because a running allocator may know the present one.
# Skips tables without pages, because TRUNCATE takes equally long for an empty table. Locks the tables before the
# check, because a running relay moves counts between tables.
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
UPDATE cleanup_duty SET run_id = NULL, until = 'epoch';
UPDATE creation_duty SET run_id = NULL, until = 'epoch', claimed_at = NULL;
UPDATE policy_set SET version = version + 1, applied_at = NULL;
UPDATE allocator_epoch SET policy_version = version FROM policy_set WHERE policy_version <> version
"""


async def clear_tables(database: asyncpg.Connection | asyncpg.Pool) -> None:
    """Delete all rows of the broker's tables, also while services use them."""
    await temporary.truncate_tables(database, _EMPTY)


NewVhost = Callable[[], AbstractAsyncContextManager[str]]


@pytest.fixture(scope="session")
async def new_vhost(servers: tuple[Server, Server]) -> AsyncIterator[NewVhost]:
    """Factory of temporary virtual hosts: `async with new_vhost() as url`."""
    _, server = servers
    pool = VhostPool(server, _PREFIX, group_size=5)
    yield pool.use_vhost
    await pool.close()


@pytest.fixture(scope="session")
async def amqp_url(new_vhost: NewVhost) -> AsyncIterator[str]:
    """URL of a virtual host for tests that leave no consumer behind. Use `clean_queues` for empty queues."""
    async with new_vhost() as url:
        yield url


@pytest.fixture
async def clean_queues(amqp_url: str) -> str:
    """URL of the virtual host with the declared topology, empty queues and no consumers."""
    await empty_queues(amqp_url)
    return amqp_url


async def empty_queues(amqp_url: str) -> None:
    """Declare the topology and empty all its queues. A queue that still has a consumer is replaced by a new one.

    The purge of an unused queue takes RabbitMQ a tenth of the processor time of a new quorum queue.
    """
    connection = await connect(amqp_url)
    async with connection, connection.channel() as channel:
        await topology.declare(channel)
        for queue in (*topology.QUEUES, topology.NEWEST_LEASE):
            declared = await channel.declare_queue(queue.name, passive=True)
            if declared.declaration_result.consumer_count:
                await channel.queue_delete(queue.name)
                await topology.declare(channel)
            else:
                await declared.purge()
