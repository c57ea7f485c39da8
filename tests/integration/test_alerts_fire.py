"""Each alert fires when what it tells of is really caused, and stops when that is over.

The rules are those of deploy/prometheus, in a hurry: their windows and waiting times are those of seconds, not of
minutes.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import pytest
import yaml

from devstack import prometheus
from devstack.errors import CannotRun
from devstack.infrastructure import Found
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.prometheus import Prometheus
from devstack.testing import NewDatabase, NewVhost
from tests.chaos.proxy import Proxy
from tests.integration.stack import PORTS, Stack, eventually, running
from tests.integration.watched import ALERTS

WINDOW = "10s"
HURRIED = {
    "BrokerCommandsWait": ("> 60", "> 3"),
    "BrokerEventsWait": ("> 60", "> 3"),
    "BrokerDeletionsStuck": ("> 5400", "> 3"),
    "BrokerSyncLate": ("> 1800", "> 10"),
}
"""Where an expression itself says how many seconds are too many."""
SETTINGS = {
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "1",
    "DELETION_BACKOFF_BASE_SEC": "0.2",
    "DELETION_BACKOFF_MAX_SEC": "2",
    "DELETION_MAX_ATTEMPTS": "1000",
    "INVARIANT_CHECK_SEC": "0.5",
    "SYNC_INTERVAL_SEC": "2",
}
PATIENCE_SEC = 120
SCRAPED_SEC = 1
"""So often everything is scraped and every rule is evaluated."""

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
async def links(servers: tuple[Found, Found]) -> AsyncIterator[dict[str, Proxy]]:
    """To PostgreSQL and RabbitMQ, to be cut."""
    database, rabbitmq = (urlsplit(found.url) for found in servers)
    async with Proxy(database.port or 5432) as to_database, Proxy(rabbitmq.port or 5672) as to_rabbitmq:
        yield {"postgresql": to_database, "rabbitmq": to_rabbitmq}


@pytest.fixture(scope="module")
async def broker(new_database: NewDatabase, new_vhost: NewVhost, links: dict[str, Proxy]) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(
            through(links["postgresql"], database_url), through(links["rabbitmq"], amqp_url), settings=SETTINGS
        ) as stack,
    ):
        yield stack


def through(link: Proxy, url: str) -> str:
    parts = urlsplit(url)
    account = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{account}@127.0.0.1:{link.port}").geturl()


@pytest.fixture(scope="module")
async def watch(broker: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    ports = {name: int(broker.environment[variable]) for name, variable in PORTS.items()}
    rules = directory / "rules.yml"
    rules.write_text(in_a_hurry(ALERTS))
    try:
        async with prometheus.watching(
            ports, directory, free_port(), Terminal(), rules=rules, interval_sec=SCRAPED_SEC
        ) as running:
            yield running
    except CannotRun as reason:
        pytest.fail(f"this test needs Prometheus: {reason}")


def in_a_hurry(file: Path) -> str:
    rules: dict[str, Any] = yaml.safe_load(file.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            expression = re.sub(r"\[\d+m\]", f"[{WINDOW}]", rule["expr"])
            if rule["alert"] in HURRIED:
                slow, fast = HURRIED[rule["alert"]]
                assert slow in expression
                expression = expression.replace(slow, fast)
            rule |= {"expr": expression, "for": "1s"}
    return yaml.safe_dump(rules)


@pytest.fixture
async def stack(broker: Stack, watch: Prometheus) -> Stack:
    """All is well, and no alert fires."""
    await broker.fill(30)

    async def quiet() -> bool:
        return not await watch.firing()

    await eventually(quiet, within_sec=PATIENCE_SEC, every_sec=SCRAPED_SEC)
    return broker


async def fires(
    watch: Prometheus, alert: str, doing: Callable[[], Awaitable[Any]] | None = None, **labels: str
) -> None:
    """Returns when it does; `doing` is done again and again meanwhile."""

    async def firing() -> bool:
        if doing is not None:
            await doing()
        return any(
            found["labels"].items() >= {"alertname": alert, **labels}.items() for found in await watch.firing()
        )

    try:
        await eventually(firing, within_sec=PATIENCE_SEC, every_sec=SCRAPED_SEC)
    except AssertionError:
        pytest.fail(f"{alert} did not fire; these did: {[found['labels'] for found in await watch.firing()]}")


async def stops(watch: Prometheus, alert: str, doing: Callable[[], Awaitable[Any]] | None = None) -> None:
    async def quiet() -> bool:
        if doing is not None:
            await doing()
        return alert not in [found["labels"]["alertname"] for found in await watch.firing()]

    try:
        await eventually(quiet, within_sec=PATIENCE_SEC, every_sec=SCRAPED_SEC)
    except AssertionError:
        pytest.fail(f"{alert} fires still")


async def come_and_go(stack: Stack, students: int) -> None:
    for number in range(students):
        lease = (await stack.allocate(f"student-{number}")).json()
        await stack.release(lease["sandbox_id"], f"student-{number}")


async def behave(stack: Stack, **behaviour: Any) -> None:
    await stack.control("PATCH", "behaviour", behaviour)


async def ask_with(stack: Stack, token: str) -> None:
    """A class of students."""
    headers = {"Authorization": f"Bearer {token}", "X-Instruqt-Sandbox-ID": "ada"}
    for _ in range(30):
        await stack.client.post(f"{stack.url}/v1/allocate", headers=headers)


async def test_no_allocator(stack: Stack, watch: Prometheus) -> None:
    await stack.processes["allocator"].stop()

    async def ask() -> None:
        await stack.allocate("ada")

    await fires(watch, "BrokerAllocationsFail", ask)
    await fires(watch, "BrokerNoConsumer", queue="allocator.commands")
    await fires(watch, "BrokerCommandsWait", queue="allocator.maintenance")
    await fires(watch, "BrokerNotScraped", service="allocator")
    await fires(watch, "BrokerInstanceDown")
    await stack.start_service("allocator")
    for alert in (
        "BrokerAllocationsFail",
        "BrokerNoConsumer",
        "BrokerCommandsWait",
        "BrokerNotScraped",
        "BrokerInstanceDown",
    ):
        await stops(watch, alert, ask)


async def test_an_allocator_that_stops_and_goes(stack: Stack, watch: Prometheus) -> None:
    allocator = stack.processes["allocator"]

    async def make_somebody_wait() -> None:
        allocator.send(signal.SIGSTOP)
        waiting = asyncio.create_task(stack.allocate("ada"))
        await asyncio.sleep(0.7)  # nothing but time makes an answer slow
        allocator.send(signal.SIGCONT)
        await waiting

    async def ask() -> None:
        await stack.allocate("ada")

    await fires(watch, "BrokerAllocationsSlow", make_somebody_wait)
    await stops(watch, "BrokerAllocationsSlow", ask)


async def test_a_class_that_is_larger_than_the_pool(stack: Stack, watch: Prometheus) -> None:
    for number in range(30):
        await stack.allocate(f"student-{number}")
    await fires(watch, "BrokerPoolRunsDry")
    await fires(watch, "BrokerPoolExhausted", lambda: stack.allocate("late"))
    await stack.control("POST", "accounts", {"count": 3000})
    await stops(watch, "BrokerPoolExhausted")
    await stops(watch, "BrokerPoolRunsDry")


async def test_a_token_that_was_taken_back(stack: Stack, watch: Prometheus) -> None:
    await fires(watch, "BrokerTokensRefused", lambda: ask_with(stack, "taken-back"), reason="unknown")
    await stops(watch, "BrokerTokensRefused")


async def test_counters_that_are_wrong(stack: Stack, watch: Prometheus) -> None:
    change = "INSERT INTO pool_changes (status, stem, number) VALUES ('stale', 'nobody-', $1)"
    await stack.database.execute(change, 1)
    await fires(watch, "BrokerInvariantBroken", rule="counters_are_exact")
    await stack.database.execute(change, -1)
    await stops(watch, "BrokerInvariantBroken")


async def test_no_postgresql(stack: Stack, watch: Prometheus, links: dict[str, Proxy]) -> None:
    links["postgresql"].reset()
    await fires(watch, "BrokerInvariantsNotChecked")
    links["postgresql"].heal()
    await stops(watch, "BrokerInvariantsNotChecked")


async def test_no_rabbitmq(stack: Stack, watch: Prometheus, links: dict[str, Proxy]) -> None:
    links["rabbitmq"].reset()
    await fires(watch, "BrokerRabbitmqAway")
    links["rabbitmq"].heal()
    await stops(watch, "BrokerRabbitmqAway")


async def test_events_that_cannot_be_moved_to_the_history(stack: Stack, watch: Prometheus) -> None:
    connection = await asyncpg.connect(stack.environment["DATABASE_URL"])
    async with connection.transaction():
        await connection.execute("LOCK TABLE history IN ACCESS EXCLUSIVE MODE")
        await stack.allocate("ada")
        await fires(watch, "BrokerEventsWait")
    await connection.close()
    await stops(watch, "BrokerEventsWait")


async def test_a_message_that_nobody_can_read(stack: Stack, watch: Prometheus) -> None:
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(b"no envelope"), "allocator.maintenance")
        await fires(watch, "BrokerDeadLetters")
        await stops(watch, "BrokerDeadLetters", lambda: forget_dead_letters(stack, channel))


async def forget_dead_letters(stack: Stack, channel: aio_pika.abc.AbstractChannel) -> None:
    """Those in the queue, and those that an allocator has collected."""
    await (await channel.get_queue("broker.dead_letters")).purge()
    for letter in (await stack.admin("GET", "dead-letters")).json().get("dead_letters", []):
        await stack.admin("DELETE", f"dead-letters/{letter['dead_letter_id']}")


async def test_a_csp_token_that_was_taken_back(stack: Stack, watch: Prometheus) -> None:
    await behave(stack, reject_tokens=True)
    await come_and_go(stack, 1)
    await fires(watch, "BrokerCspRefusesToken")
    assert "BrokerCspCircuitOpen" not in [found["labels"]["alertname"] for found in await watch.firing()]
    await behave(stack, reject_tokens=False)
    await stops(watch, "BrokerCspRefusesToken")


async def test_a_csp_that_keeps_failing(stack: Stack, watch: Prometheus) -> None:
    await behave(stack, delete_error_rate=1.0)
    await come_and_go(stack, 10)
    await fires(watch, "BrokerCspCircuitOpen")
    await fires(watch, "BrokerDeletionsStuck")
    await behave(stack, delete_error_rate=0.0)
    await stops(watch, "BrokerDeletionsStuck")
    await stops(watch, "BrokerCspCircuitOpen")


async def restart_reaper(stack: Stack, **settings: str) -> None:
    await stack.processes["reaper"].stop()
    await stack.start_service("reaper", settings=settings)


async def test_a_deletion_that_csp_refuses_for_good(stack: Stack, watch: Prometheus) -> None:
    await restart_reaper(stack, DELETION_MAX_ATTEMPTS="1")
    await behave(stack, fail_next_deletes=1)
    await come_and_go(stack, 1)
    await fires(watch, "BrokerDeletionsFailed")
    await restart_reaper(stack)
    [failed] = (await stack.admin("GET", "sandboxes", status="deletion_failed")).json()["sandboxes"]
    await stack.admin("POST", f"sandboxes/{failed['sandbox_id']}/retry-deletion")
    await stops(watch, "BrokerDeletionsFailed")


async def test_a_listing_that_lacks_most_of_the_pool(stack: Stack, watch: Prometheus) -> None:
    await behave(stack, listing_fraction=0.2)
    await fires(watch, "BrokerSyncHeld")
    await behave(stack, listing_fraction=1.0)
    await stops(watch, "BrokerSyncHeld")


async def test_a_csp_that_cannot_be_listed(stack: Stack, watch: Prometheus) -> None:
    await behave(stack, listing_error_rate=1.0)
    await fires(watch, "BrokerSyncLate")
    await behave(stack, listing_error_rate=0.0)
    await stops(watch, "BrokerSyncLate")


async def test_an_account_that_somebody_has_deleted_in_csp(stack: Stack, watch: Prometheus) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.control("DELETE", f"accounts/{lease['external_id']}")
    await fires(watch, "BrokerLeaks", kind="missing")
    await stack.release(lease["sandbox_id"], "ada")
    await stops(watch, "BrokerLeaks")
