"""Temporary databases and virtual hosts, which isolate concurrent tests and benchmarks on the same servers."""

import contextlib
import json
import secrets
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import httpx

from devstack import rabbitmq
from devstack.infrastructure import Server
from devstack.private import make_directory, service_account, write
from devstack.processes import run

_EVERYTHING = {"configure": ".*", "write": ".*", "read": ".*"}
"""Permissions of the user in a temporary virtual host: regular expressions of names."""


@asynccontextmanager
async def create_database(server: Server, prefix: str) -> AsyncIterator[str]:
    """Create an empty database and yield its URL. Drops it on exit."""
    base_url = server.url.rsplit("/", 1)[0] if server.user_supplied else server.url
    name = f"{prefix}_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(f"{base_url}/postgres")
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        try:
            yield f"{base_url}/{name}"
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


async def truncate_tables(database: asyncpg.Connection | asyncpg.Pool, statement: str) -> None:
    """Truncate tables, with retries after a deadlock or lock time-out.

    Running services lock the same tables in another order. The short lock time-out lets them proceed.
    """
    while True:
        with contextlib.suppress(asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
            await database.execute(f"SET LOCAL lock_timeout = '100ms'; {statement}")
            return


@asynccontextmanager
async def create_vhost(server: Server, prefix: str) -> AsyncIterator[str]:
    """Create an empty virtual host and yield its URL. Deletes it on exit. See `create_vhosts`."""
    async with create_vhosts(server, prefix, number=1) as (url,):
        yield url


@asynccontextmanager
async def create_vhosts(server: Server, prefix: str, *, number: int) -> AsyncIterator[list[str]]:
    """Create empty virtual hosts and yield their URLs. Deletes them on exit.

    Starts a private server instead, and yields only its URL, if this account cannot administer the server, or if
    the server runs in a container of `make run`.
    """
    names = [f"{prefix}_{secrets.token_hex(4)}" for _ in range(number)]
    urls = [f"{server.url.rstrip('/')}/{name}" for name in names]
    user = urlsplit(server.url).username or "guest"
    local = urlsplit(server.url).hostname in ("127.0.0.1", "localhost") and not server.processes
    if server.management_url is not None:
        async with AsyncExitStack() as stack:
            for name in names:
                await stack.enter_async_context(_managed_vhost(server.management_url, name, user))
            yield urls
    elif local and await _add_vhosts(names, user):
        try:
            yield urls
        finally:
            binaries = ", ".join(f'<<"{name}">>' for name in names)
            await run(["rabbitmqctl", "-q", "eval", f'[rabbit_vhost:delete(V, <<"test">>) || V <- [{binaries}]].'])
    else:
        async with rabbitmq.PrivateRabbitMQ() as private:
            yield [private.url]


@asynccontextmanager
async def _managed_vhost(management: str, name: str, user: str) -> AsyncIterator[None]:
    async with httpx.AsyncClient(base_url=f"{management}/api/", trust_env=False, timeout=60) as client:
        (await client.put(f"vhosts/{name}")).raise_for_status()
        try:
            (await client.put(f"permissions/{name}/{user}", json=_EVERYTHING)).raise_for_status()
            yield
        finally:
            (await client.delete(f"vhosts/{name}")).raise_for_status()


async def _add_vhosts(names: Sequence[str], user: str) -> bool:
    """Return False without the right to administer RabbitMQ.

    Imports the virtual hosts with their permissions, because each start of rabbitmqctl takes 0.8 s of processor
    time.
    """
    definitions = {
        "vhosts": [{"name": name} for name in names],
        "permissions": [{"user": user, "vhost": name, **_EVERYTHING} for name in names],
    }
    account = service_account("rabbitmq")
    directory = make_directory("definitions", account)
    try:
        write(directory / "definitions.json", json.dumps(definitions), account)
        code, _ = await run(["rabbitmqctl", "-q", "import_definitions", directory / "definitions.json"])
    except OSError:
        return False
    finally:
        shutil.rmtree(directory)
    return code == 0
