"""Dead letters: stored with their reason, replayed without a second effect, dropped."""

import asyncio
import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractQueue
from structlog.testing import capture_logs

from allocator.background import dead_letter_collector
from allocator.background.dead_letter_collector import DeadLetterCollector
from allocator.handlers.dead_letters import replay_dead_letter
from allocator.routing import STUDENTS
from allocator.write_session import WriteSession
from devstack.conditions import wait_until
from devstack.postgres import PrivatePostgres
from devstack.testing import NewDatabase
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import MAX_ENVELOPE, encode_commands
from sandbox_broker.contract.commands import (
    BeginListing,
    Command,
    DropDeadLetter,
    RecordDeletion,
    RecordJob,
    ReplayDeadLetter,
)
from sandbox_broker.contract.replies import DeadLetterReplayed, Recorded, Reply
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.migrate import migrate
from sandbox_broker.runtime.service import cancel_and_wait

from . import bus_harness
from .allocator_harness import (
    Pool,
    allocate_command,
    granted_lease,
    pool_in,
    refusal_code,
    release_command,
)
from .bus_harness import Allocator, Client, run_allocator

COMMANDS = topology.ALLOCATOR_COMMANDS.name


@asynccontextmanager
async def run_collector(amqp_url: str, database_url: str) -> AsyncIterator[DeadLetterCollector]:
    engine = connections.create_engine(Primary(database_url), pool_size=1, max_overflow=1)
    collector = DeadLetterCollector(amqp_url, engine)
    task = asyncio.create_task(collector.run())
    try:
        yield collector
    finally:
        await cancel_and_wait(task)
        await engine.dispose()
    assert task.cancelled(), task.exception()


@pytest.fixture
async def running(clean_queues: str, pool: Pool) -> AsyncIterator[Allocator]:
    async with run_allocator(clean_queues, pool.url) as allocator, run_collector(clean_queues, pool.url):
        yield allocator


async def wait_for_letters(pool: Pool, count: int) -> list[dict[str, Any]]:
    """Wait for `count` dead letters; return their rows, the oldest first."""

    async def are_complete() -> bool:
        return bool(await pool.value("SELECT count(*) >= $1 FROM dead_letters", count))

    await wait_until(are_complete)
    rows = await pool.rows("SELECT * FROM dead_letters ORDER BY died_at")
    assert len(rows) == count
    return [dict(row) for row in rows]


async def replay(client: Client, dead_letter_id: uuid.UUID) -> Reply:
    command = ReplayDeadLetter(request_id="r", dead_letter_id=dead_letter_id)
    (reply,) = await client.request([command], queue=topology.ALLOCATOR_MAINTENANCE)
    return reply


async def replay_successfully(client: Client, dead_letter_id: uuid.UUID) -> DeadLetterReplayed:
    reply = await replay(client, dead_letter_id)
    assert isinstance(reply, DeadLetterReplayed), reply
    return reply


async def wait_for_queue(client: Client) -> None:
    """Wait until the commands in the queue of the students have run. The queue keeps the order."""
    await client.request_one(release_command("unknown", "unknown"))


def envelope_of(*commands: dict[str, Any]) -> bytes:
    return json.dumps({"commands": commands}).encode()


ANN = allocate_command("ann").model_dump()
EARLIER = uuid.UUID(int=99)

POISON = {
    "not JSON": (b"\x00\xff nonsense", "not an envelope of commands", []),
    "empty": (b"", "not an envelope of commands", []),
    "no envelope": (b'{"type": "AllocateSandbox"}', "commands: Field required", ["AllocateSandbox"]),
    "unknown type": (envelope_of({"type": "Unheard"}), "Unheard", ["Unheard"]),
    "unknown version": (envelope_of(ANN | {"version": 2}), "version", ["AllocateSandbox"]),
    "wrong schema": (envelope_of(ANN | {"holder": "new\nline"}), "holder", ["AllocateSandbox"]),
    "too big": (
        envelope_of(*[ANN] * (MAX_ENVELOPE + 1)),
        f"List should have at most {MAX_ENVELOPE} items",
        ["AllocateSandbox"],
    ),
    "very big": (b'"' + b"x" * 5_000_000 + b'"', "not an envelope of commands", []),
}


@pytest.mark.parametrize(("body", "reason", "types"), POISON.values(), ids=POISON)
async def test_an_invalid_message_is_stored_with_its_reason_and_does_not_block(
    pool: Pool, running: Allocator, client: Client, body: bytes, reason: str, types: Sequence[str]
) -> None:
    await pool.fill(1)
    correlation_id = await client.publish(body)
    granted_lease(await client.request_one(allocate_command("behind")))
    (letter,) = await wait_for_letters(pool, 1)
    assert reason in letter["reason"]
    assert (letter["queue"], letter["commands"]) == (COMMANDS, types)
    assert letter["body"] == body or json.loads(letter["body"]) == json.loads(body)
    if letter["correlation_id"] is not None:  # a rejected message keeps it, a single command has ids of its own
        assert letter["correlation_id"] == correlation_id
    assert await client.message_count(topology.DEAD_LETTER_QUEUE.name) == 0


async def test_only_the_command_that_fails_is_dead_lettered(
    pool: Pool, clean_queues: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail_for_bob(session: WriteSession, commands: Sequence[Command]) -> list[Reply]:
        if any(getattr(command, "holder", None) == "bob" for command in commands):
            raise KeyError("a bug")
        return await handle(session, commands)

    handle = STUDENTS.handlers[type(allocate_command("bob"))]
    lane = dataclasses.replace(
        STUDENTS, handlers={**STUDENTS.handlers, type(allocate_command("bob")): fail_for_bob}
    )
    monkeypatch.setattr(bus_harness, "STUDENTS", lane)
    await pool.fill(10)
    async with run_allocator(clean_queues, pool.url), run_collector(clean_queues, pool.url):
        replies = await client.request(
            [allocate_command("ann"), allocate_command("bob"), allocate_command("cid"), allocate_command("dan")]
        )
        assert refusal_code(replies.pop(1)) == "INTERNAL_ERROR"
        assert len({granted_lease(reply).sandbox_id for reply in replies}) == 3
        granted_lease(await client.request_one(allocate_command("eve")))
        (letter,) = await wait_for_letters(pool, 1)
        assert letter["reason"] == "KeyError: 'a bug'"
        (command,) = json.loads(letter["body"])["commands"]
        assert command["holder"] == "bob"


async def test_a_message_over_the_delivery_limit_is_stored_with_that_reason(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await client.publish([allocate_command("ann")])
    queue: AbstractQueue = await client.channel.get_queue(COMMANDS)
    deliveries = 0

    async def return_message(message: Any) -> None:
        nonlocal deliveries
        deliveries += 1
        await message.reject(requeue=True)  # RabbitMQ 4.3 does not count basic.nack

    consumer = await queue.consume(return_message)

    async def is_dead_lettered() -> bool:
        return await client.message_count(topology.DEAD_LETTER_QUEUE.name) == 1

    await wait_until(is_dead_lettered)
    await queue.cancel(consumer)
    assert deliveries == 21
    async with run_collector(clean_queues, pool.url):
        (letter,) = await wait_for_letters(pool, 1)
    assert "delivery limit" in letter["reason"]
    assert letter["commands"] == ["AllocateSandbox"]


async def test_a_command_of_another_lane_is_dead_lettered(pool: Pool, running: Allocator, client: Client) -> None:
    reply = await client.request_one(ReplayDeadLetter(request_id="r", dead_letter_id=uuid.uuid4()))
    assert refusal_code(reply) == "INVALID_COMMAND"
    (letter,) = await wait_for_letters(pool, 1)
    assert letter["reason"] == f"ReplayDeadLetter is not for {COMMANDS}"


# Replay


async def test_a_replay_runs_a_failed_release(pool: Pool, running: Allocator, client: Client) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (ended_at IS NULL)")
    try:
        assert refusal_code(await client.request_one(release_command(sandbox_id, "ann"))) == "INTERNAL_ERROR"
        (letter,) = await wait_for_letters(pool, 1)
    finally:
        await pool.execute("ALTER TABLE leases DROP CONSTRAINT test")
    assert await pool.status(sandbox_id) == "allocated"
    answer = await replay_successfully(client, letter["dead_letter_id"])
    assert (answer.queue, answer.published, answer.skipped) == (COMMANDS, True, 0)
    await wait_for_queue(client)
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert await pool.value("SELECT count(*) FROM dead_letters") == 0
    assert refusal_code(await replay(client, letter["dead_letter_id"])) == "DEAD_LETTER_NOT_FOUND"


async def test_a_replay_runs_a_failed_allocation(pool: Pool, running: Allocator, client: Client) -> None:
    await pool.fill(2)
    await pool.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (holder <> 'ann')")
    try:
        assert refusal_code(await client.request_one(allocate_command("ann", key="key"))) == "INTERNAL_ERROR"
        (letter,) = await wait_for_letters(pool, 1)
    finally:
        await pool.execute("ALTER TABLE leases DROP CONSTRAINT test")
    await replay_successfully(client, letter["dead_letter_id"])
    await wait_for_queue(client)
    (lease,) = await pool.rows("SELECT * FROM leases")
    assert (lease["holder"], lease["idempotency_key"]) == ("ann", "key")
    assert (
        granted_lease(await client.request_one(allocate_command("ann", key="key"))).sandbox_id
        == lease["sandbox_id"]
    )


@pytest.mark.parametrize("released", [False, True], ids=["leased", "released"])
@pytest.mark.parametrize("key", [None, "key"])
async def test_a_replay_skips_a_completed_allocation(
    pool: Pool, running: Allocator, client: Client, key: str | None, released: bool
) -> None:
    await pool.fill(3)
    lease = granted_lease(await client.request_one(allocate_command("ann", key=key)))
    if released:
        await client.request_one(release_command(lease.sandbox_id, "ann"))
    dead_letter_id = await pool.dead_letter(allocate_command("ann", key=key))
    answer = await replay_successfully(client, dead_letter_id)
    assert (answer.published, answer.skipped) == (False, 1)
    await wait_for_queue(client)
    assert await pool.column("SELECT sandbox_id FROM leases") == [lease.sandbox_id]
    assert await pool.value("SELECT count(*) FROM dead_letters") == 0


async def test_a_replay_publishes_only_the_open_commands(pool: Pool, running: Allocator, client: Client) -> None:
    await pool.fill(3)
    served = granted_lease(await client.request_one(allocate_command("ann")))
    await client.request_one(release_command(served.sandbox_id, "ann"))
    dead_letter_id = await pool.dead_letter(
        allocate_command("ann"), allocate_command("bob"), release_command(served.sandbox_id, "ann")
    )
    answer = await replay_successfully(client, dead_letter_id)
    assert (answer.published, answer.skipped) == (True, 1)
    await wait_for_queue(client)
    assert sorted(await pool.column("SELECT holder FROM leases")) == ["ann", "bob"]


async def test_an_older_lease_does_not_complete_an_allocation(
    pool: Pool, running: Allocator, client: Client
) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    await client.request_one(release_command(sandbox_id, "ann"))
    await pool.execute("UPDATE leases SET allocated_at = now() - interval '2 hours'")
    await replay_successfully(client, await pool.dead_letter(allocate_command("ann")))
    await wait_for_queue(client)
    assert await pool.value("SELECT count(*) FROM leases WHERE ended_at IS NULL") == 1


async def test_an_invalid_message_is_stored_again_after_its_replay(
    pool: Pool, running: Allocator, client: Client
) -> None:
    await client.publish(b"nonsense")
    (letter,) = await wait_for_letters(pool, 1)
    # Two deaths in the same second with the same ids have one dead-letter id, so move the first one back.
    await pool.execute(
        "UPDATE dead_letters SET died_at = died_at - interval '1 minute', dead_letter_id = $1", EARLIER
    )
    await replay_successfully(client, EARLIER)
    (repeated,) = await wait_for_letters(pool, 1)
    assert repeated["dead_letter_id"] != EARLIER
    for kept in ("queue", "reason", "body", "correlation_id", "message_id"):
        assert repeated[kept] == letter[kept]


async def test_a_dead_letter_of_another_queue_is_not_replayed(
    pool: Pool, running: Allocator, client: Client
) -> None:
    for queue in (topology.DEAD_LETTER_QUEUE.name, client.replies.name, topology.SYNC_TICKS.name, "elsewhere"):
        dead_letter_id = await pool.dead_letter(allocate_command("ann"), queue=queue)
        assert refusal_code(await replay(client, dead_letter_id)) == "NOT_REPLAYABLE"
    assert await pool.value("SELECT count(*) FROM dead_letters") == 4


async def test_a_replay_gives_no_rights_to_commands_of_services(
    pool: Pool, running: Allocator, client: Client
) -> None:
    pending = await pool.pending()
    record = RecordDeletion(sandbox_id=pending)
    queue = topology.ALLOCATOR_MAINTENANCE.name
    alone = await pool.dead_letter(record, BeginListing(), queue=queue)
    assert refusal_code(await replay(client, alone)) == "NOT_REPLAYABLE"
    assert await pool.column("SELECT dead_letter_id FROM dead_letters") == [alone]

    # A sender with the rights of the gateway can add a command of the gateway.
    mixed = await pool.dead_letter(record, RecordJob(job_id=uuid.UUID(int=7), kind="sync"), queue=queue)
    await replay_successfully(client, mixed)
    (letter,) = [letter for letter in await wait_for_letters(pool, 2) if letter["dead_letter_id"] != alone]
    assert letter["commands"] == ["RecordDeletion"]
    assert letter["reason"] == "RecordDeletion may not be sent over the exchange 'broker.commands'"
    assert await pool.status(pending) == "pending_deletion"
    assert await pool.value("SELECT count(*) FROM jobs") == 1
    assert refusal_code(await replay(client, letter["dead_letter_id"])) == "NOT_REPLAYABLE"


async def test_a_dead_letter_stays_if_rabbitmq_does_not_take_it(pool: Pool) -> None:
    """The publisher of the test sessions is not connected."""
    dead_letter_id = await pool.dead_letter(release_command("1", "ann"))
    command = ReplayDeadLetter(request_id="r", dead_letter_id=dead_letter_id)
    reply = await replay_dead_letter(await pool.write_session(), command)
    assert refusal_code(reply) == "ALLOCATOR_UNAVAILABLE"
    assert await pool.column("SELECT dead_letter_id FROM dead_letters") == [dead_letter_id]


async def test_a_drop_removes_one_dead_letter(pool: Pool, running: Allocator, client: Client) -> None:
    one, other = await pool.dead_letter(allocate_command("ann")), await pool.dead_letter(allocate_command("bob"))
    drop = DropDeadLetter(request_id="r", dead_letter_id=one)
    (reply,) = await client.request([drop], queue=topology.ALLOCATOR_MAINTENANCE)
    assert reply == Recorded(changed=True)
    assert await pool.column("SELECT dead_letter_id FROM dead_letters") == [other]
    (reply,) = await client.request([drop], queue=topology.ALLOCATOR_MAINTENANCE)
    assert refusal_code(reply) == "DEAD_LETTER_NOT_FOUND"


# Collector


async def test_a_dead_letter_delivered_twice_is_stored_once(pool: Pool, clean_queues: str, client: Client) -> None:
    """Three collectors are killed between commit and acknowledgement."""
    committed = asyncio.Event()

    class DyingCollector(DeadLetterCollector):
        async def _store(self, deliveries: Sequence[Any]) -> bool:
            await super()._store(deliveries)
            committed.set()
            return False

    await client.publish(b"nonsense")
    async with run_allocator(clean_queues, pool.url):
        engine = connections.create_engine(Primary(pool.url))
        for _ in range(3):
            committed.clear()
            dying = asyncio.create_task(DyingCollector(clean_queues, engine).run())
            await committed.wait()
            await cancel_and_wait(dying)
            await wait_for_letters(pool, 1)
        await engine.dispose()
        async with run_collector(clean_queues, pool.url):
            await client.publish(b"behind it")
            stored = await wait_for_letters(pool, 2)
    assert sorted(letter["body"] for letter in stored) == [b"behind it", b"nonsense"]


async def test_only_the_newest_dead_letters_are_kept(
    pool: Pool, running: Allocator, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter_collector, "MAX_STORED", 3)
    monkeypatch.setattr(dead_letter_collector, "TRIM_PERIOD_SEC", 0)
    for age in range(5):
        old = await pool.dead_letter(allocate_command(f"student-{age}"))
        await pool.execute(
            "UPDATE dead_letters SET died_at = now() - $2 * interval '1 hour' WHERE dead_letter_id = $1",
            old,
            age + 1,
        )
    await client.publish(b"nonsense")

    async def are_trimmed() -> bool:
        return bool(await pool.value("SELECT count(*) = 3 FROM dead_letters"))

    await wait_until(are_trimmed)
    kept = await pool.column("SELECT body FROM dead_letters ORDER BY died_at DESC")
    assert kept == [b"nonsense", *(encode_commands([allocate_command(f"student-{age}")]) for age in range(2))]


async def test_dead_letters_wait_in_their_queue_while_the_database_is_down(
    clean_queues: str, client: Client
) -> None:
    async with PrivatePostgres() as server:
        await migrate(server.url)
        async with run_allocator(clean_queues, server.url), run_collector(clean_queues, server.url):
            async with pool_in(server.url) as pool:
                await client.publish(b"first")
                await wait_for_letters(pool, 1)
            await server.kill()
            await client.publish(b"second")

            async def is_rejected() -> bool:
                return await client.message_count(COMMANDS) == 0

            await wait_until(is_rejected)
            await server.start()
            async with pool_in(server.url) as pool:
                assert [letter["body"] for letter in await wait_for_letters(pool, 2)] == [b"first", b"second"]


@asynccontextmanager
async def limit_deliveries(client: Client, monkeypatch: pytest.MonkeyPatch, limit: int) -> AsyncIterator[None]:
    """Declare the dead-letter queue with a delivery limit, as RabbitMQ 4 does by itself."""
    queue = topology.DEAD_LETTER_QUEUE
    limited = dataclasses.replace(queue, arguments={**queue.arguments, "x-delivery-limit": limit})
    queues = tuple(limited if each is queue else each for each in topology.QUEUES)
    await client.channel.queue_delete(queue.name)
    with monkeypatch.context() as patch:
        patch.setattr(topology, "QUEUES", queues)
        await topology.declare(client.channel)
        try:
            yield
        finally:
            await client.channel.queue_delete(queue.name)
    await topology.declare(client.channel)


READ_ONLY = (
    "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); "
    "PERFORM pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'pool'; END $$"
)
WRITABLE = (
    "SET default_transaction_read_only = off; DO $$ BEGIN "
    "EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database()); "
    "PERFORM pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'pool'; END $$"
)
REFUSING_TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON dead_letters FOR EACH ROW EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize(
    ("refuse", "permit"),
    [(READ_ONLY, WRITABLE), (REFUSING_TRIGGER, "DROP FUNCTION refuse CASCADE")],
    ids=["read-only", "disk full"],
)
async def test_dead_letters_survive_a_database_that_refuses_writes(
    clean_queues: str,
    client: Client,
    new_database: NewDatabase,
    monkeypatch: pytest.MonkeyPatch,
    refuse: str,
    permit: str,
) -> None:
    monkeypatch.setattr(dead_letter_collector, "PAUSE_SEC", 0.02)

    async def wait_for_refusals(count: int) -> None:
        seen = len(logs)

        async def are_logged() -> bool:
            return [line["event"] for line in logs[seen:]].count("dead_letters.postponed") >= count

        await wait_until(are_logged)

    async with new_database() as url, limit_deliveries(client, monkeypatch, 3):
        await migrate(url)
        async with pool_in(url) as pool:
            with capture_logs() as logs:
                async with run_collector(clean_queues, url):
                    await pool.execute(refuse)
                    exchange = await client.channel.get_exchange(topology.DEAD_LETTERS.name, ensure=False)
                    headers: dict[str, Any] = {"x-first-death-reason": "rejected", "x-first-death-queue": COMMANDS}
                    await exchange.publish(aio_pika.Message(b"garbage", headers=headers), COMMANDS)
                    await wait_for_refusals(10)
                for _ in range(4):  # an allocator that is restarted meanwhile takes no message
                    async with run_collector(clean_queues, url):
                        await wait_for_refusals(1)
                await pool.execute(permit)
                async with run_collector(clean_queues, url):
                    assert [letter["body"] for letter in await wait_for_letters(pool, 1)] == [b"garbage"]
