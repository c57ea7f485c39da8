"""`brokerctl status` with each part of the broker down, and with all: it answers, and says which."""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from brokerctl.attention import STATUS_TIMEOUT_SEC
from devstack.postgres import PrivatePostgres
from devstack.processes import Process
from devstack.rabbitmq import PrivateRabbitMQ
from gateway.queries.status import PROBE_TIMEOUT_SEC
from tests.integration.ctl import Said, ctl, eventually_said
from tests.integration.stack import Stack, eventually, running

SERVICES = {"allocator": "allocator", "reaper": "reaper", "csp_syncer": "csp-syncer"}
"""The module, and the name."""


@dataclass
class Broker:
    stack: Stack
    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ

    def process(self, part: str) -> Process:
        found = {"postgres": self.postgres.process, "rabbitmq": self.rabbitmq.process}.get(part)
        return found or self.stack.processes[part]

    async def frozen_with(self, part: str) -> list[int]:
        """The process, and what it has started to answer in its place."""
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
async def whole() -> AsyncIterator[Broker]:
    async with (
        PrivatePostgres() as postgres,
        PrivateRabbitMQ() as rabbitmq,
        running(postgres.url, rabbitmq.url, settings={"CIRCUIT_BREAKER_THRESHOLD": "1000"}) as stack,
    ):
        await rabbitmq.settle()
        yield Broker(stack, postgres, rabbitmq)


@pytest.fixture
async def broker(whole: Broker) -> Broker:
    """All of it up, with 20 sandboxes."""
    await whole.stack.fill(20)
    await seen(whole, well)
    return whole


async def seen(broker: Broker, condition: Callable[[Said], object]) -> Said:
    return await eventually_said(broker.stack, condition, "--json", "--within", "60")


def well(said: Said) -> bool:
    return said.status == 0


def named(said: Said) -> set[str]:
    """The parts that need attention."""
    return {entry["part"] for entry in said.json["attention"]}


def states(found: dict[str, Any]) -> dict[str, str]:
    return {entry["service"]: entry["state"] for entry in found["services"]}


async def start_again(broker: Broker, part: str) -> None:
    if part == "postgres":
        await broker.postgres.start()
    elif part == "rabbitmq":
        await broker.rabbitmq.start()
    elif part == "simulator":
        await broker.stack.start_simulator()
    else:
        await broker.stack.start_service(part)


@asynccontextmanager
async def without(broker: Broker, *parts: str) -> AsyncIterator[None]:
    for part in parts:
        process = broker.process(part)
        process.kill()
        await process.wait()
    try:
        yield
    finally:
        for part in parts:
            await start_again(broker, part)


@asynccontextmanager
async def freezing(broker: Broker, part: str) -> AsyncIterator[None]:
    pids = await broker.frozen_with(part)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_the_deadlines_fit_into_a_second() -> None:
    assert PROBE_TIMEOUT_SEC < STATUS_TIMEOUT_SEC < 1


@pytest.mark.parametrize("module", SERVICES)
async def test_a_service_that_is_down_is_named(broker: Broker, module: str) -> None:
    name = SERVICES[module]
    async with without(broker, module):
        one_down = {other: "down" if other == name else "up" for other in SERVICES.values()}
        said = await seen(broker, lambda said: states(said.json) == one_down and said.json["pool"])
        assert (said.status, said.json["pool"]["available"]) == (4, 20)
        assert name in named(said)
        await eventually_said(broker.stack, lambda said: f"{name} down" in said.out)
    await seen(broker, well)


async def test_rabbitmq_that_is_down_is_named(broker: Broker) -> None:
    async with without(broker, "rabbitmq"):
        said = await seen(broker, lambda said: "RabbitMQ" in named(said) and said.json["pool"])
        assert (said.status, said.json["pool"]["available"]) == (4, 20)
        assert set(states(said.json).values()) == {"unknown"}
    await seen(broker, well)


async def test_postgresql_that_is_down_is_named(broker: Broker) -> None:
    async with without(broker, "postgres"):
        said = await seen(
            broker, lambda said: "PostgreSQL" in named(said) and said.json["rabbitmq"]["state"] == "up"
        )
        assert (said.status, said.json["pool"]) == (4, None)
        await eventually_said(broker.stack, lambda said: "PostgreSQL down" in said.out)
    await seen(broker, well)


async def test_a_gateway_that_is_down_is_named(broker: Broker) -> None:
    async with without(broker, "gateway"):
        said = await ctl(broker.stack, "status", "--json")
        assert (said.status, named(said)) == (4, {"gateway"})
        shown = (await ctl(broker.stack, "status")).out
        assert "gateway down" in shown
        assert broker.stack.url in shown
    await seen(broker, well)


async def test_csp_that_is_down_is_named_once_something_was_asked_of_it(broker: Broker) -> None:
    lease = (await broker.stack.allocate("ada")).json()
    async with without(broker, "simulator"):
        await broker.stack.release(lease["sandbox_id"], "ada")
        said = await seen(broker, lambda said: "CSP" in named(said))
        assert said.status == 4
        assert said.json["csp"]["failing"] == 1
        await eventually_said(broker.stack, lambda said: "pending deletions have failed" in said.out)
    await eventually(broker.stack.nothing_pending)
    await seen(broker, well)


async def test_with_all_of_it_down_it_answers(broker: Broker) -> None:
    async with without(broker, "simulator", "postgres", "rabbitmq", "allocator", "reaper", "csp_syncer", "gateway"):
        said = await ctl(broker.stack, "status")
        assert said.status == 4
        assert "gateway down" in said.out
        assert "cannot be seen from here" in said.out


async def test_with_all_but_the_gateway_down_it_names_both_servers(broker: Broker) -> None:
    async with without(broker, "postgres", "rabbitmq", "allocator", "reaper", "csp_syncer"):
        said = await seen(broker, lambda said: {"RabbitMQ", "PostgreSQL"} <= named(said))
        assert said.status == 4
    await seen(broker, well)


async def test_a_gateway_that_hangs_is_not_waited_for(broker: Broker) -> None:
    async with freezing(broker, "gateway"):
        said = await ctl(broker.stack, "status", "--json")
        assert (said.status, named(said)) == (4, {"gateway"})
        assert f"no answer in {STATUS_TIMEOUT_SEC:g} s" in said.json["gateway"]["problem"]
    await seen(broker, well)


@pytest.mark.parametrize(("part", "name"), [("rabbitmq", "RabbitMQ"), ("postgres", "PostgreSQL")])
async def test_a_part_that_hangs_is_not_waited_for_and_named(broker: Broker, part: str, name: str) -> None:
    async with freezing(broker, part):
        said = await seen(broker, lambda said: name in named(said))
        assert said.status == 4
    await seen(broker, well)
