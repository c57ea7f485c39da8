"""The gateway looks for a newer primary of PostgreSQL."""

import asyncpg
import pytest

from devstack.conditions import wait_until
from sandbox_broker.database import primary
from sandbox_broker.database.primary import Primary

from .gateway_harness import running


async def test_the_gateway_looks_for_a_newer_primary(
    clean_queues: str, clean_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Primary.connect
    names: list[str] = []

    async def record(self: Primary, *, application_name: str, statement_timeout_sec: float) -> asyncpg.Connection:
        names.append(application_name)
        return await connect(self, application_name=application_name, statement_timeout_sec=statement_timeout_sec)

    monkeypatch.setattr(Primary, "connect", record)
    monkeypatch.setattr(primary, "CHECK_SEC", 0.01)
    async with running(clean_queues, database_url=clean_database, far_sides=False):
        await wait_until(lambda: names.count("primary-check") > 1)  # raises AssertionError after its time limit
