"""PostgreSQL and RabbitMQ shared by all processes of a test run.

They run from the programs in POSTGRES_BIN_DIR and RABBITMQ_BIN_DIR, or in containers. Containers use
testcontainers, which finds the address of the engine and removes the containers of a killed test run. `make run`
uses docker.py instead, because its containers stay in the foreground.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import httpx
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.exceptions import ContainerConnectException

from devstack import docker, postgres, rabbitmq
from devstack.errors import CannotRun
from devstack.infrastructure import Server
from devstack.private import READY_SEC
from devstack.settings import POSTGRES_IMAGE, RABBITMQ_IMAGE, Settings

_BETWEEN_TRIES_SEC = 0.1
_USER = "broker"


@dataclass(frozen=True, slots=True)
class SharedServers:
    """URLs of the started servers, None for other servers. Plain text, for transfer between processes."""

    postgres_url: str | None = None
    amqp_url: str | None = None
    management_url: str | None = None

    @property
    def database(self) -> Server | None:
        return None if self.postgres_url is None else Server(self.postgres_url)

    @property
    def broker(self) -> Server | None:
        return None if self.amqp_url is None else Server(self.amqp_url, management_url=self.management_url)


@asynccontextmanager
async def start_shared_servers(settings: Settings) -> AsyncIterator[SharedServers]:
    """Start each server that is not named by a variable: from its directory of programs, or in a container.

    Without a directory and without a Docker engine, the server is not started. Raises CannotRun if a start fails.
    """
    async with AsyncExitStack() as stack:
        private_database = private_broker = None
        if settings.database_url is None and postgres.named_binaries() is not None:
            private_database = await stack.enter_async_context(postgres.PrivatePostgres())
        if settings.amqp_url is None and rabbitmq.named_binaries() is not None:
            private_broker = await stack.enter_async_context(rabbitmq.PrivateRabbitMQ(management=True))
        containers = await _start_containers(
            stack,
            database=settings.database_url is None and private_database is None,
            broker=settings.amqp_url is None and private_broker is None,
        )
        if private_database is not None:
            containers = replace(containers, postgres_url=private_database.url.removesuffix("/postgres"))
        if private_broker is not None:
            containers = replace(
                containers, amqp_url=private_broker.url, management_url=private_broker.management_url
            )
        yield containers


async def _start_containers(stack: AsyncExitStack, *, database: bool, broker: bool) -> SharedServers:
    """Run a container for each of the wanted servers. Without a Docker engine, start none."""
    if not (database or broker) or await docker.unavailable_reason() is not None:
        return SharedServers()
    password = secrets.token_urlsafe(12)
    # Start both containers first, because they become ready in parallel.
    database_container = broker_container = None
    if database:
        environment = {"POSTGRES_USER": _USER, "POSTGRES_PASSWORD": password}
        database_container = await stack.enter_async_context(
            _start_container("TEST_POSTGRES_IMAGE", POSTGRES_IMAGE, [5432], environment)
        )
    if broker:
        environment = {"RABBITMQ_DEFAULT_USER": _USER, "RABBITMQ_DEFAULT_PASS": password}
        broker_container = await stack.enter_async_context(
            _start_container("TEST_RABBITMQ_IMAGE", RABBITMQ_IMAGE, [5672, 15672], environment)
        )
    postgres_url = None if database_container is None else await _wait_for_postgres(database_container, password)
    amqp_url, management_url = (
        (None, None) if broker_container is None else await _wait_for_rabbitmq(broker_container, password)
    )
    return SharedServers(postgres_url, amqp_url, management_url)


@asynccontextmanager
async def _start_container(
    variable: str, default: str, ports: list[int], environment: Mapping[str, str]
) -> AsyncIterator[DockerContainer]:
    image = os.environ.get(variable) or default
    container = DockerContainer(image, env=dict(environment), ports=ports)
    try:
        await asyncio.to_thread(container.start)
    except (DockerException, ContainerConnectException, OSError) as error:
        await asyncio.to_thread(container.stop)
        reason = str(getattr(error, "explanation", None) or error).splitlines()[0]
        raise CannotRun(
            f"Docker answers, but cannot run {image}: {reason}; set {variable} to an available image, "
            "or DATABASE_URL and AMQP_URL to servers"
        ) from None
    try:
        yield container
    finally:
        await asyncio.to_thread(container.stop)


async def _wait_for_postgres(container: DockerContainer, password: str) -> str:
    server = f"postgresql://{_USER}:{password}@{await _address(container, 5432)}"
    await _wait_until_available(container, lambda: postgres.unavailable_reason(f"{server}/postgres"))
    return server


async def _wait_for_rabbitmq(container: DockerContainer, password: str) -> tuple[str, str]:
    url = f"amqp://{_USER}:{password}@{await _address(container, 5672)}/"
    management = f"http://{_USER}:{password}@{await _address(container, 15672)}"

    async def check() -> str | None:
        return await rabbitmq.unavailable_reason(url) or await _http_unavailable_reason(
            f"{management}/api/overview"
        )

    await _wait_until_available(container, check)
    return url, management


async def _address(container: DockerContainer, port: int) -> str:
    host = await asyncio.to_thread(container.get_container_host_ip)
    return f"{host}:{await asyncio.to_thread(container.get_exposed_port, port)}"


async def _http_unavailable_reason(url: str) -> str | None:
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.get(url)).raise_for_status()
    except httpx.HTTPError as error:
        return str(error)
    return None


async def _wait_until_available(container: DockerContainer, check: Callable[[], Awaitable[str | None]]) -> None:
    reason: str | None = None
    try:
        async with asyncio.timeout(READY_SEC):
            while (reason := await check()) is not None:
                await asyncio.to_thread(container.reload)
                if container.status == "exited":
                    output = b"".join(await asyncio.to_thread(container.get_logs)).decode(errors="replace")
                    raise CannotRun(f"{container.image} ended: {' / '.join(output.splitlines()[-3:])}", status=1)
                await asyncio.sleep(_BETWEEN_TRIES_SEC)
    except TimeoutError:
        raise CannotRun(f"{container.image} did not answer within {READY_SEC:.0f} s: {reason}", status=1) from None
