"""Each alert fires while its cause is present, and stops afterwards.

The test causes real faults. It uses the rules of deploy/prometheus with windows and waiting times of seconds
instead of minutes.
"""

import asyncio
import itertools
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

from devstack.conditions import wait_until
from devstack.infrastructure import Server
from devstack.prometheus import Prometheus
from devstack.testing import NewDatabase, NewVhost
from sandbox_broker.contract.topology import NEWEST_LEASE
from tests.chaos.proxy import Proxy
from tests.integration.alert_watch import watch_alerts
from tests.integration.monitoring_files import ALERTS
from tests.integration.stack import Stack, run_stack

EVALUATION_INTERVAL_SEC = 0.25
SCRAPE_INTERVAL_SEC = 0.5
"""Also the time-out of a scrape, which a busy machine must not reach."""
WINDOW = "2s"
SHORTENED_THRESHOLDS = {
    "BrokerCommandsWait": ("> 60", "> 2"),
    "BrokerEventsWait": ("> 60", "> 2"),
    "BrokerDeletionsStuck": ("> 5400", "> 2"),
    "BrokerSyncLate": ("> 1800", "> 4"),
    "BrokerStudentsWait": ("> 600", "> 2"),
}
"""Replacements for thresholds in seconds within an expression: alert -> (original, shortened)."""
SETTINGS = {
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "1",
    "DELETION_BACKOFF_BASE_SEC": "0.2",
    "DELETION_BACKOFF_MAX_SEC": "2",
    "DELETION_MAX_ATTEMPTS": "1000",
    "INVARIANT_CHECK_SEC": "0.5",
    "SYNC_INTERVAL_SEC": "1",
    "SYNC_MAX_GROWTH_FRACTION": "1000",
}
LAUNCHER = str(Path(__file__).with_name("frequent_metrics.py"))
TIMEOUT_SEC = 120

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
async def proxies(servers: tuple[Server, Server]) -> AsyncIterator[dict[str, Proxy]]:
    """Proxies to PostgreSQL and RabbitMQ, to cut the connections."""
    database, rabbitmq = (urlsplit(found.url) for found in servers)
    async with Proxy(database.port or 5432) as to_database, Proxy(rabbitmq.port or 5672) as to_rabbitmq:
        yield {"postgresql": to_database, "rabbitmq": to_rabbitmq}


@pytest.fixture(scope="module")
async def broker(new_database: NewDatabase, new_vhost: NewVhost, proxies: dict[str, Proxy]) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(
            route_through(proxies["postgresql"], database_url),
            route_through(proxies["rabbitmq"], amqp_url),
            launcher=(LAUNCHER,),
            settings=SETTINGS,
        ) as stack,
    ):
        yield stack


def route_through(proxy: Proxy, url: str) -> str:
    parts = urlsplit(url)
    account = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{account}@127.0.0.1:{proxy.port}").geturl()


@pytest.fixture(scope="module")
async def watch(broker: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    async with watch_alerts(
        broker,
        directory,
        shorten_rules(ALERTS),
        scrape_interval_sec=SCRAPE_INTERVAL_SEC,
        evaluation_interval_sec=EVALUATION_INTERVAL_SEC,
    ) as running:
        yield running


def shorten_rules(file: Path) -> str:
    rules: dict[str, Any] = yaml.safe_load(file.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[\d+m\]", f"[{WINDOW}]", rule["expr"])
            if "alert" not in rule:
                continue
            if rule["alert"] in SHORTENED_THRESHOLDS:
                original, shortened = SHORTENED_THRESHOLDS[rule["alert"]]
                assert original in rule["expr"]
                rule["expr"] = rule["expr"].replace(original, shortened)
            rule["for"] = "500ms"
    return yaml.safe_dump(rules)


@pytest.fixture
async def stack(broker: Stack, watch: Prometheus) -> Stack:
    """Healthy broker without a firing alert."""
    await broker.fill(30)

    async def is_quiet() -> bool:
        return not await watch.firing()

    await wait_until(is_quiet, within_sec=TIMEOUT_SEC, every_sec=EVALUATION_INTERVAL_SEC)
    return broker


async def wait_until_firing(
    watch: Prometheus, alert: str, action: Callable[[], Awaitable[Any]] | None = None, **labels: str
) -> None:
    """Wait until the alert fires. Repeat `action` meanwhile."""

    async def is_firing() -> bool:
        if action is not None:
            await action()
        return any(
            firing["labels"].items() >= {"alertname": alert, **labels}.items() for firing in await watch.firing()
        )

    try:
        await wait_until(is_firing, within_sec=TIMEOUT_SEC, every_sec=EVALUATION_INTERVAL_SEC)
    except AssertionError:
        pytest.fail(f"{alert} did not fire. Firing alerts: {[firing['labels'] for firing in await watch.firing()]}")


async def wait_until_stopped(
    watch: Prometheus, alert: str, action: Callable[[], Awaitable[Any]] | None = None
) -> None:
    async def is_quiet() -> bool:
        if action is not None:
            await action()
        return alert not in [firing["labels"]["alertname"] for firing in await watch.firing()]

    try:
        await wait_until(is_quiet, within_sec=TIMEOUT_SEC, every_sec=EVALUATION_INTERVAL_SEC)
    except AssertionError:
        pytest.fail(f"{alert} still fires")


async def allocate_and_release(stack: Stack, students: int) -> None:
    for number in range(students):
        lease = (await stack.allocate(f"student-{number}")).json()
        await stack.release(lease["sandbox_id"], f"student-{number}")


async def set_csp_behaviour(stack: Stack, **behaviour: Any) -> None:
    await stack.control("PATCH", "behaviour", behaviour)


async def allocate_with_token(stack: Stack, token: str) -> None:
    """Send the requests of a class, with one token."""
    headers = {"Authorization": f"Bearer {token}", "X-Instruqt-Sandbox-ID": "ada"}
    for _ in range(30):
        await stack.client.post(f"{stack.url}/v1/allocate", headers=headers)


async def test_allocator_outage(stack: Stack, watch: Prometheus) -> None:
    await stack.processes["allocator"].stop()

    async def allocate() -> None:
        await stack.allocate("ada")

    await wait_until_firing(watch, "BrokerAllocationsFail", allocate)
    await wait_until_firing(watch, "BrokerNoConsumer", queue="allocator.commands")
    await wait_until_firing(watch, "BrokerCommandsWait", queue="allocator.maintenance")
    await wait_until_firing(watch, "BrokerNotScraped", service="allocator")
    await wait_until_firing(watch, "BrokerInstanceDown")
    await stack.start_service("allocator")
    for alert in (
        "BrokerAllocationsFail",
        "BrokerNoConsumer",
        "BrokerCommandsWait",
        "BrokerNotScraped",
        "BrokerInstanceDown",
    ):
        await wait_until_stopped(watch, alert, allocate)


async def test_an_allocator_with_pauses(stack: Stack, watch: Prometheus) -> None:
    allocator = stack.processes["allocator"]

    async def allocate_slowly() -> None:
        allocator.send(signal.SIGSTOP)
        waiting = asyncio.create_task(stack.allocate("ada"))
        await asyncio.sleep(0.7)  # only elapsed time makes a response slow
        allocator.send(signal.SIGCONT)
        await waiting

    async def allocate() -> None:
        await stack.allocate("ada")

    await wait_until_firing(watch, "BrokerAllocationsSlow", allocate_slowly)
    await wait_until_stopped(watch, "BrokerAllocationsSlow", allocate)


async def test_a_class_larger_than_the_pool(stack: Stack, watch: Prometheus) -> None:
    numbers = itertools.count()

    async def allocate() -> None:
        await stack.allocate(f"student-{next(numbers)}")

    await wait_until_firing(watch, "BrokerPoolRunsDry", allocate)
    while (await stack.stats())["available"]:
        await allocate()
    await wait_until_firing(watch, "BrokerPoolExhausted", allocate)
    await stack.control("POST", "accounts", {"count": 30})
    await wait_until_stopped(watch, "BrokerPoolExhausted")
    await wait_until_stopped(watch, "BrokerPoolRunsDry")


async def test_a_revoked_token(stack: Stack, watch: Prometheus) -> None:
    await wait_until_firing(
        watch, "BrokerTokensRefused", lambda: allocate_with_token(stack, "revoked"), reason="unknown"
    )
    await wait_until_stopped(watch, "BrokerTokensRefused")


async def test_wrong_counters(stack: Stack, watch: Prometheus) -> None:
    change = "INSERT INTO pool_changes (status, stem, number) VALUES ('stale', 'unused-', $1)"
    await stack.database.execute(change, 1)
    await wait_until_firing(watch, "BrokerInvariantBroken", rule="counters_are_exact")
    await stack.database.execute(change, -1)
    await wait_until_stopped(watch, "BrokerInvariantBroken")


async def test_postgresql_outage(stack: Stack, watch: Prometheus, proxies: dict[str, Proxy]) -> None:
    proxies["postgresql"].reset()
    await wait_until_firing(watch, "BrokerInvariantsNotChecked")
    proxies["postgresql"].heal()
    await wait_until_stopped(watch, "BrokerInvariantsNotChecked")


async def test_rabbitmq_outage(stack: Stack, watch: Prometheus, proxies: dict[str, Proxy]) -> None:
    proxies["rabbitmq"].reset()
    await wait_until_firing(watch, "BrokerRabbitmqAway")
    proxies["rabbitmq"].heal()
    await wait_until_stopped(watch, "BrokerRabbitmqAway")


async def test_a_blocked_outbox_relay(stack: Stack, watch: Prometheus) -> None:
    connection = await asyncpg.connect(stack.environment["DATABASE_URL"])
    async with connection.transaction():
        await connection.execute("LOCK TABLE history IN ACCESS EXCLUSIVE MODE")
        await stack.allocate("ada")
        await wait_until_firing(watch, "BrokerEventsWait")
    await connection.close()
    await wait_until_stopped(watch, "BrokerEventsWait")


async def test_an_unreadable_message(stack: Stack, watch: Prometheus) -> None:
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(b"no envelope"), "allocator.maintenance")
        await wait_until_firing(watch, "BrokerDeadLetters")
        await wait_until_stopped(watch, "BrokerDeadLetters", lambda: delete_dead_letters(stack, channel))


async def delete_dead_letters(stack: Stack, channel: aio_pika.abc.AbstractChannel) -> None:
    """Delete the dead letters in the queue and those already stored by the allocator."""
    await (await channel.get_queue("broker.dead_letters")).purge()
    for letter in (await stack.admin("GET", "dead-letters")).json().get("dead_letters", []):
        await stack.admin("DELETE", f"dead-letters/{letter['dead_letter_id']}")


async def test_a_revoked_csp_token(stack: Stack, watch: Prometheus) -> None:
    await set_csp_behaviour(stack, reject_tokens=True)
    await allocate_and_release(stack, 1)
    await wait_until_firing(watch, "BrokerCspRefusesToken")
    assert "BrokerCspCircuitOpen" not in [firing["labels"]["alertname"] for firing in await watch.firing()]
    await set_csp_behaviour(stack, reject_tokens=False)
    await wait_until_stopped(watch, "BrokerCspRefusesToken")


async def test_repeated_csp_failures(stack: Stack, watch: Prometheus) -> None:
    await set_csp_behaviour(stack, delete_error_rate=1.0)
    await allocate_and_release(stack, 10)
    await wait_until_firing(watch, "BrokerCspCircuitOpen")
    await wait_until_firing(watch, "BrokerDeletionsStuck")
    await set_csp_behaviour(stack, delete_error_rate=0.0)
    await wait_until_stopped(watch, "BrokerDeletionsStuck")
    await wait_until_stopped(watch, "BrokerCspCircuitOpen")


async def restart_reaper(stack: Stack, **settings: str) -> None:
    await stack.processes["reaper"].stop()
    await stack.start_service("reaper", settings=settings)


async def test_a_permanently_failed_deletion(stack: Stack, watch: Prometheus) -> None:
    await restart_reaper(stack, DELETION_MAX_ATTEMPTS="1")
    await set_csp_behaviour(stack, fail_next_deletes=1)
    await allocate_and_release(stack, 1)
    await wait_until_firing(watch, "BrokerDeletionsFailed")
    await restart_reaper(stack)
    [failed] = (await stack.admin("GET", "sandboxes", status="deletion_failed")).json()["sandboxes"]
    await stack.admin("POST", f"sandboxes/{failed['sandbox_id']}/retry-deletion")
    await wait_until_stopped(watch, "BrokerDeletionsFailed")


async def test_a_listing_without_most_of_the_pool(stack: Stack, watch: Prometheus) -> None:
    await set_csp_behaviour(stack, listing_fraction=0.2)
    await wait_until_firing(watch, "BrokerSyncHeld")
    await stack.processes["allocator"].stop()
    await wait_until_firing(watch, "BrokerNotScraped", service="allocator")
    assert "BrokerSyncHeld" in [firing["labels"]["alertname"] for firing in await watch.firing()]
    await stack.start_service("allocator")
    await set_csp_behaviour(stack, listing_fraction=1.0)
    await wait_until_stopped(watch, "BrokerSyncHeld")


async def test_failed_listings(stack: Stack, watch: Prometheus) -> None:
    await set_csp_behaviour(stack, listing_error_rate=1.0)
    await wait_until_firing(watch, "BrokerSyncLate")
    await set_csp_behaviour(stack, listing_error_rate=0.0)
    await wait_until_stopped(watch, "BrokerSyncLate")


async def test_an_account_deleted_in_csp(stack: Stack, watch: Prometheus) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.control("DELETE", f"accounts/{lease['external_id']}")
    await wait_until_firing(watch, "BrokerLeaks", kind="missing")
    await stack.release(lease["sandbox_id"], "ada")
    await wait_until_stopped(watch, "BrokerLeaks")


async def test_a_student_who_waits_for_long(stack: Stack, watch: Prometheus) -> None:
    for number in range(30):
        await stack.allocate(f"student-{number}")

    async def keep_waiting() -> None:
        await stack.allocate("late", Prefer="respond-async, wait=900")

    await wait_until_firing(watch, "BrokerStudentsWait", keep_waiting)
    await stack.control("POST", "accounts", {"count": 30})
    await wait_until_stopped(watch, "BrokerStudentsWait", keep_waiting)


async def test_a_database_without_the_newest_lease(stack: Stack, watch: Prometheus) -> None:
    """RabbitMQ knows a lease that the database lacks, as after the restore of an older backup."""
    await stack.allocate("ada")
    # Stopped before the message: its relay would replace the message by ada's lease.
    await stack.processes["allocator"].stop()
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        lost = aio_pika.Message(b'{"subject": "lost"}', delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(lost, NEWEST_LEASE.name)
    await stack.launch("allocator")

    async def is_refused() -> bool:
        response = await stack.allocate("bob")
        return response.status_code == 503 and response.json()["detail"]["code"] == "DATABASE_BEHIND"

    await wait_until(is_refused, within_sec=TIMEOUT_SEC)
    await wait_until_firing(watch, "BrokerDatabaseBehind")
    await stack.admin("POST", "restore/confirm")

    async def allocate() -> None:
        await stack.allocate("bob")

    await wait_until_stopped(watch, "BrokerDatabaseBehind", allocate)


async def test_an_allocator_of_another_broker(stack: Stack, watch: Prometheus, new_vhost: NewVhost) -> None:
    async with new_vhost() as other_amqp_url:
        newcomer, _ = await stack.launch("allocator", name="newcomer", settings={"AMQP_URL": other_amqp_url})
        await wait_until_firing(watch, "BrokerOtherBroker")
        await newcomer.stop()
        stack.processes.pop("newcomer")
    await stack.forget_other_broker()
    await wait_until_stopped(watch, "BrokerOtherBroker")
