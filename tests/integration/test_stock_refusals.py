"""CSP answers 503 for ten minutes and then refuses creations for its quota: few calls, one alert, one command to go
on.

The time-outs, and the windows and waiting times of the alerts, are 60 times shorter than in production.
"""

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from devstack.conditions import wait_until
from devstack.prometheus import Prometheus
from devstack.testing import NewDatabase, NewVhost
from tests.integration.alert_watch import read_fired_alerts, read_rules_with_seconds, watch_alerts
from tests.integration.ctl import run_brokerctl, wait_for_status
from tests.integration.stack import ADMIN, Stack, run_stack

SPEED = 60
OUTAGE_SEC = 600 / SPEED
BACKOFF_SEC = 30 / SPEED
MAX_FAILURES, CONCURRENCY = 5, 2
SETTINGS = {
    "STOCK_ENABLED": "true",
    "STOCK_INTERVAL_SEC": str(60 / SPEED),
    "CREATE_PER_MINUTE": "1000",
    "CREATE_CONCURRENCY": str(CONCURRENCY),
    "CREATE_MAX_FAILURES": str(MAX_FAILURES),
    "CREATE_BACKOFF_BASE_SEC": str(BACKOFF_SEC),
    "CREATE_BACKOFF_MAX_SEC": str(900 / SPEED),
    "CREATE_SYNC_SEC": str(30 / SPEED),
    "CIRCUIT_BREAKER_TIMEOUT_SEC": str(60 / SPEED),
}
MIN = 4
OTHERS = 20
"""Sandboxes without the prefix, so that the pool is not empty."""
CREATED_BEFORE_REFUSAL = 2
QUOTA = OTHERS + CREATED_BEFORE_REFUSAL


@pytest.fixture
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=SETTINGS) as stack,
    ):
        yield stack


async def list_creations(stack: Stack) -> list[dict[str, Any]]:
    """Return the answered creations, as CSP has recorded them."""
    calls: list[dict[str, Any]] = (await stack.control("GET", "calls?method=POST"))["calls"]
    return sorted(
        (call for call in calls if call["path"].endswith("/sandbox/accounts")), key=lambda call: call["at"]
    )


async def wait_until_stopped(stack: Stack, cause: str) -> dict[str, Any]:
    """Return the level of the stopped stock."""
    level: dict[str, Any] = {}

    async def is_stopped() -> bool:
        level.update((await stack.admin("GET", "stock")).json()["stock"][0])
        return (level["state"], level["stop_cause"]) == ("stopped", cause)

    await wait_until(is_stopped)
    return level


@pytest.fixture
async def watch(stack: Stack, tmp_path: Path) -> AsyncIterator[Prometheus]:
    async with watch_alerts(stack, tmp_path, read_rules_with_seconds()) as running:
        yield running


async def has_alert(watch: Prometheus, is_firing: bool) -> bool:
    """Return whether the alert about the stopped prefix fires, or does not fire."""
    alerts = [(alert["labels"]["alertname"], alert["labels"].get("name_prefix")) for alert in await watch.firing()]
    return (("BrokerStockStopped", "lab-") in alerts) == is_firing


async def has_been_low(watch: Prometheus) -> bool:
    """Return whether the stock has been low for longer than the waiting time of BrokerStockLow, which is 15 s."""
    shortage = "broker:stock_shortage:max[20s]"
    return bool(await watch.query(f"min_over_time({shortage}) > 0 and count_over_time({shortage}) > 18"))


async def resume(stack: Stack) -> None:
    resumed = await run_brokerctl(stack, "stock", "resume", "lab-")
    assert (resumed.status, "is resumed" in resumed.out) == (0, True), resumed


@pytest.mark.timeout(400)
async def test_an_outage_and_a_quota_refusal_cause_few_calls_until_an_operator_resumes(
    stack: Stack, watch: Prometheus
) -> None:
    await stack.fill(OTHERS)
    await stack.control("PATCH", "behaviour", {"create_error_rate": 1, "create_error_status": 503})
    outage_began = time.monotonic()
    policy = {
        "name": "lab",
        "match": {"name_prefix": "lab-"},
        "stock": {"name_prefix": "lab-", "min": MIN, "max": MIN},
    }
    applied = await stack.client.put(f"{stack.url}/v1/admin/policies", headers=ADMIN, json={"policies": [policy]})
    assert applied.status_code == 200, applied.text
    await wait_until_stopped(stack, "failures")
    await wait_until(partial(has_alert, watch, True))
    await wait_until(lambda: time.monotonic() > outage_began + OUTAGE_SEC)
    await wait_until(partial(has_been_low, watch))
    calls = await list_creations(stack)
    assert MAX_FAILURES <= len(calls) < MAX_FAILURES + CONCURRENCY
    assert {call["status"] for call in calls} == {503}
    attempts = defaultdict(list)
    for call in calls:
        attempts[call["account_name"]].append(call["at"])
    for times in attempts.values():
        assert all(after - before >= BACKOFF_SEC for before, after in pairwise(times)), attempts

    decoys = len((await stack.control("GET", "accounts"))["accounts"])
    await stack.control("PATCH", "behaviour", {"create_error_rate": 0, "create_quota": QUOTA})
    await resume(stack)
    stopped = await wait_until_stopped(stack, "refused")
    assert f"the quota of {QUOTA} sandboxes is used up" in stopped["stop_reason"]
    await wait_until(partial(has_alert, watch, True))
    await wait_for_status(stack, lambda status: "brokerctl stock resume lab-" in status.out)

    async def is_imported() -> bool:
        return (await stack.stats())["available"] == QUOTA

    await wait_until(is_imported)
    statuses = [call["status"] for call in (await list_creations(stack))[len(calls) :]]
    assert statuses.count(200) == CREATED_BEFORE_REFUSAL
    assert 1 <= statuses.count(403) <= CONCURRENCY
    assert len(statuses) == statuses.count(200) + statuses.count(403)

    await stack.control("PATCH", "behaviour", {"create_quota": None})
    await resume(stack)

    async def is_full() -> bool:
        level = (await stack.admin("GET", "stock")).json()["stock"][0]
        return (level["state"], level["available"], level["creating"]) == ("full", MIN, 0)

    await wait_until(is_full)
    await wait_until(partial(has_alert, watch, False))
    assert await read_fired_alerts(watch) == ({"BrokerStockStopped"}, 1)
    assert len((await stack.control("GET", "accounts"))["accounts"]) == decoys + MIN
