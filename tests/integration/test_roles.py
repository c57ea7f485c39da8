"""Each service with the PostgreSQL role and the RabbitMQ user that deploy/ gives it: it does its work, and is
refused what is not its own."""

import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import asyncpg
import pytest
from aiormq.exceptions import ChannelAccessRefused
from pamqp.commands import Basic

from devstack.postgres import PrivatePostgres
from devstack.private import account, make_directory, write
from devstack.rabbitmq import PrivateRabbitMQ
from sandbox_broker import topology
from sandbox_broker.connection import open_channel
from sandbox_broker.declare import declare
from sandbox_broker.migrate import migrate
from sandbox_broker.tables import metadata
from tests.integration.stack import ROOT, Stack, eventually, running

PASSWORD = "secret"
DATABASE = "sandbox_broker"
OWNER, GATEWAY, ALLOCATOR = "sandbox_broker", "sandbox_broker_gateway", "sandbox_broker_allocator"
TABLES = tuple(metadata.tables)

CONSUMES: Mapping[str, tuple[topology.Queue, ...]] = {
    "gateway": (),
    "allocator": (topology.ALLOCATOR_COMMANDS, topology.ALLOCATOR_MAINTENANCE, topology.DEAD_LETTER_QUEUE),
    "reaper": (
        topology.REAPER_COMMANDS,
        topology.REAPER_EVENTS,
        topology.CLEANUP_TICKS,
        topology.EXPIRY_TICKS,
    ),
    "csp-syncer": (topology.SYNCER_COMMANDS, topology.SYNC_TICKS, topology.PURGE_TICKS),
    "keda": (),
}
ASKS = ("gateway", "reaper", "csp-syncer")
"""Have a queue of their own for replies."""
DEFAULT = ""
"""The exchange that leads to every queue by its name: for nobody."""
PUBLISHES: Mapping[str, set[str]] = {
    "gateway": {topology.COMMANDS.name},
    "allocator": {topology.COMMANDS.name, topology.DEAD_LETTERS.name, topology.EVENTS.name, topology.REPLIES.name},
    "reaper": {topology.COMMANDS.name, topology.DEAD_LETTERS.name, topology.REPLIES.name, topology.TICKS.name},
    "csp-syncer": {topology.COMMANDS.name, topology.DEAD_LETTERS.name, topology.REPLIES.name, topology.TICKS.name},
    "keda": set(),
}


@dataclass(frozen=True)
class Servers:
    """Ours alone: roles and users are those of a whole server."""

    postgres: str
    """The superuser's URL of the broker's database."""
    rabbitmq: str
    """The administrator's."""

    def database_url(self, role: str) -> str:
        return _as(self.postgres, role)

    def amqp_url(self, user: str) -> str:
        return _as(self.rabbitmq, user)


def _as(url: str, user: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{parts.hostname}:{parts.port}"))


@pytest.fixture(scope="module")
async def servers_with_roles() -> AsyncIterator[Servers]:
    async with PrivatePostgres() as postgres, PrivateRabbitMQ() as rabbitmq:
        servers = Servers(postgres.url.removesuffix("/postgres") + f"/{DATABASE}", rabbitmq.url)
        await _make_roles(postgres, servers)
        await _make_users(rabbitmq)
        await migrate(servers.database_url(OWNER))
        await declare(servers.amqp_url("migration"))
        yield servers


async def _make_roles(postgres: PrivatePostgres, servers: Servers) -> None:
    administrator = await asyncpg.connect(postgres.url)
    await administrator.execute(f"CREATE DATABASE {DATABASE}")
    await administrator.close()
    connection = await asyncpg.connect(servers.postgres)
    for _ in range(2):  # repeating it is harmless
        await connection.execute((ROOT / "deploy" / "postgres" / "roles.sql").read_text())
    for role in (OWNER, GATEWAY, ALLOCATOR):
        await connection.execute(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    await connection.close()


async def _make_users(rabbitmq: PrivateRabbitMQ) -> None:
    # The server's account may not be able to read where this clone is.
    user = account("rabbitmq")
    directory = make_directory("definitions", user)
    try:
        definitions = directory / "definitions.json"
        write(definitions, (ROOT / "deploy" / "rabbitmq" / "definitions.json").read_text(), user)
        await rabbitmq.ctl("import_definitions", str(definitions))
    finally:
        shutil.rmtree(directory)
    for name in ("migration", *CONSUMES):
        await rabbitmq.ctl("change_password", name, PASSWORD)


@pytest.fixture(scope="module")
async def stack_with_roles(servers_with_roles: Servers) -> AsyncIterator[Stack]:
    servers = servers_with_roles
    own = {
        "gateway": {
            "DATABASE_URL": servers.database_url(GATEWAY),
            "AMQP_URL": servers.amqp_url("gateway"),
        },
        "allocator": {
            "DATABASE_URL": servers.database_url(ALLOCATOR),
            "AMQP_URL": servers.amqp_url("allocator"),
        },
        "reaper": {"AMQP_URL": servers.amqp_url("reaper")},
        "csp_syncer": {"AMQP_URL": servers.amqp_url("csp-syncer")},
    }
    async with running(servers.postgres, servers.rabbitmq, settings_of=own) as stack:
        yield stack


async def test_with_roles_of_their_own_the_services_do_all_their_work(stack_with_roles: Stack) -> None:
    stack = stack_with_roles
    await stack.fill(10)  # an administrator's sync

    leases = [(await stack.allocate(f"student-{number}")).json() for number in range(3)]
    assert len({lease["sandbox_id"] for lease in leases}) == 3
    assert (await stack.release(leases[0]["sandbox_id"], "student-0")).status_code == 200
    await eventually(stack.nothing_pending)
    # One ends by its time, found by the reaper's ticks.
    await stack.database.execute(
        "UPDATE leases SET allocated_at = allocated_at - interval '1 day', expires_at = expires_at - "
        "interval '1 day' WHERE holder = 'student-1'"
    )

    async def two_are_deleted() -> bool:
        return (await stack.stats())["deleted"] == 2

    await eventually(two_are_deleted)
    released = await stack.admin("POST", f"sandboxes/{leases[2]['sandbox_id']}/release", reason="class ended")
    assert released.status_code == 200, released.text
    cleaned = await stack.admin("POST", "cleanup")
    assert cleaned.status_code in (200, 202), cleaned.text
    await eventually(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == 3
    assert (await stack.admin("GET", "leaks")).status_code == 200
    purged = await stack.admin("POST", "auto-delete-stale", grace_period_hours="0")
    assert purged.status_code == 200, purged.text
    await stack.assert_sound()

    # A second allocator waits beside the first one and takes over, without a right to more.
    await stack.start_service("allocator", name="second allocator")
    stack.processes["allocator"].kill()
    await stack.processes["allocator"].wait()

    async def answered() -> bool:
        return (await stack.allocate("student-9")).status_code in (200, 201)

    await eventually(answered)


async def test_the_gateway_may_read_every_table(servers_with_roles: Servers) -> None:
    connection = await asyncpg.connect(servers_with_roles.database_url(GATEWAY))
    for table in TABLES:
        await connection.execute(f"SELECT FROM {table}")
    await connection.close()


@pytest.mark.parametrize("table", TABLES)
async def test_the_gateway_may_write_no_table(servers_with_roles: Servers, table: str) -> None:
    column = next(iter(metadata.tables[table].columns)).name
    statements = [
        f"INSERT INTO {table} DEFAULT VALUES",
        f"UPDATE {table} SET {column} = DEFAULT",
        f"DELETE FROM {table}",
        f"TRUNCATE {table}",
        f"SELECT FROM {table} FOR UPDATE",
    ]
    await _refused(servers_with_roles.database_url(GATEWAY), statements)


@pytest.mark.parametrize("role", [GATEWAY, ALLOCATOR])
async def test_no_service_may_change_the_schema(servers_with_roles: Servers, role: str) -> None:
    await _refused(
        servers_with_roles.database_url(role),
        [
            "CREATE TABLE mine (id int)",
            "CREATE SCHEMA mine",
            "CREATE TEMPORARY TABLE mine (id int)",
            "CREATE ROLE mine",
            "DROP TABLE sandboxes",
            "ALTER TABLE sandboxes ADD COLUMN mine int",
            "CREATE INDEX mine ON sandboxes (name)",
            "TRUNCATE leases",
            f"SET ROLE {OWNER}",
        ],
    )


async def _refused(url: str, statements: list[str]) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize("user", CONSUMES)
async def test_a_user_may_not_consume_what_is_for_another(servers_with_roles: Servers, user: str) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        for queue in topology.QUEUES:
            if queue not in CONSUMES[user]:
                channel = await open_channel(connection, confirms=False)
                with pytest.raises(ChannelAccessRefused):
                    await channel.basic_get(queue.name)
                channel = await open_channel(connection, confirms=False)
                with pytest.raises(ChannelAccessRefused):
                    await channel.queue_purge(queue.name)


@pytest.mark.parametrize("user", PUBLISHES)
async def test_a_user_may_not_publish_where_it_has_nothing_to_say(servers_with_roles: Servers, user: str) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        for exchange in [*(exchange.name for exchange in topology.EXCHANGES), DEFAULT]:
            if exchange not in PUBLISHES[user]:
                channel = await open_channel(connection, confirms=True)
                with pytest.raises(ChannelAccessRefused):
                    await channel.basic_publish(b"{}", exchange=exchange, properties=Basic.Properties())


@pytest.mark.parametrize("user", CONSUMES)
async def test_a_user_may_not_change_the_topology(servers_with_roles: Servers, user: str) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        for queue in topology.QUEUES:
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.queue_delete(queue.name)
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.queue_bind(queue.name, topology.EVENTS.name, "#")
        for exchange in topology.EXCHANGES:
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.exchange_delete(exchange.name)
        channel = await open_channel(connection, confirms=False)
        with pytest.raises(ChannelAccessRefused):
            await channel.queue_declare("mine", durable=True)


@pytest.mark.parametrize("user", ASKS)
async def test_a_user_may_listen_to_nothing_but_replies(servers_with_roles: Servers, user: str) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        channel = await open_channel(connection, confirms=False)
        own = (await channel.queue_declare(exclusive=True)).queue or ""
        await channel.queue_bind(own, topology.REPLIES.name, own)
        for exchange in topology.EXCHANGES:
            if exchange != topology.REPLIES:
                channel = await open_channel(connection, confirms=False)
                with pytest.raises(ChannelAccessRefused):
                    await channel.queue_bind(own, exchange.name, "#")


async def test_the_autoscaler_may_ask_how_long_a_queue_is(servers_with_roles: Servers) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url("keda"))
    async with connection:
        channel = await open_channel(connection, confirms=False)
        declared = await channel.queue_declare(topology.ALLOCATOR_COMMANDS.name, passive=True)
        assert declared.message_count is not None
