"""PgBouncer in front of a PostgreSQL server, for tests of its pool modes."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import unquote, urlsplit

from devstack import packages, postgres
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.private import make_directory, service_account, wait_until, write
from devstack.processes import spawn

_CONFIGURATION = """
[databases]
* = host={host} port={server_port} user={user}{password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 20
"""


@asynccontextmanager
async def start_pgbouncer(
    url: str, mode: Literal["session", "transaction"], terminal: Terminal
) -> AsyncIterator[str]:
    """Run PgBouncer with its default settings and yield the URL of the database behind it. Raises CannotRun."""
    program = await packages.find_or_install(["pgbouncer"], "pgbouncer", terminal)
    parts, port, account = urlsplit(url), free_port(), service_account("postgres")
    directory = make_directory("pgbouncer", account)
    try:
        file = directory / "pgbouncer.ini"
        configuration = _CONFIGURATION.format(
            host=parts.hostname,
            server_port=parts.port or 5432,
            user=unquote(parts.username or "postgres"),
            # PgBouncer refuses an empty value. Passwords of the test servers have no quotes.
            password=f" password='{unquote(parts.password)}'" if parts.password else "",
            port=port,
            mode=mode,
        )
        write(file, configuration, account)
        process = await spawn("pgbouncer", [program, file], cwd=directory, user=account)
        pooled = parts._replace(netloc=f"{parts.username or 'postgres'}@127.0.0.1:{port}").geturl()
        try:
            await wait_until(lambda: postgres.unavailable_reason(pooled), process, "PgBouncer")
            yield pooled
        finally:
            await process.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
