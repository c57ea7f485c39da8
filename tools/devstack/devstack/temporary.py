"""A database and a virtual host of one's own on the servers that were found, for tests and benchmarks: what runs
beside each other there does not meet."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg

from devstack import rabbitmq
from devstack.infrastructure import Found
from devstack.processes import run


@asynccontextmanager
async def database(found: Found, prefix: str) -> AsyncIterator[str]:
    """The URL of a database with nothing in it, which goes at the end of the block."""
    server = found.url.rsplit("/", 1)[0] if found.given else found.url
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


@asynccontextmanager
async def vhost(found: Found, prefix: str) -> AsyncIterator[str]:
    """The URL of a virtual host with nothing in it, which goes at the end of the block. Where the server that was
    found cannot be given one (it runs in a container, or this account may not administer it), it is the one of a
    private server."""
    name = f"{prefix}_{secrets.token_hex(4)}"
    local = urlsplit(found.url).hostname in ("127.0.0.1", "localhost") and not found.processes
    if local and await _add_vhost(name, urlsplit(found.url).username or "guest"):
        try:
            yield f"{found.url.rstrip('/')}/{name}"
        finally:
            await run(["rabbitmqctl", "-q", "delete_vhost", name])
    else:
        async with rabbitmq.PrivateRabbitMQ() as private:
            yield private.url


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
