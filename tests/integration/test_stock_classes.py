"""Classes that arrive at an empty pool: the students wait, the provisioner creates sandboxes, the line is served.

All durations of the stock are 20 times shorter than in production. LINE sets the number of students of the second
test (200 for the full size).
"""

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aio_pika
import httpx
import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from instruqt.instruqt_broker_allocation import BACKOFF_SEC
from sandbox_broker.contract import topology
from tests.chaos import checker
from tests.chaos.client import History
from tests.chaos.evidence import Event, Evidence
from tests.chaos.evidence_collector import collect_stack_evidence
from tests.chaos.stack import EVENTS_QUEUE
from tests.integration.stack import ADMIN, Stack, run_stack

SPEED = 20
CREATION_SEC = 120 / SPEED
SERVED_WITHIN_SEC = 2.0
"""Longest time from the moment when a sandbox is available to its lease."""
WAITING_TTL_SEC = 20
WAIT = "respond-async, wait=900"
SETTINGS = {
    "STOCK_ENABLED": "true",
    "STOCK_INTERVAL_SEC": str(60 / SPEED),
    "CREATE_CONCURRENCY": "30",
    "CREATE_PER_MINUTE": "1000",
    "CREATE_TIMEOUT_SEC": str(2 * CREATION_SEC),
    "CREATE_SYNC_SEC": str(30 / SPEED),
    "WAITING_TTL_SEC": str(WAITING_TTL_SEC),
}
STUDENTS = 100
MIN = 20
MAX = STUDENTS + MIN
"""All students wait at once, so the stock reaches its `max`."""
PREFIXES = ("lab-a-", "lab-b-")
LINE = int(os.environ.get("LINE", "80"))
LEAVING = SANDBOXES = LINE // 4


@pytest.fixture(scope="module")
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=SETTINGS) as stack,
    ):
        async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
            queue = await channel.declare_queue(EVENTS_QUEUE, durable=True)
            await queue.bind(topology.EVENTS.name, "#")
        yield stack


async def empty_broker(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"create_latency_sec": CREATION_SEC})
    await stack.fill(0)
    await collect(stack)  # forget the events of the tests before


async def collect(stack: Stack) -> Evidence:
    """Return the evidence when all events are published. It has no operations."""

    async def are_published() -> bool:
        return bool(await stack.database.fetchval("SELECT count(*) = 0 FROM outbox"))

    await wait_until(are_published)
    return await collect_stack_evidence(stack, stack.environment["AMQP_URL"], History(), [], [])


def select_events(evidence: Evidence, event_type: str) -> list[Event]:
    """Return the events of this type without duplicates, in the order of RabbitMQ."""
    return list({event.event_id: event for event in evidence.events if event.type == event_type}.values())


async def wait_for_sandbox(stack: Stack, student: str, prefix: str) -> dict[str, Any]:
    """Repeat the request as the track script does, until the student has a lease."""
    while True:
        try:
            response = await stack.allocate(student, Prefer=WAIT, X_Sandbox_Name_Prefix=prefix)
        except httpx.TransportError:
            await asyncio.sleep(BACKOFF_SEC[0])
            continue
        body: dict[str, Any] = response.json()
        if response.status_code != 202:
            assert response.status_code in (200, 201), response.text
            return body
        await asyncio.sleep(body["retry_after"])


def check_order(evidence: Evidence, students: int) -> None:
    """Require that the line of one prefix was served in the order of arrival, and in time."""
    assert list(checker.no_waiting_student_is_overtaken(evidence)) == []
    available_at = {event.sandbox_id: event.occurred_at for event in select_events(evidence, "sandbox.discovered")}
    served = select_events(evidence, "waiting.served")
    assert len(served) == students
    assert [event.data["place"] for event in served] == [
        event.data["place"] for event in select_events(evidence, "waiting.started")
    ]
    waits = [event.occurred_at - available_at[str(event.data["sandbox_id"])] for event in served]
    assert max(waits) <= SERVED_WITHIN_SEC, sorted(waits)[-5:]


@pytest.mark.timeout(200)
async def test_a_class_at_an_empty_pool_is_served_in_the_order_of_arrival(stack: Stack) -> None:
    await empty_broker(stack)
    rule = {"name_prefix": "lab-", "min": MIN, "max": MAX}
    policy = {"name": "lab", "match": {"name_prefix": "lab-"}, "stock": rule}
    applied = await stack.client.put(f"{stack.url}/v1/admin/policies", headers=ADMIN, json={"policies": [policy]})
    assert applied.status_code == 200, applied.text
    async with asyncio.TaskGroup() as group:
        students = [
            group.create_task(wait_for_sandbox(stack, f"student-{number}", "lab-")) for number in range(STUDENTS)
        ]
    assert len({student.result()["sandbox_id"] for student in students}) == STUDENTS

    async def is_full() -> bool:
        levels = "SELECT available = $1 AND creating = 0 FROM stock_levels"
        return bool(await stack.database.fetchval(levels, MIN))

    await wait_until(is_full)
    evidence = dataclasses.replace(await collect(stack), stock_limits={"lab-": MAX})
    check_order(evidence, STUDENTS)
    assert list(checker.no_stock_exceeds_its_max(evidence)) == []
    assert list(checker.one_account_per_intent_or_none(evidence)) == []
    await stack.assert_sound()


@pytest.mark.timeout(200)
async def test_students_who_leave_silently_do_not_hold_up_the_others(stack: Stack) -> None:
    await empty_broker(stack)
    lines: Mapping[str, Sequence[str]] = {
        prefix: [f"{prefix}student-{number}" for number in range(LINE // 2)] for prefix in PREFIXES
    }
    leaving = {student for students in lines.values() for student in students[::4]}
    assert len(leaving) == LEAVING
    for student, prefix in zip(*interleave(lines), strict=True):
        response = await stack.allocate(student, Prefer=WAIT, X_Sandbox_Name_Prefix=prefix)
        assert response.status_code == 202, response.text
    staying = [
        asyncio.create_task(wait_for_sandbox(stack, student, prefix))
        for prefix, students in lines.items()
        for student in students
        if student not in leaving
    ]
    try:

        async def have_left() -> bool:
            return bool(await stack.database.fetchval("SELECT count(*) FROM waiting") == LINE - LEAVING)

        await wait_until(have_left)
        await create_one_by_one(stack)
        expected = {
            student
            for students in lines.values()
            for student in [student for student in students if student not in leaving][: SANDBOXES // len(lines)]
        }

        async def are_served() -> bool:
            return bool(await stack.database.fetchval("SELECT count(*) FROM leases") >= SANDBOXES)

        await wait_until(are_served)
        rows = await stack.database.fetch("SELECT holder, name FROM leases JOIN sandboxes USING (sandbox_id)")
        assert {row["holder"] for row in rows} == expected
        assert all(row["name"].startswith(row["holder"].partition("student-")[0]) for row in rows)
        assert await stack.database.fetchval("SELECT count(*) FROM waiting") == LINE - LEAVING - SANDBOXES
    finally:
        for task in staying:
            task.cancel()
        await asyncio.gather(*staying, return_exceptions=True)
    evidence = await collect(stack)
    assert list(checker.no_waiting_student_is_overtaken(evidence)) == []
    assert {event.data["holder"] for event in select_events(evidence, "waiting.ended")} == leaving
    await stack.assert_sound()


def interleave(lines: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the students of all lines in turns, and the prefix of each."""
    students = [student for turn in zip(*lines.values(), strict=True) for student in turn]
    return students, [*lines] * (len(students) // len(lines))


async def create_one_by_one(stack: Stack) -> None:
    """Create accounts by hand for each prefix in turn, and import each before the next."""
    for number in range(SANDBOXES):
        prefix = PREFIXES[number % len(PREFIXES)]
        await stack.control("POST", "accounts", {"count": 1, "name_prefix": prefix})
        synced = await stack.sync(force="true")
        assert synced.status_code == 200, synced.text
