"""Preflight: servers that do not answer are reported in one line, within a time limit."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import asyncpg
import pytest

from devstack.ports import free_port
from sandbox_broker.database import schema_version
from sandbox_broker.runtime import preflight

from .shared_harness import TcpProxy, assert_no_leaks, open_tcp_proxy

AT_ONCE_SEC = 3.0
GIVES_UP_SEC = preflight.PATIENCE_SEC + 2.0


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
async def amqp_proxy(clean_queues: str) -> AsyncIterator[TcpProxy]:
    async with open_tcp_proxy(clean_queues, 5672) as line:
        yield line


@pytest.fixture
async def database_proxy(clean_database: str) -> AsyncIterator[TcpProxy]:
    async with open_tcp_proxy(clean_database, 5432) as line:
        yield line


@pytest.fixture
async def stamped_database(empty_database_url: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Yield a function that creates a database with a schema version in Alembic's table, and returns its URL."""
    name = f"broker_test_{secrets.token_hex(4)}"
    url = f"{empty_database_url.rsplit('/', 1)[0]}/{name}"
    admin = await asyncpg.connect(empty_database_url)
    await admin.execute(f"CREATE DATABASE {name}")

    async def stamp(revision: str) -> str:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE allocator_epoch (); CREATE TABLE alembic_version (version_num text)")
        await connection.execute("INSERT INTO alembic_version VALUES ($1)", revision)
        await connection.close()
        return url

    yield stamp
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def refusal(capsys: pytest.CaptureFixture[str], **urls: str) -> tuple[str, float]:
    """Run the preflight. Return its error line and its duration in seconds."""
    began = time.monotonic()

    def check() -> None:
        preflight.check(**urls)

    with pytest.raises(SystemExit) as stopped:
        await asyncio.to_thread(check)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "hunter2" not in line
    return line, time.monotonic() - began


@pytest.fixture
async def silent() -> AsyncIterator[int]:
    """Yield the port of a server that accepts connections and never answers."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.transport.abort()
    await server.wait_closed()


async def test_preflight_passes_when_both_servers_answer(amqp_url: str, database_url: str) -> None:
    await asyncio.to_thread(preflight.check, amqp_url=amqp_url, database_url=database_url)
    await asyncio.to_thread(preflight.check, amqp_url=amqp_url)


async def test_refusing_servers_are_retried_and_both_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    line, seconds = await refusal(
        capsys,
        amqp_url=f"amqp://anna:hunter2@127.0.0.1:{port}/",
        database_url=f"postgresql://anna:hunter2@127.0.0.1:{port}/x",
    )
    assert f"AMQP_URL: no RabbitMQ answers at 127.0.0.1:{port}" in line
    assert f"DATABASE_URL: no PostgreSQL answers at 127.0.0.1:{port}" in line
    assert preflight.PATIENCE_SEC - 1 < seconds < GIVES_UP_SEC


async def test_silent_servers_time_out(
    capsys: pytest.CaptureFixture[str], silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_SEC", 1.0)
    line, seconds = await refusal(
        capsys,
        amqp_url=f"amqp://anna:hunter2@127.0.0.1:{silent}/",
        database_url=f"postgresql://anna:hunter2@127.0.0.1:{silent}/x",
    )
    assert "AMQP_URL: no RabbitMQ answers" in line
    assert "DATABASE_URL: no PostgreSQL answers" in line
    assert seconds < GIVES_UP_SEC


async def test_a_server_that_starts_during_the_preflight_passes(
    amqp_proxy: TcpProxy, database_proxy: TcpProxy
) -> None:
    amqp_proxy.pause()
    database_proxy.pause()
    checking = asyncio.create_task(
        asyncio.to_thread(preflight.check, amqp_url=amqp_proxy.url, database_url=database_proxy.url)
    )
    await asyncio.wait([checking], timeout=0.2)
    amqp_proxy.resume()
    database_proxy.resume()
    await checking


async def test_a_wrong_password_is_reported_at_once(capsys: pytest.CaptureFixture[str], amqp_url: str) -> None:
    parts = urlsplit(amqp_url)
    url = f"amqp://no-such-user:hunter2@{parts.hostname}:{parts.port or 5672}{parts.path}"
    line, seconds = await refusal(capsys, amqp_url=url)
    assert "AMQP_URL: " in line
    assert "refuses this user and password" in line
    assert seconds < AT_ONCE_SEC


async def test_a_wrong_virtual_host_is_reported_at_once(capsys: pytest.CaptureFixture[str], amqp_url: str) -> None:
    line, seconds = await refusal(capsys, amqp_url=f"{amqp_url.rsplit('/', 1)[0]}/no-such-vhost")
    assert "AMQP_URL: " in line
    assert "refuses the virtual host '/no-such-vhost'" in line
    assert seconds < AT_ONCE_SEC


async def test_a_wrong_database_or_user_is_reported_at_once(
    capsys: pytest.CaptureFixture[str], amqp_url: str, database_url: str
) -> None:
    server, _, _ = database_url.rpartition("/")
    parts = urlsplit(database_url)
    stranger = f"postgresql://no_such_user:hunter2@{parts.netloc.rpartition('@')[2]}{parts.path}"
    for url in (f"{server}/no_such_database", stranger):
        line, seconds = await refusal(capsys, amqp_url=amqp_url, database_url=url)
        assert "DATABASE_URL: " in line
        assert "no_such" in line
        assert seconds < AT_ONCE_SEC


async def test_a_database_without_tables_is_reported_with_the_action(
    capsys: pytest.CaptureFixture[str], amqp_url: str, database_url: str
) -> None:
    line, _ = await refusal(capsys, amqp_url=amqp_url, database_url=f"{database_url.rpartition('/')[0]}/postgres")
    assert "python -m sandbox_broker.migrate" in line


async def test_a_schema_older_than_the_code_is_reported_with_the_action(
    capsys: pytest.CaptureFixture[str], amqp_url: str, stamped_database: Callable[[str], Awaitable[str]]
) -> None:
    line, _ = await refusal(capsys, amqp_url=amqp_url, database_url=await stamped_database("0001"))
    assert f"has the schema 0001, and this version needs {schema_version.read_required()}" in line
    assert "python -m sandbox_broker.migrate" in line


async def test_a_schema_newer_than_the_code_passes(
    amqp_url: str, stamped_database: Callable[[str], Awaitable[str]]
) -> None:
    url = await stamped_database("9999")
    await asyncio.to_thread(preflight.check, amqp_url=amqp_url, database_url=url)


@pytest.mark.parametrize("place", ["no-such-host.invalid", "127.0.0.1:1"])
async def test_a_missing_host_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_SEC", 0.5)
    line, seconds = await refusal(
        capsys, amqp_url=f"amqp://anna:hunter2@{place}/", database_url=f"postgresql://anna:hunter2@{place}/x"
    )
    assert line.startswith("cannot start: AMQP_URL: ")
    assert "DATABASE_URL: " in line
    assert seconds < GIVES_UP_SEC


async def test_a_server_other_than_rabbitmq_is_reported(
    capsys: pytest.CaptureFixture[str], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_SEC", 1.0)
    parts = urlsplit(database_url)
    line, seconds = await refusal(capsys, amqp_url=f"amqp://anna:hunter2@{parts.hostname}:{parts.port or 5432}/")
    assert "AMQP_URL: no RabbitMQ answers" in line
    assert seconds < GIVES_UP_SEC
