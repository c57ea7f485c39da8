"""Tests of the csp-syncer with RabbitMQ, the CSP simulator and a stand-in for the allocator."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from aio_pika.abc import AbstractConnection
from structlog.testing import capture_logs

from csp_syncer import chunking, main, syncer
from csp_syncer.triggers import CommandConsumer, send_sync_command
from devstack.conditions import wait_until
from devstack.testing import empty_queues
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import (
    ApplyListing,
    BeginListing,
    Command,
    DeleteStale,
    PurgeAudit,
    PurgePersonalData,
    PurgeRecords,
    RefreshSandboxes,
    ReleaseSandbox,
    StageListing,
)
from sandbox_broker.contract.replies import PoolSynced, RefusalCode, Refused, refuse
from sandbox_broker.contract.types import JobState
from sandbox_broker.messaging.rpc_client import RpcClient

from .syncer_harness import Allocator, Caller, Csp, calling, sample, simulated_csp, syncing

UNKNOWN = "00000000-0000-4000-8000-00000000ffff"


@pytest.fixture
async def queues(amqp_url: str) -> str:
    """Empty queues. Deleting them, as clean_queues does, takes longer than most tests."""
    await empty_queues(amqp_url)
    return amqp_url


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=7) as csp:
        yield csp


@pytest.fixture
async def allocator(queues: str) -> AsyncIterator[Allocator]:
    allocator = Allocator()
    async with allocator.consuming(queues):
        yield allocator


@pytest.fixture
async def caller(queues: str) -> AsyncIterator[Caller]:
    async with calling(queues) as caller:
        yield caller


@pytest.fixture
async def running_syncer(csp: Csp, allocator: Allocator, amqp_url: str) -> AsyncIterator[None]:
    """A csp-syncer that has completed the sync of its first tick."""
    async with syncing(amqp_url, csp):
        await wait_until(lambda: allocator.all(RefreshSandboxes))
        allocator.received.clear()
        yield


def refusing(kind: type[Command], code: RefusalCode) -> Refused:
    return Refused(code=code, message=f"no {kind.__name__} now")


async def test_a_tick_syncs(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    before = sample("broker_sync_total", outcome="completed")
    async with syncing(amqp_url, csp, sync_interval_sec=0.2):
        await wait_until(lambda: len(allocator.all(ApplyListing)) >= 2)
    assert sample("broker_sync_total", outcome="completed") >= before + 2


async def test_a_listing_is_staged_in_batches_and_applied_with_its_total(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "BATCH_SIZE", 3)
    reply = await caller.sync()
    assert isinstance(reply, PoolSynced)
    assert (reply.synced, reply.restored, reply.marked_stale) == (7, 2, 1)
    assert [type(command) for command in allocator.received] == [
        BeginListing,
        *[StageListing] * 3,
        ApplyListing,
        RefreshSandboxes,
    ]
    assert [len(command.accounts) for command in allocator.all(StageListing)] == [3, 3, 1]
    (apply,) = allocator.all(ApplyListing)
    assert (apply.total, apply.force, apply.max_stale_fraction) == (7, False, 0.25)
    active = [
        str(record["csp_id"])
        for record in await csp.records()
        if (record["account_type"], record["state"]) == ("sandbox", "active")
    ]
    assert allocator.staged[apply.listing_id] == active


async def test_the_listing_begins_before_the_request_to_csp(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    """The allocator needs this order to know which deletions the listing cannot contain yet."""
    before = await csp.listings()
    listings_at_command: dict[type[Command], int] = {}

    async def count_listings(command: Command) -> None:
        listings_at_command.setdefault(type(command), await csp.listings() - before)

    allocator.before_answer = count_listings
    await caller.sync()
    assert listings_at_command == {BeginListing: 0, StageListing: 1, ApplyListing: 1, RefreshSandboxes: 1}


async def test_an_empty_listing_is_applied(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    await csp.list_raw([])
    await caller.sync()
    assert allocator.all(StageListing) == []
    assert [apply.total for apply in allocator.all(ApplyListing)] == [0]


async def test_incomplete_records_are_counted_and_logged_and_do_not_stop_the_sync(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    records = await csp.records()
    sandbox = {"account_type": "sandbox", "state": "active"}
    nameless = {**sandbox, "csp_id": 77}
    complete = [record for record in records if sandbox.items() <= record.items()]
    repeated = {**complete[0], "id": "broken"}
    without_id = {**sandbox, "csp_id": None, "id": f"identity/accounts/{UNKNOWN}"}
    known = {**complete[1], "csp_id": " 1 "}
    await csp.list_raw(
        [
            None,
            5,
            {**sandbox},
            {**sandbox, "csp_id": "x"},
            nameless,
            nameless,
            without_id,
            known,
            *records,
            repeated,
        ]
    )
    before = sample("broker_sync_skipped_records_total")
    with capture_logs() as logs:
        reply = await caller.sync()
    assert isinstance(reply, PoolSynced)
    assert reply.synced == 7
    assert sample("broker_sync_skipped_records_total") == before + 9
    # An incomplete record with a readable csp_id or UUID is staged as unreadable, unless a complete one has it too.
    assert [command.unreadable for command in allocator.all(StageListing)] == [("77", f"account {UNKNOWN}")]
    assert [apply.total for apply in allocator.all(ApplyListing)] == [9]
    (line,) = [line for line in logs if line["event"] == "sync.records_skipped"]
    assert line["skipped"] == 9


async def test_a_request_during_a_sync_joins_it(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    allocator.before_answer = wait
    first = asyncio.create_task(caller.sync())
    await wait_until(lambda: allocator.all(ApplyListing))
    more = [asyncio.create_task(caller.sync()) for _ in range(5)]
    await caller.all_arrived()
    gate.set()
    replies = await asyncio.gather(first, *more)
    assert isinstance(replies[0], PoolSynced)
    assert all(reply == replies[0] for reply in replies)
    assert len(allocator.all(ApplyListing)) == 1


async def test_a_forced_sync_runs_after_the_unforced_one(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing) and not command.force:
            await gate.wait()

    allocator.before_answer = wait
    unforced = asyncio.create_task(caller.sync())
    await wait_until(lambda: allocator.all(ApplyListing))
    forced = asyncio.create_task(caller.sync(force=True))
    await caller.all_arrived()
    assert len(allocator.all(BeginListing)) == 1
    gate.set()
    assert isinstance(await unforced, PoolSynced)
    assert isinstance(await forced, PoolSynced)
    assert [apply.force for apply in allocator.all(ApplyListing)] == [False, True]


@pytest.mark.parametrize(
    "behaviour",
    [
        {"listing_error_rate": 1, "listing_error_status": 500},
        {"listing_error_rate": 1, "listing_error_status": 503, "listing_error_html": True},
        {"listing_error_rate": 1, "listing_error_status": 200, "listing_error_html": True},
        {"listing_error_rate": 1, "listing_error_status": "bomb"},
        {"listing_error_rate": 1, "listing_error_status": "flood"},
        {"listing_cut_short": True},
        {"reject_tokens": True},
    ],
)
async def test_an_unusable_answer_of_csp_is_a_refusal_and_applies_no_listing(
    csp: Csp, allocator: Allocator, running_syncer: None, caller: Caller, behaviour: dict[str, object]
) -> None:
    await csp.behave(**behaviour)
    before = sample("broker_sync_total", outcome="csp_unavailable")
    reply = await caller.sync()
    assert isinstance(reply, Refused)
    assert reply.code == "CSP_UNAVAILABLE"
    assert reply.parameters is not None
    assert reply.parameters["cause"] == "not_listed"
    assert reply.parameters["problem"]
    assert "simulator-token" not in reply.message
    assert [type(command) for command in allocator.received] == [BeginListing]
    assert sample("broker_sync_total", outcome="csp_unavailable") == before + 1
    await csp.behave(**dict.fromkeys(behaviour.keys() & {"listing_cut_short", "reject_tokens"}, False))
    await csp.behave(listing_error_rate=0)
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_held_sync_is_returned_and_can_be_forced(
    allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    def hold(command: Command) -> Refused | None:
        return (
            refusing(ApplyListing, "SYNC_HELD") if isinstance(command, ApplyListing) and not command.force else None
        )

    allocator.refusal = hold
    assert await caller.sync() == refusing(ApplyListing, "SYNC_HELD")
    assert isinstance(await caller.sync(force=True), PoolSynced)
    assert await caller.sync() == refusing(ApplyListing, "SYNC_HELD")  # force applies to one sync


@pytest.mark.parametrize("kind", [BeginListing, StageListing, ApplyListing])
async def test_a_refused_step_is_the_reply_and_ends_the_sync(
    allocator: Allocator, running_syncer: None, caller: Caller, kind: type[Command]
) -> None:
    refusal = refusing(kind, "LISTING_OUTDATED")
    allocator.refusal = lambda command: refusal if isinstance(command, kind) else None
    assert await caller.sync() == refusal
    assert type(allocator.received[-1]) is kind
    allocator.refusal = lambda _: None
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_sync_without_an_allocator_is_a_refusal_and_the_next_one_works(
    csp: Csp, queues: str, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "REQUEST_TIMEOUT_SEC", 1)
    async with syncing(queues, csp):
        reply = await caller.sync()
        assert isinstance(reply, Refused)
        assert reply.code == "ALLOCATOR_UNAVAILABLE"
        async with Allocator().consuming(queues):
            assert isinstance(await caller.sync(), PoolSynced)


async def test_the_csp_syncer_reconnects_during_a_sync(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    connections: list[AbstractConnection] = []
    real_consume = CommandConsumer.consume

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    async def consume(self: CommandConsumer, connection: AbstractConnection) -> None:
        connections.append(connection)
        await real_consume(self, connection)

    allocator.before_answer = wait
    monkeypatch.setattr(CommandConsumer, "consume", consume)
    async with syncing(amqp_url, csp):
        replies = [asyncio.create_task(caller.sync())]
        await caller.all_arrived()
        await wait_until(lambda: allocator.all(ApplyListing))
        await connections[0].close()
        replies.append(asyncio.create_task(caller.sync()))
        await caller.all_arrived()
        assert len(connections) == 2
        gate.set()
        # RabbitMQ delivered the first command again over the second connection, and it joined too.
        first, second = await asyncio.gather(*replies)
    assert isinstance(first, PoolSynced)
    assert first == second
    assert len(allocator.all(ApplyListing)) == 1


@pytest.mark.parametrize("kind", [BeginListing, StageListing, ApplyListing, RefreshSandboxes])
async def test_a_command_is_repeated_after_the_loss_of_its_connection(
    csp: Csp,
    allocator: Allocator,
    caller: Caller,
    amqp_url: str,
    kind: type[Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections: list[AbstractConnection] = []
    real_session = RpcClient._session

    async def run_session(self: RpcClient, connection: AbstractConnection) -> None:
        connections.append(connection)
        await real_session(self, connection)

    async def disconnect_once(command: Command) -> None:
        if isinstance(command, kind) and len(allocator.all(kind)) == 1:
            await connections[0].close()

    monkeypatch.setattr(syncer, "RETRY_SEC", 0.01)
    monkeypatch.setattr(RpcClient, "_session", run_session)
    allocator.before_answer = disconnect_once
    async with syncing(amqp_url, csp):
        reply = await caller.sync()
    assert isinstance(reply, PoolSynced)
    assert reply.synced == 7
    assert await csp.listings() == 1
    first, second, *_ = allocator.all(kind)
    assert first == second
    assert len(connections) == 2


async def test_a_foreign_command_is_refused_and_does_not_block_the_queue(
    running_syncer: None, caller: Caller
) -> None:
    reply = await caller.send(ReleaseSandbox(request_id="r", sandbox_id="1", holder="h"))
    assert isinstance(reply, Refused)
    assert reply.code == "INVALID_COMMAND"
    await caller.rpc_client._publisher.publish(
        topology.COMMANDS.name, topology.SYNCER_COMMANDS.name, b"not an envelope"
    )
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_stop_during_a_sync_leaves_no_task_behind(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async def never(_: Command) -> None:
        await asyncio.Event().wait()

    allocator.before_answer = never
    async with syncing(amqp_url, csp):
        await wait_until(lambda: allocator.all(BeginListing))
    await wait_until(lambda: not [task for task in asyncio.all_tasks() if "Syncer" in repr(task)])


async def test_names_are_corrected_in_batches_after_the_listing_is_applied(
    allocator: Allocator, running_syncer: None, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncer, "REFRESH_BATCH_SIZE", 2)
    allocator.to_refresh = ["1", "2", "3", "4", "5"]
    assert isinstance(await caller.sync(), PoolSynced)
    assert [command.after for command in allocator.all(RefreshSandboxes)] == [None, "2", "4", "5"]


async def test_a_refused_name_correction_does_not_fail_the_sync(
    allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    refusal = refusing(RefreshSandboxes, "ALLOCATOR_UNAVAILABLE")
    allocator.refusal = lambda command: refusal if isinstance(command, RefreshSandboxes) else None
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_tick_joins_the_sync_of_an_administrator(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str
) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    allocator.before_answer = wait
    async with syncing(amqp_url, csp):
        await wait_until(lambda: allocator.all(ApplyListing))  # by the sync of the first tick
        requested = asyncio.create_task(caller.sync())
        await send_sync_command(caller.rpc_client._publisher)
        await caller.all_arrived()
        gate.set()
        assert isinstance(await requested, PoolSynced)
    assert len(allocator.all(BeginListing)) == 1


async def test_two_replicas_run_one_sync(csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    allocator.before_answer = wait
    async with syncing(amqp_url, csp), syncing(amqp_url, csp):
        await wait_until(lambda: allocator.all(ApplyListing))
        requested = [asyncio.create_task(caller.sync()) for _ in range(4)]
        await caller.all_arrived()
        gate.set()
        replies = await asyncio.gather(*requested)
    assert all(reply == replies[0] for reply in replies)
    assert len(allocator.all(BeginListing)) == 1


async def test_every_joined_job_gets_the_progress_and_the_end_of_the_sync(
    allocator: Allocator, running_syncer: None, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncer, "JOB_REPORT_SEC", 0.01)
    jobs = {uuid.uuid4(), uuid.uuid4()}
    staged = {"listed": 7, "staged": 7}

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await wait_until(lambda: {job.job_id for job in allocator.jobs if job.progress == staged} == jobs)

    allocator.before_answer = wait
    await asyncio.gather(*(caller.sync(job_id=job_id) for job_id in jobs))
    ends = [job for job in allocator.jobs if job.state != "running"]
    assert {(job.job_id, job.state) for job in ends} == {(job_id, "completed") for job_id in jobs}
    for job in ends:
        assert job.progress == staged
        assert job.result is not None
        assert {**job.result, "duration_ms": 0} == {"synced": 7, "marked_stale": 1, "restored": 2, "duration_ms": 0}


@pytest.mark.parametrize(
    ("kind", "code", "state"), [(ApplyListing, "SYNC_HELD", "held"), (BeginListing, "LISTING_OUTDATED", "failed")]
)
async def test_a_job_gets_the_reason_of_a_refused_sync(
    allocator: Allocator,
    running_syncer: None,
    caller: Caller,
    kind: type[Command],
    code: RefusalCode,
    state: JobState,
) -> None:
    allocator.refusal = lambda command: refusing(kind, code) if isinstance(command, kind) else None
    await caller.sync(job_id=uuid.uuid4())
    assert (allocator.jobs[-1].state, allocator.jobs[-1].result) == (
        state,
        {"code": code, "message": f"no {kind.__name__} now"},
    )


async def test_a_job_gets_the_parameters_of_a_refusal(
    allocator: Allocator, running_syncer: None, caller: Caller
) -> None:
    refusal = refuse("SYNC_HELD", reason="CSP listed no sandbox at all")
    allocator.refusal = lambda command: refusal if isinstance(command, ApplyListing) else None
    assert await caller.sync(job_id=uuid.uuid4()) == refusal
    assert allocator.jobs[-1].result == {
        "code": "SYNC_HELD",
        "message": "SYNC_HELD (reason: CSP listed no sandbox at all)",
        "parameters": '{"reason": "CSP listed no sandbox at all"}',
    }


async def test_the_purge_runs_until_its_work_is_done(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.to_purge = 1100
    async with syncing(amqp_url, csp, record_retention_days=2, lease_personal_days=500):
        await wait_until(lambda: len(allocator.purges) >= 6)
    (tick,) = {command.request_id for command in allocator.purges}
    assert str(tick).startswith("tick-")
    assert allocator.purges == [
        *[DeleteStale(request_id=tick, stale_for_sec=24 * 3600, limit=500)] * 3,
        PurgeRecords(request_id=tick, status="deleted", for_sec=2 * 24 * 3600, limit=500),
        PurgeAudit(request_id=tick, for_sec=400 * 24 * 3600, limit=500),
        PurgePersonalData(request_id=tick, for_sec=500 * 24 * 3600, limit=500),
    ]


async def test_a_refused_purge_is_left_to_the_next_run(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str
) -> None:
    refusal = refusing(DeleteStale, "ALLOCATOR_UNAVAILABLE")
    allocator.refusal = lambda command: refusal if isinstance(command, DeleteStale) else None
    with capture_logs() as logs:
        async with syncing(amqp_url, csp):
            await wait_until(lambda: any(line["event"] == "purge.postponed" for line in logs))
            assert isinstance(await caller.sync(), PoolSynced)


@pytest.mark.parametrize("allowed", ["lab-, sandbox-", "sandbox-", "sandbox-1,sandbox-2"])
async def test_only_accounts_with_an_allowed_name_are_imported(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str, allowed: str
) -> None:
    prefixes = tuple(allowed.replace(" ", "").split(","))
    records = await csp.records()
    other = {**records[-1], "csp_id": 1, "id": f"identity/accounts/{UNKNOWN}", "name": "colleague-sandbox-1"}
    await csp.list_raw([*records, other])
    async with syncing(amqp_url, csp, sync_name_allow=allowed):
        await wait_until(lambda: allocator.all(RefreshSandboxes))
    names = [account.name for command in allocator.all(StageListing) for account in command.accounts]
    expected = [
        record["name"]
        for record in records
        if (record["account_type"], record["state"]) == ("sandbox", "active")
        and record["name"].startswith(prefixes)
    ]
    assert names == expected
    assert sample("broker_sync_not_allowed_accounts") == 8 - len(expected)
    assert [apply.max_growth_fraction for apply in allocator.all(ApplyListing)] == [1]
