"""Commands from the queue: answered in order, the poisonous ones apart, and never lost while something is down."""

import asyncio
import dataclasses
import json
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest
from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from allocator.lanes import STUDENTS
from devstack.postgres import PrivatePostgres
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import (
    ApplyListing,
    BeginListing,
    ClaimDeletions,
    EndCleanup,
    ExpireLeases,
    ListedAccount,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    StageListing,
    SyncPool,
)
from sandbox_broker.contract.replies import SandboxReleased
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.migrate import migrate

from . import bus_harness
from .allocator_harness import RUN, Pool, ask, done, granted, pool_in, refusal, release, until
from .bus_harness import Allocator, Client, allocator


def reason(message: AbstractIncomingMessage) -> str:
    return str(message.headers["x-reason"])


async def test_replies_come_in_the_order_of_the_envelope(pool: Pool, running: Allocator, asking: Client) -> None:
    leased = await pool.lease("ann")
    await pool.fill(2)
    replies = await asking.ask(
        [ask("cid"), done(leased, "ann"), done("unknown", "ann"), ask("dan"), BeginListing(), ask("eve")]
    )
    assert [reply.type for reply in replies] == [
        "LeaseGranted",
        "SandboxReleased",
        "Refused",
        "LeaseGranted",
        "Refused",
        "Refused",
    ]
    assert [refusal(replies[place]) for place in (2, 4, 5)] == [
        "SANDBOX_NOT_FOUND",
        "INVALID_COMMAND",
        "POOL_EXHAUSTED",
    ]
    await pool.sound()


async def test_maintenance_is_done_in_the_order_of_the_envelope(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    overdue, pending = await pool.overdue("bob"), await pool.pending()
    replies = await asking.ask(
        [
            EndCleanup(run_id=RUN),
            RecordDeletion(sandbox_id=pending),
            ExpireLeases(grace_sec=0, limit=10),
            ask("dan"),
            ClaimDeletions(run_id=RUN, limit=10, claim_sec=60),
            RecordDeletionFailure(run_id=RUN, sandbox_id="unknown", attempts=0, error="", retry_in_sec=1),
        ],
        queue=topology.ALLOCATOR_MAINTENANCE,
    )
    assert [reply.type for reply in replies] == [
        "Recorded",
        "Recorded",
        "LeasesExpired",
        "Refused",
        "DeletionsClaimed",
        "Recorded",
    ]
    # Of the types above.
    assert replies[2].sandbox_ids == (overdue,)  # type: ignore[union-attr]
    assert [due.sandbox_id for due in replies[4].deletions] == [overdue]  # type: ignore[union-attr]


async def test_a_student_does_not_wait_for_maintenance(pool: Pool, running: Allocator, asking: Client) -> None:
    await pool.fill(1)
    pending = await pool.pending()
    record = [RecordDeletion(sandbox_id=pending)]
    async with pool_in(pool.url) as operator:
        await operator.execute("BEGIN")
        await operator.execute("SELECT FROM sandboxes WHERE sandbox_id = $1 FOR UPDATE", pending)
        recording = await asking.publish(record, queue=topology.ALLOCATOR_MAINTENANCE)
        await until(
            lambda: pool.value(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1 "
                "AND cardinality(pg_blocking_pids(pid)) > 0)",
                topology.ALLOCATOR_MAINTENANCE.name,
            )
        )
        granted(await asking.ask_one(ask("ann")))
    await asking.answers(recording)


async def test_a_poisonous_entry_is_refused_and_kept_while_its_neighbours_succeed(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    await pool.fill(2)
    commands = [
        ask("ann").model_dump(),
        {"type": "AllocateSandbox", "request_id": "r", "holder": "new\nline"},
        {"type": "Unheard", "secret": 1},
        "nonsense",
        ask("bob").model_dump() | {"version": 2},
        SyncPool(request_id="r").model_dump(),
        ask("bob").model_dump() | {"from_a_newer_sender": True},
    ]
    replies = await asking.ask(json.dumps({"commands": commands}).encode())
    assert [reply.type for reply in replies] == ["LeaseGranted", *5 * ["Refused"], "LeaseGranted"]
    assert {refusal(reply) for reply in replies[1:6]} == {"INVALID_COMMAND"}
    kept = await asking.dead_letters(5)
    assert sorted(json.dumps(json.loads(message.body)) for message in kept) == sorted(
        json.dumps({"commands": [command]}) for command in commands[1:6]
    )
    assert any("holder" in reason(message) for message in kept)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b"{}", b'{"commands": []}', b'{"commands": 7}'])
async def test_what_is_no_envelope_goes_to_the_dead_letters_and_blocks_nobody(
    pool: Pool, running: Allocator, asking: Client, body: bytes
) -> None:
    await pool.fill(1)
    await asking.publish(body)
    granted(await asking.ask_one(ask("ann")))
    (message,) = await asking.dead_letters(1)
    assert message.body == body
    assert message.headers["x-first-death-reason"] == "rejected"


@pytest.mark.parametrize(
    "poison",
    [
        ExpireLeases.model_construct(grace_sec=1e300, limit=1),
        ClaimDeletions.model_construct(run_id=RUN, limit=1, claim_sec=float("inf")),
        RecordDeletionFailure.model_construct(run_id=RUN, sandbox_id="1", attempts=2**40, error="", retry_in_sec=1),
    ],
    ids=repr,
)
async def test_a_number_that_the_database_cannot_hold_is_refused_and_kept(
    running: Allocator, asking: Client, poison: ExpireLeases
) -> None:
    behind = EndCleanup(run_id=RUN).model_dump(mode="json")
    body = json.dumps({"commands": [poison.model_dump(mode="json"), behind]}).encode()
    replies = await asking.ask(body, queue=topology.ALLOCATOR_MAINTENANCE, exchange=topology.COMMANDS_FROM_REAPER)
    assert refusal(replies[0]) in ("INTERNAL_ERROR", "INVALID_COMMAND")
    assert replies[1].type == "Recorded"
    await asking.dead_letters(1)


async def test_a_listing_with_the_rights_of_the_gateway_changes_nothing(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    """An account that was never in the pool would be leased, and then deleted."""
    forged = ListedAccount(sandbox_id="999", external_id="of-a-customer", name="sandbox-999")
    listing = (
        BeginListing(),
        StageListing(listing_id=1, accounts=(forged,)),
        ApplyListing(listing_id=1, total=1, max_stale_fraction=1, force=True),
    )
    job = RecordJob(job_id=RUN, kind="sync")
    replies = await asking.ask([*listing, job], queue=topology.ALLOCATOR_MAINTENANCE, exchange=topology.COMMANDS)
    assert [refusal(reply) for reply in replies[:3]] == ["INVALID_COMMAND"] * 3
    assert replies[3].type == "Recorded", "the gateway may send this one"
    assert await pool.value("SELECT count(*) FROM sandboxes") == 0
    assert await pool.value("SELECT count(*) FROM csp_listings") == 0
    reasons = [reason(message) for message in await asking.dead_letters(3)]
    assert reasons == [f"{command.type} may not be sent over the exchange 'broker.commands'" for command in listing]


async def test_what_the_database_refuses_is_singled_out_of_a_large_batch(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    await pool.fill(200)
    await pool.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (holder <> 'student-77')")
    try:
        replies = await asking.ask([ask(f"student-{number}") for number in range(200)])
    finally:
        await pool.execute("ALTER TABLE leases DROP CONSTRAINT test")
    assert refusal(replies.pop(77)) == "INTERNAL_ERROR"
    assert len({granted(reply).sandbox_id for reply in replies}) == 199
    (message,) = await asking.dead_letters(1)
    (command,) = json.loads(message.body)["commands"]
    assert command["holder"] == "student-77"
    granted(await asking.ask_one(ask("student-77")))
    await pool.sound()


async def test_every_message_delivered_twice_gives_the_same_answers_and_no_second_effect(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    await pool.fill(30)

    async def student(name: str) -> None:
        first = await asking.publish([ask(name, key=name), ask("copy")], times=2)
        (lease, _), (again, _) = await asking.answers(first, times=2)
        assert granted(lease).model_copy(update={"new": False}) == granted(again).model_copy(update={"new": False})
        second = await asking.publish([done(granted(lease).sandbox_id, name)], times=2)
        (over,), (over_again,) = await asking.answers(second, times=2)
        assert isinstance(over, SandboxReleased)
        assert over == over_again

    await asyncio.gather(*(student(f"student-{number}") for number in range(20)))
    assert await pool.value("SELECT count(*) FROM leases") == 21
    await pool.sound()


async def test_an_allocation_that_comes_again_behind_its_answer_takes_no_second_sandbox(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    """Both wait when the allocator starts, so they are in one batch."""
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    first = await asking.publish([ask("ann")])
    second = await asking.publish([done(sandbox_id, "ann")])
    async with allocator(clean_queues, pool.url):
        ((again,),) = await asking.answers(first)
        ((over,),) = await asking.answers(second)
    assert granted(again).sandbox_id == sandbox_id
    assert over.type == "SandboxReleased"
    assert await pool.value("SELECT count(*) FROM leases") == 1


async def test_an_allocation_that_is_delivered_again_when_its_lease_has_ended_takes_no_second_sandbox(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await pool.fill(3)
    async with allocator(clean_queues, pool.url):
        lease = granted(await asking.ask_one(ask("ann")))
        assert (await asking.ask_one(done(lease.sandbox_id, "ann"))).type == "SandboxReleased"
    envelope = await asking.publish([ask("ann"), ask("bob")])
    await asking.hand_back(topology.ALLOCATOR_COMMANDS)
    async with allocator(clean_queues, pool.url):
        ((over, other),) = await asking.answers(envelope)
        assert refusal(over) == "ALLOCATOR_UNAVAILABLE"
        assert granted(other).new  # nothing of bob's has ended: it was not done before
        assert granted(await asking.ask_one(ask("ann"))).new  # another request is another matter
    await pool.sound()


async def test_a_copy_of_an_allocation_that_comes_when_the_student_has_left_takes_no_second_sandbox(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    """Nothing of it is in the database: it was answered with the lease that the student had."""
    await pool.fill(2)
    lease = granted(await asking.ask_one(ask("ann")))
    repeated = await asking.publish([ask("ann")])
    await asking.answers(repeated)
    await asking.ask_one(done(lease.sandbox_id, "ann"))
    await asking.publish([ask("ann")], copy_of=repeated)
    _, (late,) = await asking.answers(repeated, times=2)
    assert refusal(late) == "ALLOCATOR_UNAVAILABLE"
    assert await pool.value("SELECT count(*) FROM leases") == 1
    await pool.sound()


async def test_an_allocation_with_a_key_is_done_when_it_is_delivered_again_unless_the_key_was_used(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await pool.fill(2)
    async with allocator(clean_queues, pool.url):
        lease = granted(await asking.ask_one(ask("ann", key="monday")))
        assert (await asking.ask_one(done(lease.sandbox_id, "ann"))).type == "SandboxReleased"
    monday, tuesday = [await asking.publish([ask("ann", key=key)]) for key in ("monday", "tuesday")]
    await asking.hand_back(topology.ALLOCATOR_COMMANDS)
    async with allocator(clean_queues, pool.url):
        ((over,),), ((new,),) = await asking.answers(monday), await asking.answers(tuesday)
    assert refusal(over) == "IDEMPOTENCY_KEY_CONFLICT"
    assert granted(new).new


async def test_an_allocation_that_is_delivered_again_while_its_lease_lasts_gives_that(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await release(await pool.writer(), done(await pool.lease("ann"), "ann"))
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    envelope = await asking.publish([ask("ann")])
    await asking.hand_back(topology.ALLOCATOR_COMMANDS)
    async with allocator(clean_queues, pool.url):
        ((again,),) = await asking.answers(envelope)
    assert granted(again).sandbox_id == sandbox_id


async def test_whose_reply_queue_is_gone_costs_nobody_else_anything(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await pool.fill(2)
    async with allocator(clean_queues, pool.url):
        await asking.publish([ask("ann")], reply_to="gone")
        granted(await asking.ask_one(ask("bob")))
        assert await pool.value("SELECT count(*) FROM leases") == 2
    assert await asking.waiting(topology.ALLOCATOR_COMMANDS.name) == 0


class Interrupted(Publisher):
    """Loses its connection at the first reply, when it has sent nothing."""

    lost = False

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: Basic.Properties | None = None,
        *,
        mandatory: bool = True,
        timeout_sec: float = 5,
    ) -> None:
        if exchange == topology.REPLIES.name and not self.lost:
            self.lost = True
            assert self._channel is not None
            await self._channel.connection.close()
            raise Disconnected("on purpose")
        await super().publish(exchange, routing_key, body, properties, mandatory=mandatory, timeout_sec=timeout_sec)


async def test_a_reply_that_could_not_be_sent_is_sent_when_the_connection_is_back(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await pool.fill(1)
    publisher = Interrupted(clean_queues, "interrupted")
    async with allocator(clean_queues, pool.url, publisher=publisher):
        lease = granted(await asking.ask_one(ask("ann")))
        assert publisher.lost
        assert lease.new


async def test_a_connection_that_the_server_has_ended_is_replaced_without_anybody_noticing(
    pool: Pool, running: Allocator, asking: Client
) -> None:
    await pool.fill(10)
    for number in range(10):
        granted(await asking.ask_one(ask(f"student-{number}")))
        await pool.value(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = $1 AND datname = current_database()",
            topology.ALLOCATOR_COMMANDS.name,
        )
    await pool.sound()


async def test_a_consumer_that_is_fenced_leaves_its_messages_to_the_next(
    pool: Pool, clean_queues: str, asking: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pool.fill(3)
    async with allocator(clean_queues, pool.url) as one:
        granted(await asking.ask_one(ask("ann")))
        in_line = asyncio.Event()
        batch = Subscription.batch

        async def waits_for_a_batch(subscription: Subscription, limit: int) -> list[DeliveredMessage]:
            in_line.set()  # RabbitMQ does not tell of consumers that are not the active one
            return await batch(subscription, limit)

        monkeypatch.setattr(Subscription, "batch", waits_for_a_batch)
        async with allocator(clean_queues, pool.url) as other:
            await asyncio.wait_for(in_line.wait(), 20)
            assert (one.consumer._epoch > 0, other.consumer._epoch) == (True, 0)
            await pool.execute("UPDATE allocator_epoch SET epoch = nextval('allocator_epochs')")
            granted(await asking.ask_one(ask("bob")))
            assert other.consumer._epoch > 0
            granted(await asking.ask_one(ask("cid")))
    assert await asking.waiting(topology.ALLOCATOR_COMMANDS.name) == 0
    await pool.sound()


@pytest.fixture(scope="module")
async def private_server() -> AsyncIterator[PrivatePostgres]:
    async with PrivatePostgres() as postgres:
        await migrate(postgres.url)
        yield postgres


@pytest.fixture
async def server(private_server: PrivatePostgres) -> PrivatePostgres:
    """A database server of our own, with an empty pool."""
    async with pool_in(private_server.url) as pool:
        await pool.execute(
            "TRUNCATE sandboxes, leases, outbox, history, pool_changes, pool_counts, jobs, dead_letters"
        )
    return private_server


async def test_while_the_database_is_away_commands_are_refused_at_once_and_then_it_works_again(
    server: PrivatePostgres, clean_queues: str, asking: Client
) -> None:
    async with allocator(clean_queues, server.url):
        async with pool_in(server.url) as pool:
            await pool.fill(50)
            lease = granted(await asking.ask_one(ask("ann")))
        await server.kill()
        for number in range(20):
            replies = await asking.ask([ask("ann"), done("1", "bob"), ask(f"student-{number}")])
            assert {refusal(reply) for reply in replies} == {"ALLOCATOR_UNAVAILABLE"}
        await server.start()

        async def works() -> bool:
            reply = await asking.ask_one(ask("ann"))
            return reply == lease.model_copy(update={"new": False})

        await until(works)
    assert await asking.waiting(topology.DEAD_LETTER_QUEUE.name) == 0


async def test_a_database_that_hangs_costs_its_time_once(
    server: PrivatePostgres, clean_queues: str, asking: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = dataclasses.replace(STUDENTS, statement_timeout_sec=0.5)
    monkeypatch.setattr(bus_harness, "STUDENTS", impatient)
    async with allocator(clean_queues, server.url), pool_in(server.url) as pool:
        await pool.fill(2)
        granted(await asking.ask_one(ask("ann")))
        backends = await pool.column(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'allocator%' AND pid <> pg_backend_pid()"
        )
        assert server.process is not None
        frozen = [server.process.pid, *backends]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert refusal(await asking.ask_one(ask("bob"))) == "ALLOCATOR_UNAVAILABLE"
            waited_sec, began = time.monotonic() - began, time.monotonic()
            assert refusal(await asking.ask_one(ask("cid"))) == "ALLOCATOR_UNAVAILABLE"
            assert time.monotonic() - began < waited_sec / 2
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)

        async def works() -> bool:
            return (await asking.ask_one(ask("bob"))).type == "LeaseGranted"

        await until(works)
