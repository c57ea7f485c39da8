"""AMQP_URL and DATABASE_URL with several servers, of which some do not answer."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from aiormq.exceptions import AMQPError
from sqlalchemy import text

from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.testing import NewVhost
from sandbox_broker.contract import topology
from sandbox_broker.database import connections, primary
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging import connection
from sandbox_broker.messaging import publisher as publisher_module
from sandbox_broker.messaging.connection import Disconnected, open_connection
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.runtime import preflight

from .shared_harness import (
    TcpProxy,
    assert_no_leaks,
    background_tasks,
    open_silent_port,
    open_tcp_proxy,
)

AT_ONCE_SEC = 8.0
"""More than the time limits of all servers in a list, and less than the time-outs of TCP."""
ROUNDS = 5
"""Each round tries the nodes in another random order."""


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
def silent_port() -> Iterator[int]:
    with open_silent_port() as port:
        yield port


@pytest.fixture
async def proxies(clean_queues: str) -> AsyncIterator[list[TcpProxy]]:
    async with open_tcp_proxy(clean_queues, 5672) as first, open_tcp_proxy(clean_queues, 5672) as second:
        yield [first, second]


def at(url: str, *ports: int) -> str:
    """Return an AMQP_URL with the same node at several ports of this machine, or a DATABASE_URL likewise."""
    parts = urlsplit(url)
    user, sign, _ = parts.netloc.rpartition("@")
    if parts.scheme == "amqp":
        return ",".join(parts._replace(netloc=f"{user}{sign}127.0.0.1:{port}").geturl() for port in ports)
    return parts._replace(netloc=f"{user}{sign}{','.join(f'127.0.0.1:{port}' for port in ports)}").geturl()


def port_of(url: str) -> int:
    return urlsplit(url).port or {"amqp": 5672}.get(urlsplit(url).scheme, 5432)


@pytest.mark.parametrize("order", [1, -1])
async def test_a_silent_and_a_closed_node_delay_a_connection_briefly(
    clean_queues: str, silent_port: int, order: int
) -> None:
    url = at(clean_queues, *(silent_port, free_port(), port_of(clean_queues))[::order])
    async with asyncio.timeout(AT_ONCE_SEC):
        async with open_connection(url):
            pass
    publisher = Publisher(url, "test")
    async with background_tasks(publisher.run()), asyncio.timeout(AT_ONCE_SEC):
        await publisher.wait_connected()


async def test_a_connection_moves_to_another_node(clean_queues: str, proxies: list[TcpProxy]) -> None:
    publisher = Publisher(",".join(proxy.url for proxy in proxies), "test")
    async with background_tasks(publisher.run()):
        for _ in range(ROUNDS):
            await asyncio.wait_for(publisher.wait_connected(), AT_ONCE_SEC)
            (used,) = [proxy for proxy in proxies if proxy.connected]
            used.pause()
            used.reset()
            await wait_until(lambda: not publisher.connected)
            await asyncio.wait_for(publisher.wait_connected(), AT_ONCE_SEC)
            assert not used.connected
            used.resume()


async def test_all_connections_move_to_the_node_that_confirms_messages(
    proxies: list[TcpProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a node of RabbitMQ 4 without a majority, which confirms no message and closes no connection."""
    monkeypatch.setattr(connection, "NEXT_NODE_SEC", 60)  # a slow node is not passed over
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_SEC", 1)
    monkeypatch.setattr(connection, "HEARTBEAT_SEC", 600)
    monkeypatch.setattr(publisher_module, "SILENT_SEC", 0.2)
    url = ",".join(proxy.url for proxy in proxies)
    nodes = connection._nodes_of(url)
    publisher = Publisher(url, "test")
    rpc_client = RpcClient(url, "test", publisher)

    async def is_confirmed() -> bool:
        try:
            await publisher.publish("", topology.SYNC_TICKS.name, b"{}")
        except Disconnected:
            return False
        return True

    async with background_tasks(publisher.run(), rpc_client.run()):
        await wait_until(lambda: rpc_client.connected)
        assert await is_confirmed()
        (used,) = set(nodes.connections.values())
        (silent,) = (proxy for proxy in proxies if proxy.url == used)
        silent.pause()
        await wait_until(is_confirmed)
        await wait_until(lambda: rpc_client.connected and used not in nodes.connections.values())
        assert len(nodes.connections) == 2
        silent.resume()


async def test_a_connection_to_another_node_follows_the_publisher(
    proxies: list[TcpProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "NEXT_NODE_SEC", 60)
    url = ",".join(proxy.url for proxy in proxies)
    nodes = connection._nodes_of(url)
    publisher = Publisher(url, "test")
    rpc_client = RpcClient(url, "test", publisher)
    async with background_tasks(rpc_client.run()):
        await wait_until(lambda: nodes.connections)
        (first,) = nodes.connections.values()
        nodes.try_last(first)
        async with background_tasks(publisher.run()):
            await wait_until(lambda: rpc_client.connected)
            assert len(set(nodes.connections.values())) == 2
            await publisher.publish("", topology.SYNC_TICKS.name, b"{}")
            await wait_until(lambda: rpc_client.connected and first not in nodes.connections.values())


async def test_connections_spread_over_the_nodes(proxies: list[TcpProxy]) -> None:
    url = ",".join(proxy.url for proxy in proxies)
    used = set()
    for _ in range(40):  # one in 2**39 runs uses one node only
        async with open_connection(url):
            used |= {proxy.url for proxy in proxies if proxy.connected}
        await wait_until(lambda: not any(proxy.connected for proxy in proxies))
    assert used == {proxy.url for proxy in proxies}


async def test_no_node_answers(clean_queues: str) -> None:
    url = at(clean_queues, free_port(), free_port())
    with pytest.raises(AMQPError):
        async with open_connection(url):
            pass
    with pytest.raises(Disconnected):
        await connection._connect_to_any(connection._Nodes(url), "test", timeout_sec=5)


async def test_a_refusal_takes_precedence_over_a_node_that_is_down(clean_queues: str) -> None:
    url = at(clean_queues.replace("guest:guest", "guest:wrong"), free_port(), port_of(clean_queues))
    for _ in range(ROUNDS):
        with pytest.raises(connection.REFUSALS):
            async with open_connection(url):
                pass


async def test_the_error_at_start_names_all_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    ports = free_port(), free_port()
    with pytest.raises(SystemExit):
        await asyncio.to_thread(
            preflight.check,
            amqp_url=at("amqp://anna:hunter2@127.0.0.1/", *ports),
            database_url=at("postgresql://anna:hunter2@127.0.0.1/x", *ports),
        )
    line = capsys.readouterr().err
    assert f"no RabbitMQ answers at 127.0.0.1:{ports[0]}, 127.0.0.1:{ports[1]} (" in line
    assert f"no PostgreSQL answers at 127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/x (" in line
    assert "hunter2" not in line


async def test_the_preflight_passes_with_one_server_of_three(
    clean_queues: str, database_url: str, silent_port: int
) -> None:
    async with asyncio.timeout(AT_ONCE_SEC):
        await asyncio.to_thread(
            preflight.check,
            amqp_url=at(clean_queues, silent_port, free_port(), port_of(clean_queues)),
            database_url=at(database_url, silent_port, free_port(), port_of(database_url)),
        )


async def test_declare_and_migrate_pass_with_one_server_of_three(
    new_vhost: NewVhost, empty_database_url: str, silent_port: int, tmp_path: Path
) -> None:
    async with new_vhost() as vhost:
        environ = {
            "PATH": os.environ["PATH"],
            "AMQP_URL": at(vhost, silent_port, free_port(), port_of(vhost)),
            "DATABASE_URL": at(empty_database_url, silent_port, free_port(), port_of(empty_database_url))
            + "?target_session_attrs=read-write",
        }
        for command in ("declare", "migrate"):
            ended = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", f"sandbox_broker.{command}"],
                env=environ,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (ended.returncode, ended.stderr) == (0, ""), command


@pytest.mark.parametrize("order", [1, -1])
async def test_a_silent_and_a_closed_server_delay_a_read_briefly(
    clean_database: str, silent_port: int, order: int
) -> None:
    url = at(clean_database, *(silent_port, free_port(), port_of(clean_database))[::order])
    engine = connections.create_engine(Primary(url), pool_size=1)
    async with asyncio.timeout(primary.HOST_TIMEOUT_SEC), engine.connect() as opened:
        assert (await opened.execute(text("SELECT 1"))).scalar_one() == 1
    await engine.dispose()


@pytest.mark.parametrize("attributes", ["", "?target_session_attrs=primary", "?target_session_attrs=read-write"])
async def test_only_read_write_refuses_a_read_only_server(clean_database: str, attributes: str) -> None:
    name = urlsplit(clean_database).path[1:]
    admin = await asyncpg.connect(clean_database)
    await admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        opening = connections.connect(
            Primary(clean_database + attributes), application_name="test", statement_timeout_sec=1
        )
        if attributes.endswith("read-write"):
            with pytest.raises(connections.CONNECTION_ERRORS, match=r"127\.0\.0\.1:\d+ is read-only"):
                await opening
        else:
            (await opening).terminate()
    finally:
        await admin.execute(
            f'SET default_transaction_read_only = off; ALTER DATABASE "{name}" RESET default_transaction_read_only'
        )
        await admin.close()
