"""Events: each at least once, in order for each sandbox, whatever goes away meanwhile."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from allocator import metrics, outbox
from allocator.outbox import Relay
from sandbox_broker.contract.events import Event
from sandbox_broker.messaging.publisher import Outgoing, Publisher

from .allocator_harness import Pool, until
from .bus_harness import Line, allocator, events, stop


async def write(pool: Pool, sandboxes: int, changes: int, *, first: int = 1) -> None:
    """Events of some sandboxes, each numbered in its order, those of all of them mixed."""
    await pool.execute(
        "INSERT INTO outbox (type, subject, data) "
        "SELECT 'sandbox.allocated', sandbox::text, jsonb_build_object('number', number) "
        "FROM generate_series($2::int, $2 + $3::int - 1) number, generate_series(1, $1::int) sandbox "
        "ORDER BY number, sandbox",
        sandboxes,
        first,
        changes,
    )


async def arrived(messages: "asyncio.Queue[Any]", count: int) -> list[Event]:
    """All that has arrived, once that is so many different events."""
    found: dict[uuid.UUID, list[Event]] = defaultdict(list)

    async def complete() -> bool:
        while not messages.empty():
            event = Event.model_validate_json(messages.get_nowait().body)
            found[event.id].append(event)
        return len(found) >= count

    await until(complete)
    return [event for copies in found.values() for event in copies]


def check_order(found: list[Event], sandboxes: int, changes: int) -> None:
    """Nothing lacks, and the first arrivals of each sandbox's events are in order."""
    seen: dict[str, list[int]] = defaultdict(list)
    for event in found:
        number = event.data["number"]
        if number not in seen[event.subject or ""]:
            seen[event.subject or ""].append(number)
    assert len(seen) == sandboxes
    for numbers in seen.values():
        assert numbers == list(range(1, changes + 1))


async def empty(pool: Pool) -> bool:
    return not await pool.value("SELECT count(*) FROM outbox")


async def test_an_event_is_a_cloud_event_and_leaves_the_outbox(pool: Pool, clean_queues: str) -> None:
    async with events(clean_queues) as messages, allocator(clean_queues, pool.url):
        sandbox_id = await pool.lease("ann")
        message = await asyncio.wait_for(messages.get(), 20)
        await until(lambda: empty(pool))
    event = Event.model_validate_json(message.body)
    assert (event.type, event.subject) == ("sandbox.allocated", sandbox_id)
    assert message.routing_key == "sandbox.allocated"
    assert message.content_type == "application/cloudevents+json"
    assert message.message_id == str(event.id)
    assert event.data["holder"] == "ann"


async def test_a_published_event_becomes_the_history_of_its_sandbox(pool: Pool, clean_queues: str) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.execute("INSERT INTO outbox (type, data) VALUES ('pool.exhausted', '{}')")  # of no sandbox
    written = await pool.rows(
        "SELECT subject, outbox_id, type, occurred_at, data FROM outbox WHERE subject IS NOT NULL"
    )
    async with allocator(clean_queues, pool.url):
        await until(lambda: empty(pool))
        kept = await pool.rows("SELECT sandbox_id, outbox_id, type, occurred_at, data FROM history")
    assert [tuple(row) for row in kept] == [tuple(row) for row in written]
    assert [row["sandbox_id"] for row in kept] == [sandbox_id]


async def test_the_relay_adds_up_the_counters(pool: Pool, clean_queues: str) -> None:
    await pool.fill(3)
    async with allocator(clean_queues, pool.url):

        async def added_up() -> bool:
            counted = await pool.column(
                "SELECT number FROM pool_counts WHERE kind = 'pool' AND status = 'available'"
            )
            return counted == [3]

        await until(added_up)
    assert await pool.value("SELECT count(*) FROM pool_changes") == 0


async def test_events_come_in_order_for_each_sandbox_and_once_where_nothing_fails(
    pool: Pool, clean_queues: str
) -> None:
    await write(pool, sandboxes=40, changes=30)
    async with events(clean_queues) as messages, allocator(clean_queues, pool.url):
        await until(lambda: empty(pool))
        found = await arrived(messages, 40 * 30)
    assert len(found) == 40 * 30
    check_order(found, 40, 30)


async def test_two_relays_at_work_do_not_overtake_each_other(pool: Pool, clean_queues: str) -> None:
    async with (
        events(clean_queues) as messages,
        allocator(clean_queues, pool.url) as one,
        allocator(clean_queues, pool.url) as other,
    ):
        for first in range(1, 61):
            await write(pool, sandboxes=20, changes=1, first=first)
            one.relay.wake()
            other.relay.wake()
        await until(lambda: empty(pool))
        found = await arrived(messages, 20 * 60)
    assert len(found) == 20 * 60
    check_order(found, 20, 60)


async def test_events_wait_while_rabbitmq_is_away_and_the_lag_shows_it(pool: Pool, clean_queues: str) -> None:
    line = Line(clean_queues)
    await line.mend()
    async with events(clean_queues) as messages, allocator(line.url, pool.url):
        await write(pool, sandboxes=10, changes=5)
        await until(lambda: empty(pool))
        await write(pool, sandboxes=10, changes=20, first=6)  # some of these are on their way
        await line.cut()
        await write(pool, sandboxes=10, changes=5, first=26)
        await pool.execute("UPDATE outbox SET occurred_at = now() - interval '1 hour'")

        async def lagging() -> bool:
            return bool(metrics.OUTBOX_LAG._value.get() > 3000)

        await until(lagging)
        assert await pool.value("SELECT count(*) FROM outbox") >= 50
        await line.mend()
        await until(lambda: empty(pool))
        check_order(await arrived(messages, 10 * 30), 10, 30)
    await line.cut()


async def test_events_survive_the_relays_connection_to_the_database(pool: Pool, clean_queues: str) -> None:
    async with events(clean_queues) as messages, allocator(clean_queues, pool.url) as running:
        for first in range(1, 21):
            await write(pool, sandboxes=10, changes=1, first=first)
            running.relay.wake()
            await pool.value(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = 'allocator-outbox' AND datname = current_database()"
            )
        await until(lambda: empty(pool))
        check_order(await arrived(messages, 10 * 20), 10, 20)


async def test_a_relay_that_freezes_with_the_lock_in_its_hands_loses_it(
    pool: Pool, clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SETTINGS", "SET idle_session_timeout = '1500ms'")
    thawed = asyncio.Event()

    class Frozen(Publisher):
        async def publish_all(self, exchange: str, messages: Sequence[Outgoing], **__: Any) -> int:  # noqa: ARG002 (as Publisher has it)
            await thawed.wait()
            return len(messages)

    frozen = Frozen(clean_queues, "frozen")
    relay = Relay(pool.url, frozen)
    running = [asyncio.create_task(frozen.run()), asyncio.create_task(relay.run())]
    try:
        await frozen.wait_connected()
        await write(pool, sandboxes=5, changes=5)
        relay.wake()

        async def holds_the_lock() -> bool:
            return bool(
                await pool.value(
                    "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
                    "WHERE locktype = 'advisory' AND objid = 5914033 AND datname = current_database()"
                )
            )

        await until(holds_the_lock)
        async with events(clean_queues) as messages, allocator(clean_queues, pool.url):
            await until(lambda: empty(pool))
            check_order(await arrived(messages, 5 * 5), 5, 5)
        thawed.set()
        await write(pool, sandboxes=5, changes=1)  # and it goes on, on a new connection
        await until(lambda: empty(pool))
    finally:
        thawed.set()
        await stop(running)
