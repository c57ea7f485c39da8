"""Outbox relay: at-least-once delivery, in order for each sandbox, through all outages."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from allocator import metrics
from allocator.background import outbox_relay
from allocator.background.outbox_relay import SYNC_BATCH_SIZE, OutboxRelay
from devstack.conditions import wait_until
from sandbox_broker.contract.events import Event
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.publisher import OutboundMessage, Publisher

from .allocator_harness import Pool
from .bus_harness import TcpProxy, run_allocator, stop, subscribe_events


async def write_events(pool: Pool, sandboxes: int, changes: int, *, first: int = 1) -> None:
    """Insert `changes` numbered events for each of `sandboxes` sandboxes, interleaved."""
    await pool.execute(
        "INSERT INTO outbox (type, subject, data) "
        "SELECT 'sandbox.allocated', sandbox::text, jsonb_build_object('number', number) "
        "FROM generate_series($2::int, $2 + $3::int - 1) number, generate_series(1, $1::int) sandbox "
        "ORDER BY number, sandbox",
        sandboxes,
        first,
        changes,
    )


async def write_sync_events(pool: Pool, sandboxes: int) -> None:
    """Insert the event with number 1 for each of `sandboxes` sandboxes, as a sync does."""
    await pool.execute(
        "INSERT INTO outbox (type, subject, data) "
        "SELECT 'sandbox.discovered', sandbox::text, '{\"number\": 1}' FROM generate_series(1, $1::int) sandbox",
        sandboxes,
    )


async def receive_events(messages: "asyncio.Queue[Any]", count: int) -> list[Event]:
    """Wait for `count` distinct events; return all events received so far, with duplicates."""
    received: dict[uuid.UUID, list[Event]] = defaultdict(list)

    async def complete() -> bool:
        while not messages.empty():
            event = Event.model_validate_json(messages.get_nowait().body)
            received[event.id].append(event)
        return len(received) >= count

    await wait_until(complete)
    return [event for copies in received.values() for event in copies]


async def receive_in_order(messages: "asyncio.Queue[Any]", count: int) -> list[Event]:
    """Receive `count` events, in the order of their publication."""
    async with asyncio.timeout(60):
        return [Event.model_validate_json((await messages.get()).body) for _ in range(count)]


def check_order(received: list[Event], sandboxes: int, changes: int) -> None:
    """Check the completeness of the events, and the order of their first copies for each sandbox."""
    seen: dict[str, list[int]] = defaultdict(list)
    for event in received:
        number = event.data["number"]
        if number not in seen[event.subject or ""]:
            seen[event.subject or ""].append(number)
    assert len(seen) == sandboxes
    for numbers in seen.values():
        assert numbers == list(range(1, changes + 1))


async def is_outbox_empty(pool: Pool) -> bool:
    return not await pool.value("SELECT count(*) FROM outbox")


async def test_an_event_is_published_as_a_cloud_event_and_leaves_the_outbox(pool: Pool, clean_queues: str) -> None:
    async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url):
        sandbox_id = await pool.lease("ann")
        message = await asyncio.wait_for(messages.get(), 20)
        await wait_until(lambda: is_outbox_empty(pool))
    event = Event.model_validate_json(message.body)
    assert (event.type, event.subject) == ("sandbox.allocated", sandbox_id)
    assert message.routing_key == "sandbox.allocated"
    assert message.content_type == "application/cloudevents+json"
    assert message.message_id == str(event.id)
    assert event.data["holder"] == "ann"


async def test_a_published_event_moves_to_the_history(pool: Pool, clean_queues: str) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.execute("INSERT INTO outbox (type, data) VALUES ('pool.exhausted', '{}')")  # without a sandbox
    written = await pool.rows(
        "SELECT subject, outbox_id, type, occurred_at, data FROM outbox WHERE subject IS NOT NULL"
    )
    async with run_allocator(clean_queues, pool.url):
        await wait_until(lambda: is_outbox_empty(pool))
        kept = await pool.rows("SELECT sandbox_id, outbox_id, type, occurred_at, data FROM history")
    assert [tuple(row) for row in kept] == [tuple(row) for row in written]
    assert [row["sandbox_id"] for row in kept] == [sandbox_id]


async def test_the_relay_updates_the_pool_counters(pool: Pool, clean_queues: str) -> None:
    await pool.fill(3)
    async with run_allocator(clean_queues, pool.url):

        async def added_up() -> bool:
            counted = await pool.column(
                "SELECT number FROM pool_counts WHERE kind = 'pool' AND status = 'available'"
            )
            return counted == [3]

        await wait_until(added_up)
    assert await pool.value("SELECT count(*) FROM pool_changes") == 0


async def test_events_arrive_once_and_in_order_per_sandbox(pool: Pool, clean_queues: str) -> None:
    await write_events(pool, sandboxes=40, changes=30)
    async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url):
        await wait_until(lambda: is_outbox_empty(pool))
        received = await receive_events(messages, 40 * 30)
    assert len(received) == 40 * 30
    check_order(received, 40, 30)


async def test_concurrent_relays_keep_the_order(pool: Pool, clean_queues: str) -> None:
    async with (
        subscribe_events(clean_queues) as messages,
        run_allocator(clean_queues, pool.url) as one,
        run_allocator(clean_queues, pool.url) as other,
    ):
        for first in range(1, 61):
            await write_events(pool, sandboxes=20, changes=1, first=first)
            one.relay.wake()
            other.relay.wake()
        await wait_until(lambda: is_outbox_empty(pool))
        received = await receive_events(messages, 20 * 60)
    assert len(received) == 20 * 60
    check_order(received, 20, 60)


async def test_a_students_event_overtakes_the_events_of_a_sync(pool: Pool, clean_queues: str) -> None:
    await write_sync_events(pool, sandboxes=10_000)
    first = await pool.value("SELECT min(outbox_id) FROM outbox")
    await pool.execute(
        "INSERT INTO outbox (type, subject, data) VALUES "
        "('waiting.started', NULL, '{\"number\": 1}'), ('sandbox.allocated', '20000', '{\"number\": 1}')"
    )
    async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url) as running:
        events = await receive_in_order(messages, 3)
        assert [event.type for event in events] == ["waiting.started", "sandbox.allocated", "sandbox.discovered"]
        assert [event.resumeafter for event in events] == [str(first - 1), str(first - 1), None]
        events += await receive_in_order(messages, 9_999)
        await wait_until(lambda: is_outbox_empty(pool))
        await write_events(pool, sandboxes=1, changes=1)
        running.relay.wake()
        events += await receive_in_order(messages, 1)
    sequences = [int(event.sequence or "") for event in events]
    assert sequences[2:] == sorted(sequences[2:])
    assert len(set(sequences)) == 10_003
    assert [event for event in events[2:] if event.resumeafter] == []


async def test_the_events_of_a_sandbox_stay_in_order_when_they_overtake(pool: Pool, clean_queues: str) -> None:
    await write_sync_events(pool, sandboxes=2_000)
    await pool.execute(
        "INSERT INTO outbox (type, subject, data) "
        "SELECT type, sandbox::text, jsonb_build_object('number', number) "
        "FROM unnest('{sandbox.stale,sandbox.restored,sandbox.allocated}'::text[]) WITH ORDINALITY "
        "changes (type, change), generate_series(1, 2000) sandbox, LATERAL (SELECT change + 1) numbered (number) "
        "ORDER BY number, -sandbox"
    )
    async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url):
        first = await receive_in_order(messages, 400)
        events = first + await receive_in_order(messages, 3 * 2_000 + 2_000 - 400)
    check_order(events, 2_000, 4)
    # The first batch: those 100 leases, and the other events of their sandboxes.
    assert {event.subject for event in first} == {str(sandbox) for sandbox in range(1_901, 2_001)}


async def test_nothing_is_lost_when_relays_die_beside_the_events_of_a_sync(pool: Pool, clean_queues: str) -> None:
    await write_sync_events(pool, sandboxes=3_000)
    async with (
        subscribe_events(clean_queues) as messages,
        run_allocator(clean_queues, pool.url) as one,
        run_allocator(clean_queues, pool.url) as other,
    ):
        for change in range(2, 12):
            before = await pool.value("SELECT count(*) FROM history")
            await write_events(pool, sandboxes=3_000 if change == 2 else 20, changes=1, first=change)
            one.relay.wake()
            other.relay.wake()

            async def progresses(before: int = before) -> bool:
                return bool(await pool.value("SELECT count(*) FROM history") > before)

            await wait_until(progresses)
            await pool.value(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = 'allocator-outbox' AND datname = current_database()"
            )
        await wait_until(lambda: is_outbox_empty(pool))
        received = await receive_events(messages, 2 * 3_000 + 9 * 20)
    check_order([event for event in received if int(event.subject or "") <= 20], 20, 11)
    check_order([event for event in received if int(event.subject or "") > 20], 2_980, 2)


async def test_the_relay_rests_between_the_events_of_a_sync_while_students_come(
    pool: Pool, clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_relay, "MAX_REST_SEC", 1e9)
    monkeypatch.setattr(outbox_relay, "REST_FACTOR", 1e9)
    await write_sync_events(pool, sandboxes=1_000)
    await write_events(pool, sandboxes=5, changes=1, first=2)
    async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url) as running:
        published = await receive_in_order(messages, 2 * 5 + SYNC_BATCH_SIZE)
        for change in range(3, 8):
            await write_events(pool, sandboxes=5, changes=1, first=change)
            running.relay.wake()
            published += await receive_in_order(messages, 5)
    assert [event.type for event in published].count("sandbox.discovered") == 5 + SYNC_BATCH_SIZE
    assert [event.type for event in published[-25:]] == 25 * ["sandbox.allocated"]


async def test_plans_made_for_an_empty_outbox_suit_a_full_one(pool: Pool) -> None:
    await pool.execute("VACUUM ANALYZE outbox")
    await pool.execute(outbox_relay.SESSION_SETTINGS)
    plans = [
        "\n".join(await pool.column(f"EXPLAIN {statement.replace('$1', '100')}"))
        for statement in (outbox_relay.SELECT_EVENTS, outbox_relay.SELECT_EVENTS_AHEAD)
    ]
    for plan in plans:
        assert "Seq Scan" not in plan
    assert "Sort" not in plans[0]
    assert "using outbox_without_syncs on outbox" in plans[1]
    assert "using outbox_of_syncs on outbox" in plans[1]


async def test_events_wait_for_rabbitmq_and_the_lag_grows(pool: Pool, clean_queues: str) -> None:
    proxy = TcpProxy(clean_queues)
    await proxy.connect()
    async with subscribe_events(clean_queues) as messages, run_allocator(proxy.url, pool.url):
        await write_events(pool, sandboxes=10, changes=5)
        await wait_until(lambda: is_outbox_empty(pool))
        await write_events(pool, sandboxes=10, changes=20, first=6)  # some of these are in flight
        await proxy.disconnect()
        await write_events(pool, sandboxes=10, changes=5, first=26)
        await pool.execute("UPDATE outbox SET occurred_at = now() - interval '1 hour'")

        async def lagging() -> bool:
            return bool(metrics.OUTBOX_LAG._value.get() > 3000)

        await wait_until(lagging)
        assert await pool.value("SELECT count(*) FROM outbox") >= 50
        await proxy.connect()
        await wait_until(lambda: is_outbox_empty(pool))
        check_order(await receive_events(messages, 10 * 30), 10, 30)
    await proxy.disconnect()


async def test_events_survive_the_loss_of_the_database_connection(pool: Pool, clean_queues: str) -> None:
    async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url) as running:
        for first in range(1, 21):
            await write_events(pool, sandboxes=10, changes=1, first=first)
            running.relay.wake()
            await pool.value(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = 'allocator-outbox' AND datname = current_database()"
            )
        await wait_until(lambda: is_outbox_empty(pool))
        check_order(await receive_events(messages, 10 * 20), 10, 20)


async def test_a_frozen_relay_loses_the_lock(
    pool: Pool, clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_relay, "SESSION_SETTINGS", "SET idle_session_timeout = '1500ms'")
    thawed = asyncio.Event()

    class Frozen(Publisher):
        async def publish_all(self, exchange: str, messages: Sequence[OutboundMessage], **__: Any) -> int:  # noqa: ARG002 (the signature of Publisher)
            await thawed.wait()
            return len(messages)

    frozen = Frozen(clean_queues, "frozen")
    relay = OutboxRelay(Primary(pool.url), frozen)
    running = [asyncio.create_task(frozen.run()), asyncio.create_task(relay.run())]
    try:
        await frozen.wait_connected()
        await write_events(pool, sandboxes=5, changes=5)
        relay.wake()

        async def holds_the_lock() -> bool:
            return bool(
                await pool.value(
                    "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
                    "WHERE locktype = 'advisory' AND objid = 5914033 AND datname = current_database()"
                )
            )

        await wait_until(holds_the_lock)
        async with subscribe_events(clean_queues) as messages, run_allocator(clean_queues, pool.url):
            await wait_until(lambda: is_outbox_empty(pool))
            check_order(await receive_events(messages, 5 * 5), 5, 5)
        thawed.set()
        await write_events(pool, sandboxes=5, changes=1)  # the relay continues on a new connection
        await wait_until(lambda: is_outbox_empty(pool))
    finally:
        thawed.set()
        await stop(running)
