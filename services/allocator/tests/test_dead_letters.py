"""What cannot be processed: it is kept with the reason, it blocks nothing, and replaying it does nothing twice."""

import asyncio
import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aio_pika.abc import AbstractQueue

from allocator import dead_letters
from allocator.dead_letters import Collector
from allocator.handlers.dead_letters import replay_dead_letter
from allocator.lanes import STUDENTS
from allocator.writer import Writer
from devstack.postgres import PrivatePostgres
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
from sandbox_broker.migrate import migrate
from sandbox_broker.runtime.service import cancel

from . import bus_harness
from .allocator_harness import Pool, ask, done, granted, pool_in, refusal, until
from .bus_harness import Allocator, Client, allocator

COMMANDS = topology.ALLOCATOR_COMMANDS.name


@asynccontextmanager
async def collecting(amqp_url: str, database_url: str) -> AsyncIterator[Collector]:
    engine = connections.engine(database_url, pool_size=1, max_overflow=1)
    collector = Collector(amqp_url, engine)
    task = asyncio.create_task(collector.run())
    try:
        yield collector
    finally:
        await cancel(task)
        await engine.dispose()
    assert task.cancelled(), task.exception()


@pytest.fixture
async def running(clean_queues: str, pool: Pool) -> AsyncIterator[Allocator]:
    async with allocator(clean_queues, pool.url) as found, collecting(clean_queues, pool.url):
        yield found


async def letters(pool: Pool, count: int) -> list[dict[str, Any]]:
    """Waits for as many; the oldest first."""

    async def there() -> bool:
        return bool(await pool.value("SELECT count(*) >= $1 FROM dead_letters", count))

    await until(there)
    rows = await pool.rows("SELECT * FROM dead_letters ORDER BY died_at")
    assert len(rows) == count
    return [dict(row) for row in rows]


async def replay(asking: Client, dead_letter_id: uuid.UUID) -> Reply:
    command = ReplayDeadLetter(request_id="r", dead_letter_id=dead_letter_id)
    (reply,) = await asking.ask([command], queue=topology.ALLOCATOR_MAINTENANCE)
    return reply


async def replayed(asking: Client, dead_letter_id: uuid.UUID) -> DeadLetterReplayed:
    reply = await replay(asking, dead_letter_id)
    assert isinstance(reply, DeadLetterReplayed), reply
    return reply


async def worked_off(asking: Client) -> None:
    """Returns when what is in the students' queue by now has been handled: their lane keeps the order."""
    await asking.ask_one(done("unknown", "nobody"))


def of(*commands: dict[str, Any]) -> bytes:
    return json.dumps({"commands": commands}).encode()


ANN = ask("ann").model_dump()
EARLIER = uuid.UUID(int=99)

POISON = {
    "not JSON": (b"\x00\xff nonsense", "It is no envelope of commands", []),
    "empty": (b"", "It is no envelope of commands", []),
    "no envelope": (b'{"type": "AllocateSandbox"}', "commands: Field required", ["AllocateSandbox"]),
    "unknown type": (of({"type": "Unheard"}), "Unheard", ["Unheard"]),
    "unknown version": (of(ANN | {"version": 2}), "version", ["AllocateSandbox"]),
    "wrong schema": (of(ANN | {"holder": "new\nline"}), "holder", ["AllocateSandbox"]),
    "too big": (
        of(*[ANN] * (MAX_ENVELOPE + 1)),
        f"List should have at most {MAX_ENVELOPE} items",
        ["AllocateSandbox"],
    ),
    "very big": (b'"' + b"x" * 5_000_000 + b'"', "It is no envelope of commands", []),
}


@pytest.mark.parametrize(("body", "reason", "types"), POISON.values(), ids=POISON)
async def test_poison_is_kept_with_its_reason_and_what_is_behind_it_is_answered(
    pool: Pool, running: Allocator, asking: Client, body: bytes, reason: str, types: Sequence[str]
) -> None:
    await pool.fill(1)
    correlation_id = await asking.publish(body)
    granted(await asking.ask_one(ask("behind")))
    (letter,) = await letters(pool, 1)
    assert reason in letter["reason"]
    assert (letter["queue"], letter["commands"]) == (COMMANDS, types)
    assert letter["body"] == body or json.loads(letter["body"]) == json.loads(body)
    if letter["correlation_id"] is not None:  # what was rejected whole keeps it; else the command has its own ids
        assert letter["correlation_id"] == correlation_id
    assert await asking.waiting(topology.DEAD_LETTER_QUEUE.name) == 0


async def test_a_command_whose_handler_always_raises_is_kept_alone(
    pool: Pool, clean_queues: str, asking: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(writer: Writer, commands: Sequence[Command]) -> list[Reply]:
        if any(getattr(command, "holder", None) == "bob" for command in commands):
            raise KeyError("a fault of ours")
        return await handle(writer, commands)

    handle = STUDENTS.handlers[type(ask("bob"))]
    lane = dataclasses.replace(STUDENTS, handlers={**STUDENTS.handlers, type(ask("bob")): broken})
    monkeypatch.setattr(bus_harness, "STUDENTS", lane)
    await pool.fill(10)
    async with allocator(clean_queues, pool.url), collecting(clean_queues, pool.url):
        replies = await asking.ask([ask("ann"), ask("bob"), ask("cid"), ask("dan")])
        assert refusal(replies.pop(1)) == "INTERNAL_ERROR"
        assert len({granted(reply).sandbox_id for reply in replies}) == 3
        granted(await asking.ask_one(ask("eve")))
        (letter,) = await letters(pool, 1)
        assert letter["reason"] == "KeyError: 'a fault of ours'"
        (command,) = json.loads(letter["body"])["commands"]
        assert command["holder"] == "bob"


async def test_what_was_delivered_in_vain_says_so(pool: Pool, clean_queues: str, asking: Client) -> None:
    await asking.publish([ask("ann")])
    queue: AbstractQueue = await asking.channel.get_queue(COMMANDS)
    died = 0

    async def die(message: Any) -> None:
        nonlocal died
        died += 1
        await message.nack(requeue=True)

    consumer = await queue.consume(die)

    async def dead() -> bool:
        return await asking.waiting(topology.DEAD_LETTER_QUEUE.name) == 1

    await until(dead)
    await queue.cancel(consumer)
    assert died == 21
    async with collecting(clean_queues, pool.url):
        (letter,) = await letters(pool, 1)
    assert "again and again in vain" in letter["reason"]
    assert letter["commands"] == ["AllocateSandbox"]


async def test_a_command_of_another_lane_is_refused_and_kept(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    reply = await asking.ask_one(ReplayDeadLetter(request_id="r", dead_letter_id=uuid.uuid4()))
    assert refusal(reply) == "INVALID_COMMAND"
    (letter,) = await letters(pool, 1)
    assert letter["reason"] == f"ReplayDeadLetter is not for {COMMANDS}"


# Replay


async def test_a_release_that_failed_is_carried_out_by_its_replay(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (ended_at IS NULL)")
    try:
        assert refusal(await asking.ask_one(done(sandbox_id, "ann"))) == "INTERNAL_ERROR"
        (letter,) = await letters(pool, 1)
    finally:
        await pool.execute("ALTER TABLE leases DROP CONSTRAINT test")
    assert await pool.status(sandbox_id) == "allocated"
    answer = await replayed(asking, letter["dead_letter_id"])
    assert (answer.queue, answer.published, answer.skipped) == (COMMANDS, True, 0)
    await worked_off(asking)
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert await pool.value("SELECT count(*) FROM dead_letters") == 0
    assert refusal(await replay(asking, letter["dead_letter_id"])) == "DEAD_LETTER_NOT_FOUND"


async def test_an_allocation_that_failed_is_carried_out_by_its_replay(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    await pool.fill(2)
    await pool.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (holder <> 'ann')")
    try:
        assert refusal(await asking.ask_one(ask("ann", key="key"))) == "INTERNAL_ERROR"
        (letter,) = await letters(pool, 1)
    finally:
        await pool.execute("ALTER TABLE leases DROP CONSTRAINT test")
    await replayed(asking, letter["dead_letter_id"])
    await worked_off(asking)
    (lease,) = await pool.rows("SELECT * FROM leases")
    assert (lease["holder"], lease["idempotency_key"]) == ("ann", "key")
    assert granted(await asking.ask_one(ask("ann", key="key"))).sandbox_id == lease["sandbox_id"]


@pytest.mark.parametrize("over", [False, True], ids=["has it still", "has given it back"])
@pytest.mark.parametrize("key", [None, "key"])
async def test_replaying_an_allocation_that_was_carried_out_gives_no_second_sandbox(
    pool: Pool, running: Allocator, asking: Client, key: str | None, over: bool
) -> None:
    await pool.fill(3)
    lease = granted(await asking.ask_one(ask("ann", key=key)))
    if over:
        await asking.ask_one(done(lease.sandbox_id, "ann"))
    dead_letter_id = await pool.dead_letter(ask("ann", key=key))
    answer = await replayed(asking, dead_letter_id)
    assert (answer.published, answer.skipped) == (False, 1)
    await worked_off(asking)
    assert await pool.column("SELECT sandbox_id FROM leases") == [lease.sandbox_id]
    assert await pool.value("SELECT count(*) FROM dead_letters") == 0


async def test_of_an_envelope_only_what_is_still_open_is_put_back(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    await pool.fill(3)
    served = granted(await asking.ask_one(ask("ann")))
    await asking.ask_one(done(served.sandbox_id, "ann"))
    dead_letter_id = await pool.dead_letter(ask("ann"), ask("bob"), done(served.sandbox_id, "ann"))
    answer = await replayed(asking, dead_letter_id)
    assert (answer.published, answer.skipped) == (True, 1)
    await worked_off(asking)
    assert sorted(await pool.column("SELECT holder FROM leases")) == ["ann", "bob"]


async def test_a_lease_of_another_day_does_not_count_as_the_answer(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    await asking.ask_one(done(sandbox_id, "ann"))
    await pool.execute("UPDATE leases SET allocated_at = now() - interval '2 hours'")
    await replayed(asking, await pool.dead_letter(ask("ann")))
    await worked_off(asking)
    assert await pool.value("SELECT count(*) FROM leases WHERE ended_at IS NULL") == 1


async def test_what_is_still_poison_becomes_a_new_letter(pool: Pool, running: Allocator, asking: Client) -> None:
    await asking.publish(b"nonsense")
    (letter,) = await letters(pool, 1)
    # As if it had died earlier: what dies twice in one second with the same ids is one letter.
    await pool.execute(
        "UPDATE dead_letters SET died_at = died_at - interval '1 minute', dead_letter_id = $1", EARLIER
    )
    await replayed(asking, EARLIER)
    (again,) = await letters(pool, 1)
    assert again["dead_letter_id"] != EARLIER
    for kept in ("queue", "reason", "body", "correlation_id", "message_id"):
        assert again[kept] == letter[kept]


async def test_a_letter_of_a_queue_that_is_none_of_work_is_not_put_there(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    for queue in (topology.DEAD_LETTER_QUEUE.name, asking.replies.name, topology.SYNC_TICKS.name, "elsewhere"):
        dead_letter_id = await pool.dead_letter(ask("ann"), queue=queue)
        assert refusal(await replay(asking, dead_letter_id)) == "NOT_REPLAYABLE"
    assert await pool.value("SELECT count(*) FROM dead_letters") == 4


async def test_what_only_services_may_send_gains_no_right_by_a_replay(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    pending = await pool.pending()
    record = RecordDeletion(sandbox_id=pending)
    queue = topology.ALLOCATOR_MAINTENANCE.name
    alone = await pool.dead_letter(record, BeginListing(), queue=queue)
    assert refusal(await replay(asking, alone)) == "NOT_REPLAYABLE"
    assert await pool.column("SELECT dead_letter_id FROM dead_letters") == [alone]

    # Beside a command of the gateway, as a sender with the gateway's rights can put it.
    mixed = await pool.dead_letter(record, RecordJob(job_id=uuid.UUID(int=7), kind="sync"), queue=queue)
    await replayed(asking, mixed)
    (letter,) = [letter for letter in await letters(pool, 2) if letter["dead_letter_id"] != alone]
    assert letter["commands"] == ["RecordDeletion"]
    assert letter["reason"] == "RecordDeletion may not be sent over the exchange 'broker.commands'"
    assert await pool.status(pending) == "pending_deletion"
    assert await pool.value("SELECT count(*) FROM jobs") == 1
    assert refusal(await replay(asking, letter["dead_letter_id"])) == "NOT_REPLAYABLE"


async def test_a_letter_that_rabbitmq_does_not_take_stays(pool: Pool) -> None:
    """The pool's writers have a publisher that is not connected."""
    dead_letter_id = await pool.dead_letter(done("1", "ann"))
    command = ReplayDeadLetter(request_id="r", dead_letter_id=dead_letter_id)
    reply = await replay_dead_letter(await pool.writer(), command)
    assert refusal(reply) == "ALLOCATOR_UNAVAILABLE"
    assert await pool.column("SELECT dead_letter_id FROM dead_letters") == [dead_letter_id]


async def test_dropping_forgets_one(pool: Pool, running: Allocator, asking: Client) -> None:
    one, other = await pool.dead_letter(ask("ann")), await pool.dead_letter(ask("bob"))
    drop = DropDeadLetter(request_id="r", dead_letter_id=one)
    (reply,) = await asking.ask([drop], queue=topology.ALLOCATOR_MAINTENANCE)
    assert reply == Recorded(changed=True)
    assert await pool.column("SELECT dead_letter_id FROM dead_letters") == [other]
    (reply,) = await asking.ask([drop], queue=topology.ALLOCATOR_MAINTENANCE)
    assert refusal(reply) == "DEAD_LETTER_NOT_FOUND"


# Carrying


async def test_a_letter_that_is_delivered_twice_is_kept_once(pool: Pool, clean_queues: str, asking: Client) -> None:
    """By three collectors, each killed between the commit and its acknowledgement."""
    committed = asyncio.Event()

    class Dies(Collector):
        async def _keep(self, deliveries: Sequence[Any]) -> bool:
            await super()._keep(deliveries)
            committed.set()
            return False

    await asking.publish(b"nonsense")
    async with allocator(clean_queues, pool.url):
        engine = connections.engine(pool.url)
        for _ in range(3):
            committed.clear()
            dying = asyncio.create_task(Dies(clean_queues, engine).run())
            await committed.wait()
            await cancel(dying)
            await letters(pool, 1)
        await engine.dispose()
        async with collecting(clean_queues, pool.url):
            await asking.publish(b"behind it")
            found = await letters(pool, 2)
    assert sorted(letter["body"] for letter in found) == [b"behind it", b"nonsense"]


async def test_of_very_many_the_newest_are_kept(
    pool: Pool, running: Allocator, asking: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "MAX_KEPT", 3)
    monkeypatch.setattr(dead_letters, "FORGET_PERIOD_SEC", 0)
    for age in range(5):
        old = await pool.dead_letter(ask(f"student-{age}"))
        await pool.execute(
            "UPDATE dead_letters SET died_at = now() - $2 * interval '1 hour' WHERE dead_letter_id = $1",
            old,
            age + 1,
        )
    await asking.publish(b"nonsense")

    async def three_are_left() -> bool:
        return bool(await pool.value("SELECT count(*) = 3 FROM dead_letters"))

    await until(three_are_left)
    kept = await pool.column("SELECT body FROM dead_letters ORDER BY died_at DESC")
    assert kept == [b"nonsense", *(encode_commands([ask(f"student-{age}")]) for age in range(2))]


async def test_letters_wait_in_their_queue_while_the_database_is_away(clean_queues: str, asking: Client) -> None:
    async with PrivatePostgres() as server:
        await migrate(server.url)
        async with allocator(clean_queues, server.url), collecting(clean_queues, server.url):
            async with pool_in(server.url) as pool:
                await asking.publish(b"first")
                await letters(pool, 1)
            await server.kill()
            await asking.publish(b"second")

            async def rejected() -> bool:
                return await asking.waiting(COMMANDS) == 0

            await until(rejected)
            await server.start()
            async with pool_in(server.url) as pool:
                assert [letter["body"] for letter in await letters(pool, 2)] == [b"first", b"second"]
