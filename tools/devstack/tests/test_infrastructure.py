"""Search for PostgreSQL and RabbitMQ: variables, this machine, Docker, packages, in this order.

The tests with Docker are in tests/containers.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractIncomingMessage

from devstack import infrastructure, packages, postgres, rabbitmq, shared_servers, temporary
from devstack.errors import CannotRun
from devstack.infrastructure import Server, claim_vhost, find_servers
from devstack.ports import free_port
from devstack.settings import Settings
from devstack.shared_servers import SharedServers
from sandbox_broker.contract import topology

pytest_plugins = ("devstack.fixtures",)

SettingsFrom = Callable[..., Settings]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def unused_ports() -> Mapping[str, str]:
    """Variables that direct the search on this machine to ports without a listener."""
    return {"PGPORT": str(free_port()), "RABBITMQ_NODE_PORT": str(free_port())}


@pytest.fixture
def no_docker(server_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # An unreachable address has the same effect on machines with and without Docker.
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")


def local_variables(own_postgres_url: str, own_amqp_url: str) -> dict[str, str]:
    """Return variables that direct the search on this machine to the private servers."""
    database, broker = urlsplit(own_postgres_url), urlsplit(own_amqp_url)
    return {
        "PGPORT": str(database.port),
        "PGUSER": str(database.username),
        "PGPASSWORD": str(database.password),
        "RABBITMQ_NODE_PORT": str(broker.port),
    }


async def test_variables_have_priority(
    settings_from: SettingsFrom, terminal: Any, stack: AsyncExitStack, own_postgres_url: str, own_amqp_url: str
) -> None:
    settings = settings_from(
        DATABASE_URL=own_postgres_url,
        AMQP_URL=own_amqp_url,
        PGPORT=str(free_port()),
        RABBITMQ_NODE_PORT=str(free_port()),
    )

    database, broker = await find_servers(settings, terminal, stack)

    assert (database.url, database.user_supplied) == (own_postgres_url, True)
    assert (broker.url, broker.user_supplied) == (own_amqp_url, True)
    assert "password" not in "".join(terminal.lines)
    assert any(line.startswith("• PostgreSQL: DATABASE_URL, 127.0.0.1:") for line in terminal.lines)


async def test_servers_on_this_machine_are_found(
    settings_from: SettingsFrom, terminal: Any, stack: AsyncExitStack, own_postgres_url: str, own_amqp_url: str
) -> None:
    database, broker = await find_servers(
        settings_from(**local_variables(own_postgres_url, own_amqp_url)), terminal, stack
    )

    assert f"{database.url}/postgres" == own_postgres_url
    assert broker.url == own_amqp_url
    assert not database.user_supplied
    assert database.processes == broker.processes == ()


async def test_the_two_servers_are_found_independently(
    settings_from: SettingsFrom, terminal: Any, stack: AsyncExitStack, own_postgres_url: str, own_amqp_url: str
) -> None:
    settings = settings_from(DATABASE_URL=own_postgres_url, RABBITMQ_NODE_PORT=str(urlsplit(own_amqp_url).port))

    database, broker = await find_servers(settings, terminal, stack)

    assert database.user_supplied
    assert not broker.user_supplied


async def test_an_unreachable_server_in_a_variable_is_an_error_with_its_name(
    settings_from: SettingsFrom, terminal: Any, stack: AsyncExitStack, own_postgres_url: str, own_amqp_url: str
) -> None:
    unused_port = free_port()
    variables = local_variables(own_postgres_url, own_amqp_url)

    with pytest.raises(CannotRun, match=r"^cannot connect to DATABASE_URL") as caught:
        await find_servers(
            settings_from(**variables, DATABASE_URL=f"postgresql://me:secret@127.0.0.1:{unused_port}/x"),
            terminal,
            stack,
        )
    assert caught.value.status == 2
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)

    with pytest.raises(CannotRun, match=r"^cannot connect to AMQP_URL"):
        await find_servers(
            settings_from(**variables, AMQP_URL=f"amqp://me:secret@127.0.0.1:{unused_port}/"), terminal, stack
        )


@pytest.mark.parametrize(
    "url", ["not a url", "postgresql://127.0.0.1:port/x", "mysql://127.0.0.1/x", "postgresql://"]
)
async def test_an_invalid_database_url_is_reported_in_one_line(
    settings_from: SettingsFrom, terminal: Any, stack: AsyncExitStack, url: str
) -> None:
    with pytest.raises(CannotRun, match=r"^cannot connect to DATABASE_URL") as caught:
        await find_servers(settings_from(DATABASE_URL=url, PGPORT=str(free_port())), terminal, stack)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["not a url", "amqp://127.0.0.1:port/", "http://127.0.0.1/", "amqp://"])
async def test_an_invalid_amqp_url_is_reported_in_one_line(
    settings_from: SettingsFrom, terminal: Any, stack: AsyncExitStack, own_postgres_url: str, url: str
) -> None:
    with pytest.raises(CannotRun, match=r"^cannot connect to AMQP_URL") as caught:
        await find_servers(settings_from(DATABASE_URL=own_postgres_url, AMQP_URL=url), terminal, stack)

    assert "\n" not in str(caught.value)


async def test_a_role_without_createdb_is_not_used(
    settings_from: SettingsFrom, terminal: Any, own_postgres_url: str
) -> None:
    connection = await asyncpg.connect(own_postgres_url)
    try:
        await connection.execute("CREATE ROLE restricted LOGIN PASSWORD 'p'")
        settings = settings_from(PGPORT=str(urlsplit(own_postgres_url).port), PGUSER="restricted", PGPASSWORD="p")

        assert await infrastructure._local_postgres(settings, terminal) is None
    finally:
        await connection.execute("DROP ROLE restricted")
        await connection.close()

    assert "the role has no CREATEDB privilege" in terminal.lines[-1]


async def test_a_virtual_host_of_another_broker_is_refused_unless_named_by_the_user(
    own_amqp_url: str, terminal: Any
) -> None:
    async def ignore(_: AbstractIncomingMessage) -> None: ...

    async with await aio_pika.connect(own_amqp_url) as connection:
        channel = await connection.channel()
        await channel.queue_delete("allocator.commands")  # of another test
        queue = await channel.declare_queue("allocator.commands", auto_delete=True)
        await queue.consume(ignore)

        with pytest.raises(CannotRun, match=r"another Sandbox Broker already uses RabbitMQ .* set AMQP_URL"):
            await claim_vhost(Server(own_amqp_url), terminal)

        await claim_vhost(Server(own_amqp_url, user_supplied=True), terminal)


async def test_queues_of_another_version_are_deleted(own_amqp_url: str, terminal: Any) -> None:
    async with await aio_pika.connect(own_amqp_url) as connection:
        channel = await connection.channel()
        await topology.declare(channel)
        await channel.queue_delete(topology.REAPER_EVENTS.name)
        await channel.declare_queue(topology.REAPER_EVENTS.name, durable=True, arguments={"x-queue-type": "quorum"})

        await claim_vhost(Server(own_amqp_url), terminal)

        assert terminal.lines == ["• RabbitMQ: deleted queue reaper.events, declared by another version"]
        await topology.declare(channel)
        for queue in topology.QUEUES:
            await channel.queue_delete(queue.name)


@pytest.mark.usefixtures("no_docker", "postgres_binaries", "rabbitmq_binaries")
async def test_without_docker_private_servers_are_started(
    settings_from: SettingsFrom, terminal: Any, unused_ports: Mapping[str, str]
) -> None:
    async with AsyncExitStack() as stack:
        database, broker = await find_servers(settings_from(**unused_ports), terminal, stack)

        assert await postgres.unavailable_reason(f"{database.url}/postgres") is None
        assert await rabbitmq.unavailable_reason(broker.url) is None
        assert len(database.processes) == len(broker.processes) == 1

    assert not any(process.running for process in (*database.processes, *broker.processes))


@pytest.mark.usefixtures("no_docker")
async def test_without_any_server_the_error_names_the_remedies(
    settings_from: SettingsFrom,
    terminal: Any,
    stack: AsyncExitStack,
    unused_ports: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres, "find_binaries", lambda: None)
    monkeypatch.setattr(rabbitmq, "find_binaries", lambda: None)
    monkeypatch.setattr(packages, "can_install", lambda: False)

    with pytest.raises(CannotRun, match="set DATABASE_URL and AMQP_URL, or install and start") as caught:
        await find_servers(settings_from(**unused_ports), terminal, stack)

    assert caught.value.status == 2


@pytest.mark.usefixtures("no_docker")
async def test_without_docker_no_container_is_started(settings_from: SettingsFrom) -> None:
    async with shared_servers.start_shared_servers(settings_from()) as started:
        assert started == SharedServers()


@pytest.mark.usefixtures("no_docker", "postgres_binaries", "rabbitmq_binaries")
async def test_servers_start_from_the_directories_that_variables_name(
    settings_from: SettingsFrom, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers on this machine are not used: they may have another version."""
    monkeypatch.setenv("POSTGRES_BIN_DIR", str(postgres.find_binaries()))
    monkeypatch.setenv("RABBITMQ_BIN_DIR", str(rabbitmq.find_binaries()))

    async with AsyncExitStack() as stack:
        database, broker = await find_servers(settings_from(), terminal, stack)

        assert len(database.processes) == len(broker.processes) == 1
        assert [line for line in terminal.lines if "found on" in line] == []
        assert await postgres.unavailable_reason(f"{database.url}/postgres") is None
        assert await rabbitmq.unavailable_reason(broker.url) is None


@pytest.mark.usefixtures("postgres_binaries", "rabbitmq_binaries")
async def test_a_test_run_shares_servers_from_the_directories_that_variables_name(
    settings_from: SettingsFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_BIN_DIR", str(postgres.find_binaries()))
    monkeypatch.setenv("RABBITMQ_BIN_DIR", str(rabbitmq.find_binaries()))

    async with shared_servers.start_shared_servers(settings_from()) as shared:
        assert shared.database is not None
        assert shared.broker is not None
        async with (
            temporary.create_database(shared.database, "broker_test") as database_url,
            temporary.create_vhost(shared.broker, "broker_test") as amqp_url,
        ):
            assert await postgres.unavailable_reason(database_url) is None
            assert await rabbitmq.unavailable_reason(amqp_url) is None
        assert await rabbitmq.unavailable_reason(amqp_url) is not None, "the virtual host still exists"

    assert await rabbitmq.unavailable_reason(shared.broker.url) is not None


async def test_a_deleted_queue_exists_again_with_its_binding(own_amqp_url: str, terminal: Any) -> None:
    async with await aio_pika.connect(own_amqp_url) as connection:
        channel = await connection.channel()
        await topology.declare(channel)
        await channel.queue_delete(topology.ALLOCATOR_COMMANDS.name)

        await claim_vhost(Server(own_amqp_url), terminal)

        exchange = await channel.get_exchange(topology.COMMANDS.name)
        await exchange.publish(aio_pika.Message(b"{}"), topology.ALLOCATOR_COMMANDS.name)
        queue = await channel.get_queue(topology.ALLOCATOR_COMMANDS.name)
        assert (await queue.purge()).message_count == 1
