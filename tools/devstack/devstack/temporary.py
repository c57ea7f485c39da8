"""A database and a virtual host of one's own on the servers that were found, for tests and benchmarks: what runs
beside each other there does not meet."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import httpx

from devstack import rabbitmq
from devstack.infrastructure import Server
from devstack.processes import run


@asynccontextmanager
async def create_database(found: Server, prefix: str) -> AsyncIterator[str]:
    """The URL of a database with nothing in it, which goes at the end of the block."""
    server = found.url.rsplit("/", 1)[0] if found.user_supplied else found.url
    name = f"{prefix}_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(f"{server}/postgres")
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        try:
            yield f"{server}/{name}"
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


async def truncate_tables(database: asyncpg.Connection | asyncpg.Pool, statement: str) -> None:
    """Empties tables, whoever is looking at them: services at work lock the same ones in another order, and must
    not wait for us as long as we wait for them."""
    while True:
        with contextlib.suppress(asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
            await database.execute(f"SET LOCAL lock_timeout = '100ms'; {statement}")
            return


@asynccontextmanager
async def create_vhost(found: Server, prefix: str) -> AsyncIterator[str]:
    """The URL of a virtual host with nothing in it, which goes at the end of the block. Where the server that was
    found cannot be given one (`make run` has it in a container, or this account may not administer it), it is the
    one of a private server."""
    name = f"{prefix}_{secrets.token_hex(4)}"
    url = f"{found.url.rstrip('/')}/{name}"
    user = urlsplit(found.url).username or "guest"
    local = urlsplit(found.url).hostname in ("127.0.0.1", "localhost") and not found.processes
    if found.management_url is not None:
        async with _managed_vhost(found.management_url, name, user):
            yield url
    elif local and await _add_vhost(name, user):
        try:
            yield url
        finally:
            await run(["rabbitmqctl", "-q", "delete_vhost", name])
    else:
        async with rabbitmq.PrivateRabbitMQ() as private:
            yield private.url


@asynccontextmanager
async def _managed_vhost(management: str, name: str, user: str) -> AsyncIterator[None]:
    async with httpx.AsyncClient(base_url=f"{management}/api/", trust_env=False, timeout=60) as client:
        (await client.put(f"vhosts/{name}")).raise_for_status()
        try:
            everything = {"configure": ".*", "write": ".*", "read": ".*"}
            (await client.put(f"permissions/{name}/{user}", json=everything)).raise_for_status()
            yield
        finally:
            (await client.delete(f"vhosts/{name}")).raise_for_status()


async def _add_vhost(name: str, user: str) -> bool:
    """False where this account may not administer the RabbitMQ that answers."""
    for command in (["add_vhost", name], ["set_permissions", "-p", name, user, ".*", ".*", ".*"]):
        try:
            code, _ = await run(["rabbitmqctl", "-q", *command])
        except OSError:
            return False
        if code != 0:
            return False
    return True
