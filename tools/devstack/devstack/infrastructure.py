"""Find PostgreSQL and RabbitMQ, each on its own, in the order that the README promises.

The variable if it is set; else what answers on this machine; else Docker; else Debian's packages; else a line
that says what to do.
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

# The queue that every running broker consumes from.
_COMMANDS_QUEUE = "allocator.commands"


@dataclass(frozen=True, slots=True)
class Server:
    """Something that answers."""

    url: str
    """For PostgreSQL without a database, unless it is the one of DATABASE_URL."""
    user_supplied: bool = False
    """It was named by a variable, so that its content is not ours to replace."""
    processes: tuple[Process, ...] = ()
    """What we have started for it."""
    management_url: str | None = None
    """RabbitMQ's HTTP API with user and password, where we know of it."""


async def find_servers(
    settings: Settings,
    terminal: Terminal,
    stack: AsyncExitStack,
    *,
    database: Server | None = None,
    broker: Server | None = None,
) -> tuple[Server, Server]:
    """PostgreSQL and RabbitMQ, unless they are given; what had to be started for them ends with the stack.

    Raises CannotRun when there is no way to have one of them.
    """
    # Looking comes before starting: a wrong variable is not to be found out after minutes of set-up.
    database = database or await _named_database(settings, terminal) or await _local_postgres(settings, terminal)
    broker = broker or await _named_broker(settings, terminal) or await _local_rabbitmq(settings, terminal)
    if database is not None and broker is not None:
        return database, broker
    no_docker = await docker.unavailable_reason()
    if no_docker is not None:
        terminal.print_step(f"Docker: {no_docker}")
        missing = (["PostgreSQL"] if database is None else []) + (["RabbitMQ"] if broker is None else [])
        await _install_missing(missing, terminal)
    database_stack, broker_stack = await _enter_two_stacks(stack)

    async def start_database() -> Server:
        if database is not None:
            return database
        if no_docker is None:
            return await _docker_postgres(settings, terminal, database_stack)
        return await _private_postgres(terminal, database_stack)

    async def start_broker() -> Server:
        if broker is not None:
            return broker
        if no_docker is None:
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
    """Makes a virtual host that we have merely come across fit for us; one that AMQP_URL names is left alone.

    Raises CannotRun when another broker runs there: the two would take each other's commands. (Whoever sets
    AMQP_URL may want just that: further replicas.)
    """
    if broker.user_supplied:
        return
    if await rabbitmq.has_consumers(broker.url, _COMMANDS_QUEUE):
        raise CannotRun(
            f"another Sandbox Broker already uses RabbitMQ on {rabbitmq.location(broker.url)}; "
            "stop it, or set AMQP_URL to another virtual host"
        )
    for name in await rabbitmq.delete_outdated(broker.url):
        terminal.print_step(f"RabbitMQ: queue {name} was of another version, and is made anew")


async def _named_database(settings: Settings, terminal: Terminal) -> Server | None:
    if settings.database_url is None:
        return None
    reason = await postgres.unavailable_reason(settings.database_url)
    if reason is not None:
        raise CannotRun(f"DATABASE_URL does not lead to a database that answers: {reason}")
    terminal.print_step(f"PostgreSQL: DATABASE_URL, {postgres.location(settings.database_url)}")
    return Server(settings.database_url, user_supplied=True)


async def _named_broker(settings: Settings, terminal: Terminal) -> Server | None:
    if settings.amqp_url is None:
        return None
    reason = await rabbitmq.unavailable_reason(settings.amqp_url)
    if reason is not None:
        raise CannotRun(f"AMQP_URL does not lead to a RabbitMQ that answers: {reason}")
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
    terminal.print_step(
        f"PostgreSQL: none on {postgres.location(settings.postgres_servers[-1])} that lets us in ({reason})"
    )
    return None


async def _missing_privilege(url: str) -> str | None:
    connection = await asyncpg.connect(url, timeout=5)
    try:
        allowed = await connection.fetchval(
            "SELECT rolsuper OR rolcreatedb FROM pg_catalog.pg_roles WHERE rolname = current_user"
        )
    finally:
        await connection.close(timeout=5)
    return None if allowed else "the role may not create databases"


async def _local_rabbitmq(settings: Settings, terminal: Terminal) -> Server | None:
    where = rabbitmq.location(settings.rabbitmq_server)
    reason = await rabbitmq.unavailable_reason(settings.rabbitmq_server)
    if reason is not None:
        terminal.print_step(f"RabbitMQ: none on {where} that lets guest in ({reason})")
        return None
    terminal.print_step(f"RabbitMQ: found on {where}")
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
    terminal.print_step(f"PostgreSQL: a private one from {postgres.find_binaries()}, 127.0.0.1:{server.port}")
    return Server(server.url.removesuffix("/postgres"), processes=(server.process,))


async def _private_rabbitmq(terminal: Terminal, stack: AsyncExitStack) -> Server:
    server = await stack.enter_async_context(rabbitmq.PrivateRabbitMQ())
    assert server.process is not None
    terminal.print_step(f"RabbitMQ: a private one from {rabbitmq.find_binaries()}, 127.0.0.1:{server.port}")
    return Server(server.url, processes=(server.process,))


async def _install_missing(missing: Sequence[str], terminal: Terminal) -> None:
    """Installs what is not there; raises CannotRun where that is not ours to do."""
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
            raise CannotRun(f"{name}: its package is installed, but its programs are not where they were expected")


async def _enter_two_stacks(stack: AsyncExitStack) -> tuple[AsyncExitStack, AsyncExitStack]:
    """A stack for each of two tasks that start things at the same time."""
    return await stack.enter_async_context(AsyncExitStack()), await stack.enter_async_context(AsyncExitStack())


def _container_prefix(settings: Settings) -> str:
    return f"sandbox-broker-dev-{digest(str(settings.root))}"
