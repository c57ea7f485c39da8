"""Kill the provisioner and the allocator during creations. Every intent has one account or none, CSP and the pool
agree, and the stock never exceeds its `max`.

The checker of the chaos test judges the events and the history of the intents. KILLS sets the number of random
kills (100 for a long run), KILLS_SEED repeats a run.
"""

import asyncio
import dataclasses
import itertools
import os
import random
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import aio_pika
import httpx
import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from sandbox_broker.contract import topology
from tests.chaos import checker
from tests.chaos.client import History
from tests.chaos.evidence_collector import collect_stack_evidence
from tests.chaos.stack import EVENTS_QUEUE
from tests.integration.crash_stack import kill_at, run_crashing_stack
from tests.integration.stack import ADMIN, Stack

KILLS = int(os.environ.get("KILLS", "3"))
SEED = os.environ.get("KILLS_SEED") or secrets.token_hex(4)
COMMANDS = ("ClaimCreations", "RecordCreation", "RecordCreationFailure", "EndCreations", "ApplyListing")
POINTS = [
    "provisioner: after the claim",
    "provisioner: before CSP",
    "provisioner: during CSP",
    "provisioner: after CSP",
    "provisioner: after the look-up",
    "provisioner: after the record",
    "provisioner: after the request of a sync",
    *(f"allocator: {when} {command}" for command in COMMANDS for when in ("before", "after")),
    "allocator: between the grant and the claim",
    "allocator: during ApplyListing",
    "allocator: between ApplyListing and its flags",
    "allocator: before the ack",
]
PREFIX, MIN, MAX = "lab-", 2, 3
"""A low `max`, so that one intent too many exceeds it."""
FAILURES = {
    "create_latency_sec": 0.2,
    "create_error_status": [500, 502, 504, "cut"],
    "create_error_after_effect": True,
}
RULES = (
    checker.no_stock_exceeds_its_max,
    checker.one_account_per_intent_or_none,
    checker.only_the_specs_transitions,
    checker.every_event_is_published,
    checker.counts_add_up,
    checker.released_sandboxes_are_deleted_in_csp,
)
SETTINGS = {
    "STOCK_ENABLED": "true",
    "STOCK_INTERVAL_SEC": "1",
    "CREATE_PER_MINUTE": "1000",
    "CREATE_TIMEOUT_SEC": "0.5",
    "CREATE_BACKOFF_BASE_SEC": "0.1",
    "CREATE_BACKOFF_MAX_SEC": "0.5",
    "CREATE_MAX_FAILURES": "1000",
    "CREATE_SYNC_SEC": "0.5",
    "CLEANUP_INTERVAL_SEC": "1",
    "CIRCUIT_BREAKER_THRESHOLD": "1000",
}


@pytest.fixture(scope="module")
async def crashing(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    directory = tmp_path_factory.mktemp("crashes")
    async with run_crashing_stack(new_database, new_vhost, directory, SETTINGS) as stack:
        connection = await aio_pika.connect(stack.environment["AMQP_URL"])
        async with connection, connection.channel() as channel:
            queue = await channel.declare_queue(EVENTS_QUEUE, durable=True)
            await queue.bind(topology.EVENTS.name, "#")
        yield stack


async def empty_broker(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"create_error_rate": 0, "fail_next_creates": 0})

    async def is_empty() -> bool:
        await stack.fill(0)
        return bool(await stack.database.fetchval("SELECT count(*) FROM sandboxes") == 0)

    await wait_until(is_empty)  # a sync that began before the reset can add its accounts after it
    async with (
        await aio_pika.connect(stack.environment["AMQP_URL"]) as connection,
        connection.channel() as channel,
    ):
        await (await channel.get_queue(EVENTS_QUEUE)).purge()


async def apply_stock_rule(stack: Stack) -> None:
    rule = {"name_prefix": PREFIX, "min": MIN, "max": MAX}
    policy = {"name": "lab", "match": {"name_prefix": PREFIX}, "stock": rule}

    async def is_applied() -> bool:
        response = await stack.client.put(
            f"{stack.url}/v1/admin/policies", headers=ADMIN, json={"policies": [policy]}
        )
        return response.status_code == 200

    await wait_until(is_applied)


async def wait_until_full(stack: Stack) -> None:
    """Wait until no intent is in flight, the stock has its `min`, and all other work is done."""
    pending = """
        SELECT count(*) FROM (
            SELECT FROM creations WHERE in_flight
            UNION ALL SELECT FROM sandboxes WHERE status IN ('pending_deletion', 'allocated')
            UNION ALL SELECT FROM outbox
        ) pending
    """

    async def is_full() -> bool:
        available = await stack.database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'available'")
        return bool(available >= MIN and await stack.database.fetchval(pending) == 0)

    await wait_until(is_full)


async def check(stack: Stack) -> None:
    evidence = await collect_stack_evidence(stack, stack.environment["AMQP_URL"], History(), [], [])
    limited = dataclasses.replace(evidence, stock_limits={PREFIX: MAX})
    assert [violation for rule in RULES for violation in rule(limited)] == [], SEED
    assert {intent.state for intent in evidence.creations} <= {"created", "abandoned"}
    in_pool = {sandbox.external_id for sandbox in evidence.sandboxes if sandbox.status == "available"}
    assert in_pool == {external_id for external_id, name in evidence.accounts.items() if name.startswith(PREFIX)}
    await stack.assert_sound()


async def use_sandbox(stack: Stack, student: str) -> None:
    """Wait for a sandbox and release it. Retry each request, because services are killed."""
    sandbox_id = ""

    async def has_lease() -> bool:
        nonlocal sandbox_id
        try:
            lease = await stack.allocate(student, X_Sandbox_Name_Prefix=PREFIX, Prefer="respond-async, wait=900")
        except httpx.TransportError:
            return False
        sandbox_id = lease.json().get("sandbox_id", "")
        return lease.status_code in (200, 201)

    async def is_released() -> bool:
        return (await stack.release(sandbox_id, student)).status_code == 200

    await wait_until(has_lease, within_sec=100, every_sec=0.3)
    await wait_until(is_released, within_sec=60)


@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_at_this_point_leaves_one_account_for_each_intent(crashing: Stack, point: str) -> None:
    """The first creation takes effect although CSP reports an error, so each point is reached."""
    await empty_broker(crashing)
    failure = {**FAILURES, "fail_next_creates": 1}
    if point == "provisioner: after the look-up":
        failure["create_error_after_effect"] = False  # a sync could import the account before the look-up
    await crashing.control("PATCH", "behaviour", failure)
    Path(crashing.environment["DIE_AT"]).write_text(point)
    # The allocator may die before the rule is applied.
    await asyncio.gather(kill_at(crashing, point), apply_stock_rule(crashing))
    await wait_until_full(crashing)
    await check(crashing)
    assert (await crashing.stats())["available"] == MIN


@pytest.mark.timeout(120 + 30 * KILLS)
async def test_random_kills_leave_one_account_for_each_intent(crashing: Stack) -> None:
    rng = random.Random(SEED)
    await empty_broker(crashing)
    await apply_stock_rule(crashing)
    killed = 0
    for number in itertools.count():
        point = rng.choice(POINTS)
        await crashing.control(
            "PATCH",
            "behaviour",
            {**FAILURES, "create_error_rate": 0.3, "create_error_after_effect": rng.random() < 0.5},
        )
        Path(crashing.environment["DIE_AT"]).write_text(point)
        demand = asyncio.gather(*(use_sandbox(crashing, f"student-{number}-{other}") for other in range(4)))
        killed += await kill_at(crashing, point, demand.done)
        await demand
        if killed == KILLS:
            break
    await crashing.control("PATCH", "behaviour", {"create_error_rate": 0})
    await wait_until_full(crashing)
    await check(crashing)
