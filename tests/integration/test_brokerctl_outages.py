"""`brokerctl status` during an outage of each component, and of all: it names the failed components.

The last tests run it behind HAProxy, with the configuration for several gateways of docs/deployment.md.
"""

import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import pytest

from brokerctl.attention import STATUS_TIMEOUT_SEC
from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.postgres import PrivatePostgres
from devstack.processes import Process
from devstack.rabbitmq import PrivateRabbitMQ
from gateway.queries.status import PROBE_TIMEOUT_SEC
from tests.integration.ctl import CommandResult, run_brokerctl, wait_for_status
from tests.integration.reverse_proxies import replace_once, run_haproxy_with
from tests.integration.stack import ROOT, Stack, run_stack, track_headers

SERVICES = {
    "allocator": "allocator",
    "reaper": "reaper",
    "csp_syncer": "csp-syncer",
    "provisioner": "provisioner",
}
"""Module -> name in the status."""


@dataclass
class Broker:
    stack: Stack
    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ

    def process(self, part: str) -> Process:
        server = {"postgres": self.postgres.process, "rabbitmq": self.rabbitmq.process}.get(part)
        return server or self.stack.processes[part]

    async def process_ids(self, part: str) -> list[int]:
        """Return the id of the process. For PostgreSQL, add its backends, which serve the connections."""
        pids = [self.process(part).pid]
        if part == "postgres":
            connection = await asyncpg.connect(self.postgres.url)
            pids += [
                row["pid"]
                for row in await connection.fetch(
                    "SELECT pid FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
            ]
            await connection.close()
        return pids


@pytest.fixture(scope="module")
async def running_broker(server_programs: None) -> AsyncIterator[Broker]:
    async with (
        PrivatePostgres() as postgres,
        PrivateRabbitMQ() as rabbitmq,
        run_stack(postgres.url, rabbitmq.url, settings={"CIRCUIT_BREAKER_THRESHOLD": "1000"}) as stack,
    ):
        await rabbitmq.sync_queue_metadata()
        yield Broker(stack, postgres, rabbitmq)


@pytest.fixture
async def broker(running_broker: Broker) -> Broker:
    """Healthy broker with 20 sandboxes."""
    await running_broker.stack.fill(20)
    await wait_for_result(running_broker, is_healthy)
    return running_broker


async def wait_for_result(broker: Broker, condition: Callable[[CommandResult], object]) -> CommandResult:
    with broker.rabbitmq.log_in_errors():
        return await wait_for_status(broker.stack, condition, "--json", "--within", "60")


def is_healthy(result: CommandResult) -> bool:
    return result.status == 0


def failed_components(result: CommandResult) -> set[str]:
    """Return the components that need attention."""
    return {entry["part"] for entry in result.json["attention"]}


def service_states(status: dict[str, Any]) -> dict[str, str]:
    return {entry["service"]: entry["state"] for entry in status["services"]}


async def restart(broker: Broker, part: str) -> None:
    if part == "postgres":
        await broker.postgres.start()
    elif part == "rabbitmq":
        await broker.rabbitmq.start()
    elif part == "simulator":
        await broker.stack.start_simulator()
    else:
        await broker.stack.start_service(part)


@asynccontextmanager
async def component_stopped(broker: Broker, *parts: str) -> AsyncIterator[None]:
    for part in parts:
        if part == "rabbitmq":
            await broker.rabbitmq.sync_queue_metadata()
        process = broker.process(part)
        process.kill()
        await process.wait()
    try:
        yield
    finally:
        for part in parts:
            await restart(broker, part)


@asynccontextmanager
async def component_frozen(broker: Broker, part: str) -> AsyncIterator[None]:
    pids = await broker.process_ids(part)
    try:
        for pid in pids:
            with suppress(ProcessLookupError):  # a backend of PostgreSQL that has ended since
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_the_timeouts_are_nested_within_a_second() -> None:
    assert PROBE_TIMEOUT_SEC < STATUS_TIMEOUT_SEC < 1


@pytest.mark.parametrize("module", SERVICES)
async def test_a_service_outage_is_reported(broker: Broker, module: str) -> None:
    name = SERVICES[module]
    async with component_stopped(broker, module):
        one_down = {other: "down" if other == name else "up" for other in SERVICES.values()}
        result = await wait_for_result(
            broker, lambda result: service_states(result.json) == one_down and result.json["pool"]
        )
        assert (result.status, result.json["pool"]["available"]) == (4, 20)
        assert name in failed_components(result)
        await wait_for_status(broker.stack, lambda result: f"{name} down" in result.out)
    await wait_for_result(broker, is_healthy)


async def test_a_rabbitmq_outage_is_reported(broker: Broker) -> None:
    async with component_stopped(broker, "rabbitmq"):
        result = await wait_for_result(
            broker, lambda result: "RabbitMQ" in failed_components(result) and result.json["pool"]
        )
        assert (result.status, result.json["pool"]["available"]) == (4, 20)
        assert set(service_states(result.json).values()) == {"unknown"}
    await wait_for_result(broker, is_healthy)


async def test_a_postgresql_outage_is_reported(broker: Broker) -> None:
    async with component_stopped(broker, "postgres"):
        result = await wait_for_result(
            broker,
            lambda result: "PostgreSQL" in failed_components(result) and result.json["rabbitmq"]["state"] == "up",
        )
        assert (result.status, result.json["pool"]) == (4, None)
        await wait_for_status(broker.stack, lambda result: "PostgreSQL down" in result.out)
    await wait_for_result(broker, is_healthy)


async def test_a_gateway_outage_is_reported(broker: Broker) -> None:
    async with component_stopped(broker, "gateway"):
        result = await run_brokerctl(broker.stack, "status", "--json")
        assert (result.status, failed_components(result)) == (4, {"gateway"})
        shown = (await run_brokerctl(broker.stack, "status")).out
        assert "gateway down" in shown
        assert broker.stack.url in shown
    await wait_for_result(broker, is_healthy)


async def test_a_csp_outage_is_reported_after_a_failed_request(broker: Broker) -> None:
    lease = (await broker.stack.allocate("ada")).json()
    async with component_stopped(broker, "simulator"):
        await broker.stack.release(lease["sandbox_id"], "ada")
        result = await wait_for_result(broker, lambda result: "CSP" in failed_components(result))
        assert result.status == 4
        assert result.json["csp"]["failing"] == 1
        await wait_for_status(broker.stack, lambda result: "pending deletion has failed" in result.out)
    await wait_until(broker.stack.nothing_pending)
    await wait_for_result(broker, is_healthy)


async def test_an_outage_of_all_components_is_reported(broker: Broker) -> None:
    async with component_stopped(
        broker, "simulator", "postgres", "rabbitmq", "allocator", "reaper", "csp_syncer", "provisioner", "gateway"
    ):
        result = await run_brokerctl(broker.stack, "status")
        assert result.status == 4
        assert "gateway down" in result.out
        assert "cannot be seen from here" in result.out


async def test_an_outage_of_all_components_behind_the_gateway_is_reported(broker: Broker) -> None:
    async with component_stopped(
        broker, "postgres", "rabbitmq", "allocator", "reaper", "csp_syncer", "provisioner"
    ):
        result = await wait_for_result(
            broker, lambda result: {"RabbitMQ", "PostgreSQL"} <= failed_components(result)
        )
        assert result.status == 4
    await wait_for_result(broker, is_healthy)


async def test_a_hanging_gateway_is_reported_after_the_timeout(broker: Broker) -> None:
    async with component_frozen(broker, "gateway"):
        result = await run_brokerctl(broker.stack, "status", "--json")
        assert (result.status, failed_components(result)) == (4, {"gateway"})
        assert f"no answer in {STATUS_TIMEOUT_SEC:g} s" in result.json["gateway"]["problem"]
    await wait_for_result(broker, is_healthy)


@pytest.mark.parametrize(("part", "name"), [("rabbitmq", "RabbitMQ"), ("postgres", "PostgreSQL")])
async def test_a_hanging_server_is_reported_after_the_timeout(broker: Broker, part: str, name: str) -> None:
    async with component_frozen(broker, part):
        result = await wait_for_result(broker, lambda result: name in failed_components(result))
        assert result.status == 4
    await wait_for_result(broker, is_healthy)


def build_configuration(port: int, gateways: list[str]) -> str:
    """Return deploy/haproxy/haproxy.cfg with the lines of docs/deployment.md, and the addresses of this test."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    lines: str
    (lines,) = re.findall(r"^```\n( {4}use_backend admin .*?)^```$", page, re.M | re.S)
    configuration = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    before, _ = configuration.split("    default_backend gateway\n")
    for number, gateway in enumerate(gateways, 1):
        lines = re.sub(rf"10\.0\.0\.1{number}:8080 check port 9100", f"{gateway} check", lines)
    assert "10.0.0" not in lines
    changes = {
        "bind :443 ssl crt /etc/haproxy/broker.pem alpn h2,http/1.1": f"bind 127.0.0.1:{port}",
        "acl operator src 10.0.0.0/8": "acl operator src 127.0.0.1",
        **({} if os.geteuid() == 0 else {"    user haproxy\n    group haproxy\n": ""}),
    }
    return replace_once(before, changes) + lines


@pytest.fixture(scope="module")
async def balancer_url(running_broker: Broker) -> AsyncIterator[str]:
    """URL of HAProxy in front of two gateways."""
    port = free_port()
    stack = running_broker.stack
    second = await stack.start_service("gateway", name="second gateway", settings={"GATEWAY_PORT": str(port)})
    addresses = [stack.url.removeprefix("http://"), f"127.0.0.1:{port}"]
    async with run_haproxy_with(lambda own_port: build_configuration(own_port, addresses)) as own_port:
        yield f"http://127.0.0.1:{own_port}"
    await second.stop()


@pytest.mark.parametrize(("part", "name"), [("rabbitmq", "RabbitMQ"), ("postgres", "PostgreSQL")])
async def test_status_behind_a_load_balancer_names_the_server_that_is_down(
    broker: Broker, balancer_url: str, part: str, name: str
) -> None:
    async def allocate() -> httpx.Response:
        async with httpx.AsyncClient(base_url=balancer_url, trust_env=False, timeout=30) as client:
            return await client.post("/v1/allocate", headers=track_headers("ada"))

    async def is_served() -> bool:
        return (await allocate()).status_code in (200, 201)

    async def no_gateway_is_ready() -> bool:
        response = await allocate()
        return response.status_code == 503 and "json" not in response.headers.get("Content-Type", "")

    async def is_named() -> bool:
        result = await run_brokerctl(broker.stack, "status", "--json", "--within", "60", url=balancer_url)
        return result.status == 4 and name in failed_components(result)

    await wait_until(is_served)
    async with component_stopped(broker, part):
        await wait_until(no_gateway_is_ready)
        await wait_until(is_named)
    await wait_until(is_served)
    await wait_for_result(broker, is_healthy)
