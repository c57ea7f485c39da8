"""PostgreSQL primary with a synchronous standby."""

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import asyncpg

from devstack.postgres import PrivatePostgres

_STATEMENT_SEC = 10.0
_IN_SYNC_SEC = 60.0
_PROMOTED_SEC = 60.0
_FIND_SYNCHRONOUS = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'"


class PostgresPair:
    """Two private servers: `primary` and its synchronous `standby`. The context manager removes both on exit.

    The primary confirms a transaction only after the standby has it. A promoted standby confirms alone until
    `rebuild_standby`.
    """

    def __init__(self, *, within: Path | None = None) -> None:
        password = secrets.token_urlsafe(12)
        self.primary = PrivatePostgres(within=within, name="server_1", password=password)
        self.standby = PrivatePostgres(name="server_2", password=password)
        self._servers = (self.primary, self.standby)

    @property
    def url(self) -> str:
        """URL with the addresses of both servers, which finds the primary."""
        return self.build_url(self.ports)

    @property
    def server_url(self) -> str:
        """URL with the addresses of both servers, without a database. The first one is the primary at the start."""
        return self._build_server_url(self.ports)

    @property
    def ports(self) -> list[int]:
        return [server.port for server in self._servers]

    def build_url(self, ports: Sequence[int]) -> str:
        """Return a URL that finds the primary behind these ports of 127.0.0.1, for example ports of proxies."""
        return f"{self._build_server_url(ports)}/postgres?target_session_attrs=read-write"

    def _build_server_url(self, ports: Sequence[int]) -> str:
        credentials = urlsplit(self.primary.url).netloc.rpartition("@")[0]
        return f"postgresql://{credentials}@{','.join(f'127.0.0.1:{port}' for port in ports)}"

    async def __aenter__(self) -> Self:
        try:
            await self.primary.start()
            await self.rebuild_standby()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def promote(self) -> None:
        """Promote the standby in any state of the former primary. Return when the new primary accepts writes."""
        await _execute(
            self.standby,
            "ALTER SYSTEM RESET synchronous_standby_names",
            "SELECT pg_reload_conf()",
            f"SELECT pg_promote(true, {_PROMOTED_SEC:.0f})",
        )
        self.primary, self.standby = self.standby, self.primary

    async def rebuild_standby(self) -> None:
        """Start the standby with a copy of the primary. Returns when transactions wait for the standby."""
        await self.standby.start_as_standby(self.primary)
        await _execute(
            self.primary,
            f"ALTER SYSTEM SET synchronous_standby_names = '{self.standby.name}'",
            "SELECT pg_reload_conf()",
        )
        await self.wait_until_in_sync()

    async def wait_until_in_sync(self) -> None:
        """Wait until the standby confirms transactions. Raises TimeoutError after a minute."""
        async with asyncio.timeout(_IN_SYNC_SEC):
            while not await _execute(self.primary, _FIND_SYNCHRONOUS):  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        for server in self._servers:
            server.thaw()  # a frozen server would not handle the signal
        await asyncio.gather(*(server.close() for server in self._servers))


async def _execute(server: PrivatePostgres, *statements: str) -> list[asyncpg.Record]:
    """Execute statements outside of transactions. Return the rows of the last one."""
    connection = await asyncpg.connect(server.url, timeout=_STATEMENT_SEC)
    try:
        rows: list[asyncpg.Record] = []
        for statement in statements:
            rows = await connection.fetch(statement, timeout=_PROMOTED_SEC + _STATEMENT_SEC)
        return rows
    finally:
        connection.terminate()
