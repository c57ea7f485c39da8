"""Temporary databases and virtual hosts, which isolate concurrent tests and benchmarks on the same servers."""

import contextlib
import json
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import httpx

from devstack import rabbitmq
from devstack.infrastructure import Server
from devstack.private import make_directory, service_account, write
from devstack.processes import run


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
    """Create an empty virtual host and yield its URL. Deletes it on exit.

    Starts a private server instead if this account cannot administer the server, or if the server runs in a
    container of `make run`.
    """
    name = f"{prefix}_{secrets.token_hex(4)}"
    url = f"{server.url.rstrip('/')}/{name}"
    user = urlsplit(server.url).username or "guest"
    local = urlsplit(server.url).hostname in ("127.0.0.1", "localhost") and not server.processes
    if server.management_url is not None:
        async with _managed_vhost(server.management_url, name, user):
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
    """Return False without the right to administer RabbitMQ.

    Imports the virtual host with its permissions, because each start of rabbitmqctl takes 0.8 s of processor time.
    """
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    definitions = {"vhosts": [{"name": name}], "permissions": [{"user": user, "vhost": name, **everything}]}
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
