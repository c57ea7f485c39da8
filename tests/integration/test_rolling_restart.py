"""Rolling restart of the gateways under load: no request fails, without any retries."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from devstack import haproxy
from devstack.conditions import wait_until
from devstack.errors import CannotRun
from devstack.haproxy import Proxy
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.testing import NewDatabase, NewVhost
from devstack.wire import connected
from tests.integration.stack import Stack, run_stack, track_headers

GATEWAYS = ("gateway-1", "gateway-2")
CONNECTIONS = 100
PERIODS = 1 + 2 * len(GATEWAYS)
"""One period before the restarts, and two per gateway: during its stop and after its return."""
PAUSE_SEC = 2.0
DRAIN_SEC = 10
"""Time for HAProxy, which polls every 100 ms, to notice the stop on a busy machine."""


@pytest.fixture
def ports() -> dict[str, int]:
    return {name: free_port() for name in GATEWAYS}


@pytest.fixture
async def stack(new_database: NewDatabase, new_vhost: NewVhost, ports: dict[str, int]) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings={"ALLOCATE_TIMEOUT_SEC": "60"}) as stack,
    ):
        for name in GATEWAYS:
            await start_gateway(stack, name, ports)
        yield stack
        for name in GATEWAYS:
            await stack.processes[name].stop(with_signal=signal.SIGINT)


@pytest.fixture
async def proxy(stack: Stack, ports: dict[str, int]) -> AsyncIterator[Proxy]:
    try:
        async with haproxy.start_haproxy(ports, Terminal()) as proxy:
            yield proxy
    except CannotRun as reason:
        pytest.fail(f"this test needs HAProxy: {reason}")


async def start_gateway(stack: Stack, name: str, ports: dict[str, int]) -> None:
    settings = {"GATEWAY_PORT": str(ports[name]), "DRAIN_SEC": str(DRAIN_SEC)}
    await stack.start_service("gateway", name=name, settings=settings)


class Clients:
    """CONNECTIONS clients that allocate a sandbox again and again, as a new student in each period."""

    def __init__(self, url: str) -> None:
        self.period = 0
        self.stopped = False
        self.leases: dict[str, str] = {}
        self.served: Counter[tuple[int, int]] = Counter()
        """Number of responses by connection and period."""
        self.failures: list[str] = []
        self._url = url

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(self._run_client(number))

    async def _run_client(self, number: int) -> None:
        async with connected(self._url) as client:
            while not self.stopped:
                await asyncio.sleep(random.uniform(0, 2 * PAUSE_SEC))
                period = self.period
                student = f"student-{number}-{period}"
                headers = "".join(f"{name}: {value}\r\n" for name, value in track_headers(student).items())
                try:
                    await client.send(f"POST /v1/allocate HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
                    status, body = await client.response()
                except (
                    OSError,
                    asyncio.IncompleteReadError,
                    ValueError,
                ) as error:  # ValueError: a response of the proxy
                    self.failures.append(f"{student}: {error!r}")
                    return
                if status not in (200, 201):
                    self.failures.append(f"{student}: {status} {body}")
                elif self.leases.setdefault(student, body["sandbox_id"]) != body["sandbox_id"]:
                    self.failures.append(f"{student} has two sandboxes")
                self.served[number, period] += 1

    async def are_all_served(self) -> bool:
        assert self.failures == []
        return all(self.served[number, self.period] for number in range(CONNECTIONS))


@pytest.mark.timeout(400)
async def test_no_request_fails_during_a_rolling_restart(stack: Stack, proxy: Proxy, ports: dict[str, int]) -> None:
    await stack.fill(PERIODS * CONNECTIONS)
    clients = Clients(proxy.url)
    running = asyncio.create_task(clients.run())
    try:
        await wait_until(clients.are_all_served)
        for name in GATEWAYS:

            async def is_available(name: str = name) -> bool:
                return await proxy.is_up(name)

            clients.period += 1
            stack.processes[name].send(signal.SIGTERM)
            assert await stack.processes[name].wait() == 0
            await wait_until(clients.are_all_served)
            clients.period += 1
            await start_gateway(stack, name, ports)
            await wait_until(is_available)
            await wait_until(clients.are_all_served)
    finally:
        clients.stopped = True
        await running

    assert clients.failures == []
    rows = await stack.database.fetch("SELECT holder, sandbox_id FROM leases WHERE ended_at IS NULL")
    assert {row["holder"]: row["sandbox_id"] for row in rows} == clients.leases
    await stack.assert_sound()
    states = await proxy.read_server_states()
    assert all(int(states[name]["stot"]) > CONNECTIONS for name in GATEWAYS)
    assert [(states[name]["wretr"], states[name]["wredis"]) for name in GATEWAYS] == [("0", "0")] * len(GATEWAYS)
