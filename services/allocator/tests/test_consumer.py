"""Consumer and dispatcher: order of replies, isolation of failing commands, redelivery, outages."""

import asyncio
import dataclasses
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from allocator import consumer
from allocator.routing import STUDENTS
from devstack.conditions import wait_until
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
from sandbox_broker.messaging import subscription
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.migrate import migrate
from sandbox_broker.observability import logging

from . import bus_harness
from .allocator_harness import (
    RUN,
    Pool,
    allocate_command,
    granted_lease,
    pool_in,
    refusal_code,
    release,
    release_command,
)
from .bus_harness import Allocator, Client, run_allocator


def reason(message: AbstractIncomingMessage) -> str:
    return str(message.headers["x-reason"])


async def test_replies_are_in_the_order_of_the_envelope(pool: Pool, running: Allocator, client: Client) -> None:
    leased = await pool.lease("ann")
    await pool.fill(2)
    replies = await client.request(
        [
            allocate_command("cid"),
            release_command(leased, "ann"),
            release_command("unknown", "ann"),
            allocate_command("dan"),
            BeginListing(),
            allocate_command("eve"),
        ]
    )
    assert [reply.type for reply in replies] == [
        "LeaseGranted",
        "SandboxReleased",
        "Refused",
        "LeaseGranted",
        "Refused",
        "Refused",
    ]
    assert [refusal_code(replies[index]) for index in (2, 4, 5)] == [
        "SANDBOX_NOT_FOUND",
        "INVALID_COMMAND",
        "POOL_EXHAUSTED",
    ]
    await pool.assert_sound()


async def test_log_lines_of_a_batch_are_written_before_its_replies(
    pool: Pool, running: Allocator, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    publish_replies = subscription.publish_replies

    def flush() -> None:
        steps.append("lines")

    async def record_and_publish(*arguments: Any) -> None:
        steps.append("replies")
        await publish_replies(*arguments)

    monkeypatch.setattr(logging, "flush", flush)
    monkeypatch.setattr(consumer, "publish_replies", record_and_publish)
    await pool.fill(1)
    await client.request([allocate_command("cid")])
    assert steps == ["lines", "replies"]


async def test_maintenance_commands_run_in_the_order_of_the_envelope(
    pool: Pool, running: Allocator, client: Client
) -> None:
    overdue, pending = await pool.overdue("bob"), await pool.pending()
    replies = await client.request(
        [
            EndCleanup(run_id=RUN),
            RecordDeletion(sandbox_id=pending),
            ExpireLeases(grace_sec=0, limit=10),
            allocate_command("dan"),
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
    # The types were checked above.
    assert replies[2].sandbox_ids == (overdue,)  # type: ignore[union-attr]
    assert [due.sandbox_id for due in replies[4].deletions] == [overdue]  # type: ignore[union-attr]


async def test_students_do_not_wait_for_maintenance(pool: Pool, running: Allocator, client: Client) -> None:
    await pool.fill(1)
    pending = await pool.pending()
    record = [RecordDeletion(sandbox_id=pending)]
    async with pool_in(pool.url) as operator:
        await operator.execute("BEGIN")
        await operator.execute("SELECT FROM sandboxes WHERE sandbox_id = $1 FOR UPDATE", pending)
        recording = await client.publish(record, queue=topology.ALLOCATOR_MAINTENANCE)
        await wait_until(
            lambda: pool.value(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1 "
                "AND cardinality(pg_blocking_pids(pid)) > 0)",
                topology.ALLOCATOR_MAINTENANCE.name,
            )
        )
        granted_lease(await client.request_one(allocate_command("ann")))
    await client.replies_to(recording)


async def test_an_invalid_command_is_dead_lettered_and_the_others_succeed(
    pool: Pool, running: Allocator, client: Client
) -> None:
    await pool.fill(2)
    commands = [
        allocate_command("ann").model_dump(),
        {"type": "AllocateSandbox", "request_id": "r", "holder": "new\nline"},
        {"type": "Unheard", "secret": 1},
        "nonsense",
        allocate_command("bob").model_dump() | {"version": 2},
        SyncPool(request_id="r").model_dump(),
        allocate_command("bob").model_dump() | {"from_a_newer_sender": True},
    ]
    replies = await client.request(json.dumps({"commands": commands}).encode())
    assert [reply.type for reply in replies] == ["LeaseGranted", *5 * ["Refused"], "LeaseGranted"]
    assert {refusal_code(reply) for reply in replies[1:6]} == {"INVALID_COMMAND"}
    kept = await client.dead_letters(5)
    assert sorted(json.dumps(json.loads(message.body)) for message in kept) == sorted(
        json.dumps({"commands": [command]}) for command in commands[1:6]
    )
    assert any("holder" in reason(message) for message in kept)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b"{}", b'{"commands": []}', b'{"commands": 7}'])
async def test_an_invalid_envelope_is_dead_lettered_and_does_not_block(
    pool: Pool, running: Allocator, client: Client, body: bytes
) -> None:
    await pool.fill(1)
    await client.publish(body)
    granted_lease(await client.request_one(allocate_command("ann")))
    (message,) = await client.dead_letters(1)
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
async def test_a_number_out_of_the_database_range_is_dead_lettered(
    running: Allocator, client: Client, poison: ExpireLeases
) -> None:
    behind = EndCleanup(run_id=RUN).model_dump(mode="json")
    body = json.dumps({"commands": [poison.model_dump(mode="json"), behind]}).encode()
    replies = await client.request(
        body, queue=topology.ALLOCATOR_MAINTENANCE, exchange=topology.COMMANDS_FROM_REAPER
    )
    assert refusal_code(replies[0]) in ("INTERNAL_ERROR", "INVALID_COMMAND")
    assert replies[1].type == "Recorded"
    await client.dead_letters(1)


async def test_a_listing_from_the_exchange_of_the_gateway_is_refused(
    pool: Pool, running: Allocator, client: Client
) -> None:
    """Otherwise the broker would lease an account from outside of the pool, and then delete it."""
    forged = ListedAccount(sandbox_id="999", external_id="of-a-customer", name="sandbox-999")
    listing = (
        BeginListing(),
        StageListing(listing_id=1, accounts=(forged,)),
        ApplyListing(listing_id=1, total=1, max_stale_fraction=1, force=True),
    )
    job = RecordJob(job_id=RUN, kind="sync")
    replies = await client.request(
        [*listing, job], queue=topology.ALLOCATOR_MAINTENANCE, exchange=topology.COMMANDS
    )
    assert [refusal_code(reply) for reply in replies[:3]] == ["INVALID_COMMAND"] * 3
    assert replies[3].type == "Recorded"  # the gateway may send this command
    assert await pool.value("SELECT count(*) FROM sandboxes") == 0
    assert await pool.value("SELECT count(*) FROM csp_listings") == 0
    reasons = [reason(message) for message in await client.dead_letters(3)]
    assert reasons == [f"{command.type} may not be sent over the exchange 'broker.commands'" for command in listing]


async def test_a_command_that_the_database_rejects_is_isolated_from_its_batch(
    pool: Pool, running: Allocator, client: Client
) -> None:
    await pool.fill(200)
    await pool.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (holder <> 'student-77')")
    try:
        replies = await client.request([allocate_command(f"student-{number}") for number in range(200)])
    finally:
        await pool.execute("ALTER TABLE leases DROP CONSTRAINT test")
    assert refusal_code(replies.pop(77)) == "INTERNAL_ERROR"
    assert len({granted_lease(reply).sandbox_id for reply in replies}) == 199
    (message,) = await client.dead_letters(1)
    (command,) = json.loads(message.body)["commands"]
    assert command["holder"] == "student-77"
    granted_lease(await client.request_one(allocate_command("student-77")))
    await pool.assert_sound()


async def test_duplicate_messages_get_equal_replies_and_take_effect_once(
    pool: Pool, running: Allocator, client: Client
) -> None:
    await pool.fill(30)

    async def student(name: str) -> None:
        first = await client.publish([allocate_command(name, key=name), allocate_command("copy")], times=2)
        (lease, _), (repeated, _) = await client.replies_to(first, times=2)
        assert granted_lease(lease).model_copy(update={"new": False}) == granted_lease(repeated).model_copy(
            update={"new": False}
        )
        second = await client.publish([release_command(granted_lease(lease).sandbox_id, name)], times=2)
        (released,), (released_again,) = await client.replies_to(second, times=2)
        assert isinstance(released, SandboxReleased)
        assert released == released_again

    await asyncio.gather(*(student(f"student-{number}") for number in range(20)))
    assert await pool.value("SELECT count(*) FROM leases") == 21
    await pool.assert_sound()


async def test_a_duplicate_allocation_before_a_release_in_one_batch_leases_no_second_sandbox(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    """Both messages wait when the allocator starts, so they arrive in one batch."""
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    first = await client.publish([allocate_command("ann")])
    second = await client.publish([release_command(sandbox_id, "ann")])
    async with run_allocator(clean_queues, pool.url):
        ((repeated,),) = await client.replies_to(first)
        ((released,),) = await client.replies_to(second)
    assert granted_lease(repeated).sandbox_id == sandbox_id
    assert released.type == "SandboxReleased"
    assert await pool.value("SELECT count(*) FROM leases") == 1


async def test_a_redelivered_allocation_after_the_release_leases_no_second_sandbox(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await pool.fill(3)
    async with run_allocator(clean_queues, pool.url):
        lease = granted_lease(await client.request_one(allocate_command("ann")))
        assert (await client.request_one(release_command(lease.sandbox_id, "ann"))).type == "SandboxReleased"
    envelope = await client.publish([allocate_command("ann"), allocate_command("bob")])
    await client.requeue_all(topology.ALLOCATOR_COMMANDS)
    async with run_allocator(clean_queues, pool.url):
        ((refused, other),) = await client.replies_to(envelope)
        assert refusal_code(refused) == "ALLOCATOR_UNAVAILABLE"
        assert granted_lease(other).new  # bob has no ended lease, so the first delivery was not completed
        assert granted_lease(
            await client.request_one(allocate_command("ann"))
        ).new  # a new request is not a redelivery
    await pool.assert_sound()


async def test_a_duplicate_envelope_after_the_release_leases_no_second_sandbox(
    pool: Pool, running: Allocator, client: Client
) -> None:
    """The first copy left no trace in the database, because it was answered with the active lease."""
    await pool.fill(2)
    lease = granted_lease(await client.request_one(allocate_command("ann")))
    repeated = await client.publish([allocate_command("ann")])
    await client.replies_to(repeated)
    await client.request_one(release_command(lease.sandbox_id, "ann"))
    await client.publish([allocate_command("ann")], copy_of=repeated)
    _, (late,) = await client.replies_to(repeated, times=2)
    assert refusal_code(late) == "ALLOCATOR_UNAVAILABLE"
    assert await pool.value("SELECT count(*) FROM leases") == 1
    await pool.assert_sound()


async def test_a_redelivered_allocation_with_an_unused_key_is_granted(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await pool.fill(2)
    async with run_allocator(clean_queues, pool.url):
        lease = granted_lease(await client.request_one(allocate_command("ann", key="monday")))
        assert (await client.request_one(release_command(lease.sandbox_id, "ann"))).type == "SandboxReleased"
    monday, tuesday = [await client.publish([allocate_command("ann", key=key)]) for key in ("monday", "tuesday")]
    await client.requeue_all(topology.ALLOCATOR_COMMANDS)
    async with run_allocator(clean_queues, pool.url):
        ((refused,),), ((new,),) = await client.replies_to(monday), await client.replies_to(tuesday)
    assert refusal_code(refused) == "IDEMPOTENCY_KEY_CONFLICT"
    assert granted_lease(new).new


async def test_a_redelivered_allocation_returns_the_active_lease(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await release(await pool.write_session(), release_command(await pool.lease("ann"), "ann"))
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    envelope = await client.publish([allocate_command("ann")])
    await client.requeue_all(topology.ALLOCATOR_COMMANDS)
    async with run_allocator(clean_queues, pool.url):
        ((repeated,),) = await client.replies_to(envelope)
    assert granted_lease(repeated).sandbox_id == sandbox_id


async def test_a_missing_reply_queue_does_not_affect_other_requests(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await pool.fill(2)
    async with run_allocator(clean_queues, pool.url):
        await client.publish([allocate_command("ann")], reply_to="gone")
        granted_lease(await client.request_one(allocate_command("bob")))
        assert await pool.value("SELECT count(*) FROM leases") == 2
    assert await client.message_count(topology.ALLOCATOR_COMMANDS.name) == 0


class InterruptedPublisher(Publisher):
    """Publisher with a connection loss before the first reply."""

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


async def test_an_unsent_reply_is_sent_after_the_reconnect(pool: Pool, clean_queues: str, client: Client) -> None:
    await pool.fill(1)
    publisher = InterruptedPublisher(clean_queues, "interrupted")
    async with run_allocator(clean_queues, pool.url, publisher=publisher):
        lease = granted_lease(await client.request_one(allocate_command("ann")))
        assert publisher.lost
        assert lease.new


async def test_a_terminated_database_connection_is_replaced(pool: Pool, running: Allocator, client: Client) -> None:
    await pool.fill(10)
    for number in range(10):
        granted_lease(await client.request_one(allocate_command(f"student-{number}")))
        await pool.value(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = $1 AND datname = current_database()",
            topology.ALLOCATOR_COMMANDS.name,
        )
    await pool.assert_sound()


async def test_a_fenced_consumer_leaves_its_messages_to_the_standby(
    pool: Pool, clean_queues: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pool.fill(3)
    async with run_allocator(clean_queues, pool.url) as one:
        granted_lease(await client.request_one(allocate_command("ann")))
        subscribed = asyncio.Event()
        batch = Subscription.batch

        async def batch_and_signal(subscription: Subscription, limit: int) -> list[DeliveredMessage]:
            subscribed.set()  # RabbitMQ does not report standby consumers
            return await batch(subscription, limit)

        monkeypatch.setattr(Subscription, "batch", batch_and_signal)
        async with run_allocator(clean_queues, pool.url) as other:
            await asyncio.wait_for(subscribed.wait(), 20)
            assert (one.consumer.epoch > 0, other.consumer.epoch) == (True, 0)
            await pool.execute("UPDATE allocator_epoch SET epoch = nextval('allocator_epochs')")
            granted_lease(await client.request_one(allocate_command("bob")))
            assert other.consumer.epoch > 0
            granted_lease(await client.request_one(allocate_command("cid")))
    assert await client.message_count(topology.ALLOCATOR_COMMANDS.name) == 0
    await pool.assert_sound()


@pytest.fixture(scope="module")
async def private_server() -> AsyncIterator[PrivatePostgres]:
    async with PrivatePostgres() as postgres:
        await migrate(postgres.url)
        yield postgres


@pytest.fixture
async def server(private_server: PrivatePostgres) -> PrivatePostgres:
    """Private PostgreSQL server with an empty pool."""
    async with pool_in(private_server.url) as pool:
        await pool.execute(
            "TRUNCATE sandboxes, leases, outbox, history, pool_changes, pool_counts, jobs, dead_letters"
        )
    return private_server


async def test_commands_are_refused_at_once_while_the_database_is_down(
    server: PrivatePostgres, clean_queues: str, client: Client
) -> None:
    async with run_allocator(clean_queues, server.url):
        async with pool_in(server.url) as pool:
            await pool.fill(50)
            lease = granted_lease(await client.request_one(allocate_command("ann")))
        await server.kill()
        for number in range(20):
            replies = await client.request(
                [allocate_command("ann"), release_command("1", "bob"), allocate_command(f"student-{number}")]
            )
            assert {refusal_code(reply) for reply in replies} == {"ALLOCATOR_UNAVAILABLE"}
        await server.start()

        async def is_restored() -> bool:
            reply = await client.request_one(allocate_command("ann"))
            return reply == lease.model_copy(update={"new": False})

        await wait_until(is_restored)
    assert await client.message_count(topology.DEAD_LETTER_QUEUE.name) == 0


async def test_a_hanging_database_delays_one_batch_only(
    server: PrivatePostgres, clean_queues: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = dataclasses.replace(STUDENTS, statement_timeout_sec=0.5)
    monkeypatch.setattr(bus_harness, "STUDENTS", impatient)
    async with run_allocator(clean_queues, server.url), pool_in(server.url) as pool:
        await pool.fill(2)
        granted_lease(await client.request_one(allocate_command("ann")))
        backends = await pool.column(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'allocator%' AND pid <> pg_backend_pid()"
        )
        assert server.process is not None
        frozen = [server.process.pid, *backends]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert refusal_code(await client.request_one(allocate_command("bob"))) == "ALLOCATOR_UNAVAILABLE"
            first_wait_sec, started = time.monotonic() - started, time.monotonic()
            assert refusal_code(await client.request_one(allocate_command("cid"))) == "ALLOCATOR_UNAVAILABLE"
            assert time.monotonic() - started < first_wait_sec / 2
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)

        async def is_restored() -> bool:
            return (await client.request_one(allocate_command("bob"))).type == "LeaseGranted"

        await wait_until(is_restored)
