"""Find or start PostgreSQL and RabbitMQ, independently of each other, in the order given in the README.

The order: the variable, the directory of programs (POSTGRES_BIN_DIR, RABBITMQ_BIN_DIR), a server on this machine,
Docker, Debian's packages. Otherwise an error names the remedies.
"""

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import asyncpg

from devstack import docker, packages, postgres, rabbitmq
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.private import wait_until
from devstack.processes import Process
from devstack.settings import Settings, digest

# Every running broker consumes from this queue.
_COMMANDS_QUEUE = "allocator.commands"


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL or RabbitMQ server."""

    url: str
    """For PostgreSQL without a database name, except for DATABASE_URL."""
    user_supplied: bool = False
    """Named by a variable, so devstack must not replace its content."""
    processes: tuple[Process, ...] = ()
    """Processes started for this server."""
    management_url: str | None = None
    """RabbitMQ's HTTP API with user and password; None if unknown."""


async def find_servers(
    settings: Settings,
    terminal: Terminal,
    stack: AsyncExitStack,
    *,
    database: Server | None = None,
    broker: Server | None = None,
) -> tuple[Server, Server]:
    """Return PostgreSQL and RabbitMQ. Servers started here end with `stack`.

    `database` and `broker` are used instead of a search if given. Raises CannotRun if a server cannot be found or
    started.
    """
    # Check both servers before starting one, so that a wrong variable fails at once and not after a long set-up.
    named_database = postgres.named_binaries() is not None
    named_broker = rabbitmq.named_binaries() is not None
    database = database or await _named_database(settings, terminal)
    if database is None and not named_database:
        database = await _local_postgres(settings, terminal)
    broker = broker or await _named_broker(settings, terminal)
    if broker is None and not named_broker:
        broker = await _local_rabbitmq(settings, terminal)
    if database is not None and broker is not None:
        return database, broker
    needs_docker = (database is None and not named_database) or (broker is None and not named_broker)
    no_docker = await docker.unavailable_reason() if needs_docker else None
    if no_docker is not None:
        terminal.print_step(f"Docker: {no_docker}")
        missing = (["PostgreSQL"] if database is None else []) + (["RabbitMQ"] if broker is None else [])
        await _install_missing(missing, terminal)
    database_stack, broker_stack = await _enter_two_stacks(stack)

    async def start_database() -> Server:
        if database is not None:
            return database
        if no_docker is None and not named_database:
            return await _docker_postgres(settings, terminal, database_stack)
        return await _private_postgres(terminal, database_stack)

    async def start_broker() -> Server:
        if broker is not None:
            return broker
        if no_docker is None and not named_broker:
            return await _docker_rabbitmq(settings, terminal, broker_stack)
        return await _private_rabbitmq(terminal, broker_stack)

    try:
        async with asyncio.TaskGroup() as starting:
            database_task = starting.create_task(start_database())
            broker_task = starting.create_task(start_broker())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return database_task.result(), broker_task.result()


async def claim_vhost(broker: Server, terminal: Terminal) -> None:
    """Prepare the virtual host for this run: delete outdated queues.

    A virtual host named by AMQP_URL stays unchanged, because the user may want to add replicas to a running broker.
    Raises CannotRun if another broker uses the virtual host, because the two would consume each other's commands.
    """
    if broker.user_supplied:
        return
    if await rabbitmq.has_consumers(broker.url, _COMMANDS_QUEUE):
        raise CannotRun(
            f"another Sandbox Broker already uses RabbitMQ on {rabbitmq.location(broker.url)}; "
            "stop it, or set AMQP_URL to another virtual host"
        )
    for name in await rabbitmq.delete_outdated(broker.url):
        terminal.print_step(f"RabbitMQ: deleted queue {name}, declared by another version")


async def _named_database(settings: Settings, terminal: Terminal) -> Server | None:
    if settings.database_url is None:
        return None
    reason = await postgres.unavailable_reason(settings.database_url)
    if reason is not None:
        raise CannotRun(f"cannot connect to DATABASE_URL: {reason}")
    terminal.print_step(f"PostgreSQL: DATABASE_URL, {postgres.location(settings.database_url)}")
    return Server(settings.database_url, user_supplied=True)


async def _named_broker(settings: Settings, terminal: Terminal) -> Server | None:
    if settings.amqp_url is None:
        return None
    reason = await rabbitmq.unavailable_reason(settings.amqp_url)
    if reason is not None:
        raise CannotRun(f"cannot connect to AMQP_URL: {reason}")
    terminal.print_step(f"RabbitMQ: AMQP_URL, {rabbitmq.location(settings.amqp_url)}")
    return Server(settings.amqp_url, user_supplied=True)


async def _local_postgres(settings: Settings, terminal: Terminal) -> Server | None:
    reason: str | None = None
    for server in settings.postgres_servers:
        reason = await postgres.unavailable_reason(f"{server}/postgres") or await _missing_privilege(
            f"{server}/postgres"
        )
        if reason is None:
            terminal.print_step(f"PostgreSQL: found on {postgres.location(server)}")
            return Server(server)
    terminal.print_step(f"PostgreSQL: no access on {postgres.location(settings.postgres_servers[-1])} ({reason})")
    return None


async def _missing_privilege(url: str) -> str | None:
    connection = await asyncpg.connect(url, timeout=5)
    try:
        allowed = await connection.fetchval(
            "SELECT rolsuper OR rolcreatedb FROM pg_catalog.pg_roles WHERE rolname = current_user"
        )
    finally:
        await connection.close(timeout=5)
    return None if allowed else "the role has no CREATEDB privilege"


async def _local_rabbitmq(settings: Settings, terminal: Terminal) -> Server | None:
    location = rabbitmq.location(settings.rabbitmq_server)
    reason = await rabbitmq.unavailable_reason(settings.rabbitmq_server)
    if reason is not None:
        terminal.print_step(f"RabbitMQ: no access as guest on {location} ({reason})")
        return None
    terminal.print_step(f"RabbitMQ: found on {location}")
    return Server(settings.rabbitmq_server)


async def _docker_postgres(settings: Settings, terminal: Terminal, stack: AsyncExitStack) -> Server:
    password = secrets.token_urlsafe(12)
    container = await stack.enter_async_context(
        docker.Container(
            f"{_container_prefix(settings)}-postgres",
            settings.postgres_image,
            port=5432,
            env={"POSTGRES_PASSWORD": password},
            terminal=terminal,
        )
    )
    server = f"postgresql://postgres:{password}@127.0.0.1:{container.published}"
    assert container.process is not None
    await wait_until(
        lambda: postgres.unavailable_reason(f"{server}/postgres"), container.process, settings.postgres_image
    )
    terminal.print_step(f"PostgreSQL: {settings.postgres_image} in Docker, 127.0.0.1:{container.published}")
    return Server(server, processes=(container.process,))


async def _docker_rabbitmq(settings: Settings, terminal: Terminal, stack: AsyncExitStack) -> Server:
    container = await stack.enter_async_context(
        docker.Container(
            f"{_container_prefix(settings)}-rabbitmq",
            settings.rabbitmq_image,
            port=5672,
            env={"RABBITMQ_DEFAULT_USER": "broker", "RABBITMQ_DEFAULT_PASS": "broker"},
            terminal=terminal,
        )
    )
    url = f"amqp://broker:broker@127.0.0.1:{container.published}/"
    assert container.process is not None
    await wait_until(lambda: rabbitmq.unavailable_reason(url), container.process, settings.rabbitmq_image)
    terminal.print_step(f"RabbitMQ: {settings.rabbitmq_image} in Docker, 127.0.0.1:{container.published}")
    return Server(url, processes=(container.process,))


async def _private_postgres(terminal: Terminal, stack: AsyncExitStack) -> Server:
    server = await stack.enter_async_context(postgres.PrivatePostgres())
    assert server.process is not None
    terminal.print_step(f"PostgreSQL: private server from {postgres.find_binaries()}, 127.0.0.1:{server.port}")
    return Server(server.url.removesuffix("/postgres"), processes=(server.process,))


async def _private_rabbitmq(terminal: Terminal, stack: AsyncExitStack) -> Server:
    server = await stack.enter_async_context(rabbitmq.PrivateRabbitMQ())
    assert server.process is not None
    terminal.print_step(f"RabbitMQ: private server from {rabbitmq.find_binaries()}, 127.0.0.1:{server.port}")
    return Server(server.url, processes=(server.process,))


async def _install_missing(missing: Sequence[str], terminal: Terminal) -> None:
    """Install the missing servers from Debian's packages. Raises CannotRun without the permission to install."""
    finders = {"PostgreSQL": postgres.find_binaries, "RabbitMQ": rabbitmq.find_binaries}
    absent = [name for name in missing if finders[name]() is None]
    if absent and not packages.can_install():
        variables = {"PostgreSQL": "DATABASE_URL", "RabbitMQ": "AMQP_URL"}
        raise CannotRun(
            f"{' and '.join(absent)} not found: set {' and '.join(variables[name] for name in absent)}, "
            f"or install and start {' and '.join(absent)} on this machine, or start Docker"
        )
    for name in absent:
        await packages.install({"PostgreSQL": "postgresql", "RabbitMQ": "rabbitmq-server"}[name], terminal)
        if finders[name]() is None:
            raise CannotRun(f"{name}: the package is installed, but its programs were not found")


async def _enter_two_stacks(stack: AsyncExitStack) -> tuple[AsyncExitStack, AsyncExitStack]:
    """Return a nested stack for each of two concurrent tasks, because one stack is not safe for both."""
    return await stack.enter_async_context(AsyncExitStack()), await stack.enter_async_context(AsyncExitStack())


def _container_prefix(settings: Settings) -> str:
    return f"sandbox-broker-dev-{digest(str(settings.root))}"
