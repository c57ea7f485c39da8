"""Before a service starts: addresses that do not answer are told in one line, in bounded time."""

import asyncio
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from devstack.ports import free_port
from sandbox_broker.runtime import preflight

from .shared_harness import Line, line_to, nothing_stays

AT_ONCE_SEC = 3.0
GIVES_UP_SEC = preflight.PATIENCE_SEC + 2.0


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    async with nothing_stays():
        yield


@pytest.fixture
async def amqp_line(clean_queues: str) -> AsyncIterator[Line]:
    async with line_to(clean_queues, 5672) as line:
        yield line


@pytest.fixture
async def database_line(clean_database: str) -> AsyncIterator[Line]:
    async with line_to(clean_database, 5432) as line:
        yield line


async def refusal(capsys: pytest.CaptureFixture[str], **urls: str) -> tuple[str, float]:
    """The line, and the seconds it took."""
    began = time.monotonic()

    def check() -> None:
        preflight.check(**urls)

    with pytest.raises(SystemExit) as stopped:
        await asyncio.to_thread(check)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "hunter2" not in said
    return said, time.monotonic() - began


@pytest.fixture
async def silent() -> AsyncIterator[int]:
    """The port of a server that accepts and says nothing."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.transport.abort()
    await server.wait_closed()


async def test_it_says_nothing_when_both_answer(amqp_url: str, database_url: str) -> None:
    await asyncio.to_thread(preflight.check, amqp_url=amqp_url, database_url=database_url)
    await asyncio.to_thread(preflight.check, amqp_url=amqp_url)


async def test_servers_that_refuse_are_given_time_and_both_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    said, seconds = await refusal(
        capsys,
        amqp_url=f"amqp://anna:hunter2@127.0.0.1:{port}/",
        database_url=f"postgresql://anna:hunter2@127.0.0.1:{port}/x",
    )
    assert f"AMQP_URL: no RabbitMQ answers at 127.0.0.1:{port}" in said
    assert f"DATABASE_URL: no PostgreSQL answers at 127.0.0.1:{port}" in said
    assert preflight.PATIENCE_SEC - 1 < seconds < GIVES_UP_SEC


async def test_servers_that_accept_and_fall_silent_are_given_up(
    capsys: pytest.CaptureFixture[str], silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_SEC", 1.0)
    said, seconds = await refusal(
        capsys,
        amqp_url=f"amqp://anna:hunter2@127.0.0.1:{silent}/",
        database_url=f"postgresql://anna:hunter2@127.0.0.1:{silent}/x",
    )
    assert "AMQP_URL: no RabbitMQ answers" in said
    assert "DATABASE_URL: no PostgreSQL answers" in said
    assert seconds < GIVES_UP_SEC


async def test_a_server_that_comes_up_meanwhile_is_found(amqp_line: Line, database_line: Line) -> None:
    amqp_line.silence()
    database_line.silence()
    checking = asyncio.create_task(
        asyncio.to_thread(preflight.check, amqp_url=amqp_line.url, database_url=database_line.url)
    )
    await asyncio.wait([checking], timeout=0.2)
    amqp_line.speak()
    database_line.speak()
    await checking


async def test_a_wrong_password_is_told_at_once(capsys: pytest.CaptureFixture[str], amqp_url: str) -> None:
    parts = urlsplit(amqp_url)
    url = f"amqp://no-such-user:hunter2@{parts.hostname}:{parts.port or 5672}{parts.path}"
    said, seconds = await refusal(capsys, amqp_url=url)
    assert "AMQP_URL: " in said
    assert "refuses this user and password" in said
    assert seconds < AT_ONCE_SEC


async def test_a_wrong_virtual_host_is_told_at_once(capsys: pytest.CaptureFixture[str], amqp_url: str) -> None:
    said, seconds = await refusal(capsys, amqp_url=f"{amqp_url.rsplit('/', 1)[0]}/no-such-vhost")
    assert "AMQP_URL: " in said
    assert "refuses the virtual host '/no-such-vhost'" in said
    assert seconds < AT_ONCE_SEC


async def test_a_wrong_database_or_user_is_told_at_once(
    capsys: pytest.CaptureFixture[str], amqp_url: str, database_url: str
) -> None:
    server, _, _ = database_url.rpartition("/")
    parts = urlsplit(database_url)
    stranger = f"postgresql://no_such_user:hunter2@{parts.netloc.rpartition('@')[2]}{parts.path}"
    for url in (f"{server}/no_such_database", stranger):
        said, seconds = await refusal(capsys, amqp_url=amqp_url, database_url=url)
        assert "DATABASE_URL: " in said
        assert "no_such" in said
        assert seconds < AT_ONCE_SEC


async def test_a_database_without_tables_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str], amqp_url: str, database_url: str
) -> None:
    said, _ = await refusal(capsys, amqp_url=amqp_url, database_url=f"{database_url.rpartition('/')[0]}/postgres")
    assert "python -m sandbox_broker.migrate" in said


@pytest.mark.parametrize("place", ["no-such-host.invalid", "127.0.0.1:1"])
async def test_a_host_that_is_not_there_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_SEC", 0.5)
    said, seconds = await refusal(
        capsys, amqp_url=f"amqp://anna:hunter2@{place}/", database_url=f"postgresql://anna:hunter2@{place}/x"
    )
    assert said.startswith("cannot start: AMQP_URL: ")
    assert "DATABASE_URL: " in said
    assert seconds < GIVES_UP_SEC


async def test_another_server_than_rabbitmq_is_told(
    capsys: pytest.CaptureFixture[str], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_SEC", 1.0)
    parts = urlsplit(database_url)
    said, seconds = await refusal(capsys, amqp_url=f"amqp://anna:hunter2@{parts.hostname}:{parts.port or 5432}/")
    assert "AMQP_URL: no RabbitMQ answers" in said
    assert seconds < GIVES_UP_SEC
