"""From CSP's listing to the allocator's answer."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from aio_pika.abc import AbstractConnection
from structlog.testing import capture_logs

from csp_syncer import asking, handlers, plan
from csp_syncer.schedule import Schedule, tick
from sandbox_broker import topology
from sandbox_broker.messages import (
    ApplyListing,
    BeginListing,
    Command,
    DeleteStale,
    JobState,
    PoolSynced,
    PurgeRecords,
    RefreshSandboxes,
    RefusalCode,
    Refused,
    ReleaseSandbox,
    StageListing,
)

from .syncer_harness import Allocator, Caller, Csp, calling, emptied, sample, simulated_csp, syncing, until


@pytest.fixture
async def queues(amqp_url: str) -> str:
    """All empty; deleting them, as clean_queues does, would take longer than most tests."""
    await emptied(amqp_url)
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
async def syncer(csp: Csp, allocator: Allocator, amqp_url: str) -> AsyncIterator[None]:
    """It has done the sync of its first tick."""
    async with syncing(amqp_url, csp):
        await until(lambda: allocator.all(RefreshSandboxes))
        allocator.heard.clear()
        yield


def refusing(kind: type[Command], code: RefusalCode) -> Refused:
    return Refused(code=code, message=f"no {kind.__name__} now")


async def test_a_tick_syncs(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    before = sample("broker_sync_total", outcome="completed")
    async with syncing(amqp_url, csp, sync_interval_sec=0.2):
        await until(lambda: len(allocator.all(ApplyListing)) >= 2)
    assert sample("broker_sync_total", outcome="completed") >= before + 2


async def test_a_listing_is_staged_in_pieces_and_applied_with_its_total(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PIECE", 3)
    reply = await caller.sync()
    assert isinstance(reply, PoolSynced)
    assert (reply.synced, reply.restored, reply.marked_stale) == (7, 2, 1)
    assert [type(command) for command in allocator.heard] == [
        BeginListing,
        *[StageListing] * 3,
        ApplyListing,
        RefreshSandboxes,
    ]
    assert [len(piece.accounts) for piece in allocator.all(StageListing)] == [3, 3, 1]
    (apply,) = allocator.all(ApplyListing)
    assert (apply.total, apply.force, apply.max_stale_fraction) == (7, False, 0.25)
    active = [
        str(record["csp_id"])
        for record in await csp.records()
        if (record["account_type"], record["state"]) == ("sandbox", "active")
    ]
    assert allocator.staged[apply.listing_id] == active


async def test_the_listing_is_begun_before_csp_is_asked(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller
) -> None:
    """Only so can the allocator tell what was deleted meanwhile."""
    asked = await csp.listings()
    asked_at: dict[type[Command], int] = {}

    async def look(command: Command) -> None:
        asked_at.setdefault(type(command), await csp.listings() - asked)

    allocator.before_answer = look
    await caller.sync()
    assert asked_at == {BeginListing: 0, StageListing: 1, ApplyListing: 1, RefreshSandboxes: 1}


async def test_an_empty_listing_is_applied_as_such(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller
) -> None:
    await csp.list_raw([])
    await caller.sync()
    assert allocator.all(StageListing) == []
    assert [apply.total for apply in allocator.all(ApplyListing)] == [0]


async def test_records_that_lack_what_we_need_are_counted_and_logged_and_stop_nothing(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller
) -> None:
    records = await csp.records()
    sandbox = {"account_type": "sandbox", "state": "active"}
    nameless = {**sandbox, "csp_id": 77}
    known = [one for one in records if sandbox.items() <= one.items()]
    again = {**known[0], "id": "broken"}
    await csp.list_raw([None, 5, {**sandbox}, {**sandbox, "csp_id": "x"}, nameless, nameless, *records, again])
    before = sample("broker_sync_skipped_records_total")
    with capture_logs() as logs:
        reply = await caller.sync()
    assert isinstance(reply, PoolSynced)
    assert reply.synced == 7
    assert sample("broker_sync_skipped_records_total") == before + 7
    # Of one whose id can be read the allocator is told that it is there, unless another record told it.
    assert [piece.unreadable for piece in allocator.all(StageListing)] == [("77",)]
    assert [apply.total for apply in allocator.all(ApplyListing)] == [8]
    (line,) = [line for line in logs if line["event"] == "sync.records_skipped"]
    assert line["skipped"] == 7


async def test_who_asks_while_a_sync_runs_joins_it(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller
) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    allocator.before_answer = wait
    first = asyncio.create_task(caller.sync())
    await until(lambda: allocator.all(ApplyListing))
    more = [asyncio.create_task(caller.sync()) for _ in range(5)]
    await caller.all_arrived()
    gate.set()
    replies = await asyncio.gather(first, *more)
    assert isinstance(replies[0], PoolSynced)
    assert all(reply == replies[0] for reply in replies)
    assert len(allocator.all(ApplyListing)) == 1


async def test_a_forced_sync_waits_for_the_one_that_runs_and_then_runs_itself(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller
) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing) and not command.force:
            await gate.wait()

    allocator.before_answer = wait
    unforced = asyncio.create_task(caller.sync())
    await until(lambda: allocator.all(ApplyListing))
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
async def test_csp_that_is_down_is_a_refusal_and_nothing_is_applied(
    csp: Csp, allocator: Allocator, syncer: None, caller: Caller, behaviour: dict[str, object]
) -> None:
    await csp.behave(**behaviour)
    before = sample("broker_sync_total", outcome="csp_unavailable")
    reply = await caller.sync()
    assert isinstance(reply, Refused)
    assert reply.code == "CSP_UNAVAILABLE"
    assert "nothing was changed" in reply.message
    assert "simulator-token" not in reply.message
    assert [type(command) for command in allocator.heard] == [BeginListing]
    assert sample("broker_sync_total", outcome="csp_unavailable") == before + 1
    await csp.behave(**dict.fromkeys(behaviour.keys() & {"listing_cut_short", "reject_tokens"}, False))
    await csp.behave(listing_error_rate=0)
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_held_sync_is_passed_on_and_can_be_forced(
    allocator: Allocator, syncer: None, caller: Caller
) -> None:
    def hold(command: Command) -> Refused | None:
        return (
            refusing(ApplyListing, "SYNC_HELD") if isinstance(command, ApplyListing) and not command.force else None
        )

    allocator.refusal = hold
    assert await caller.sync() == refusing(ApplyListing, "SYNC_HELD")
    assert isinstance(await caller.sync(force=True), PoolSynced)
    assert await caller.sync() == refusing(ApplyListing, "SYNC_HELD")  # forcing was for once


@pytest.mark.parametrize("kind", [BeginListing, StageListing, ApplyListing])
async def test_a_refusal_on_the_way_is_the_answer_and_ends_the_sync(
    allocator: Allocator, syncer: None, caller: Caller, kind: type[Command]
) -> None:
    refusal = refusing(kind, "LISTING_OUTDATED")
    allocator.refusal = lambda command: refusal if isinstance(command, kind) else None
    assert await caller.sync() == refusal
    assert type(allocator.heard[-1]) is kind
    allocator.refusal = lambda _: None
    assert isinstance(await caller.sync(), PoolSynced)


async def test_an_allocator_that_is_away_is_a_refusal_and_later_all_is_fine(
    csp: Csp, queues: str, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with syncing(queues, csp):
        with monkeypatch.context() as impatient:
            impatient.setattr(asking, "REQUEST_TIMEOUT_SEC", 0.3)
            reply = await caller.sync()
        assert isinstance(reply, Refused)
        assert reply.code == "ALLOCATOR_UNAVAILABLE"
        async with Allocator().consuming(queues):
            assert isinstance(await caller.sync(), PoolSynced)


async def test_a_sync_that_runs_does_not_keep_it_from_connecting_anew(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    connections: list[AbstractConnection] = []
    real_session = Schedule.commands

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    async def session(self: Schedule, connection: AbstractConnection) -> None:
        connections.append(connection)
        await real_session(self, connection)

    allocator.before_answer = wait
    monkeypatch.setattr(Schedule, "commands", session)
    async with syncing(amqp_url, csp):
        replies = [asyncio.create_task(caller.sync())]
        await caller.all_arrived()
        await until(lambda: allocator.all(ApplyListing))
        await connections[0].close()
        replies.append(asyncio.create_task(caller.sync()))
        await caller.all_arrived()
        assert len(connections) == 2
        gate.set()
        # The first command came again over the second connection, and joined too.
        first, second = await asyncio.gather(*replies)
    assert isinstance(first, PoolSynced)
    assert first == second
    assert len(allocator.all(ApplyListing)) == 1


async def test_what_is_no_command_of_its_own_is_refused_and_blocks_nothing(syncer: None, caller: Caller) -> None:
    reply = await caller.send(ReleaseSandbox(request_id="r", sandbox_id="1", holder="h"))
    assert isinstance(reply, Refused)
    assert reply.code == "INVALID_COMMAND"
    await caller.requester._publisher.publish(
        topology.COMMANDS.name, topology.SYNCER_COMMANDS.name, b"not an envelope"
    )
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_csp_syncer_that_stops_in_the_middle_of_a_sync_leaves_no_task_behind(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    async def never(_: Command) -> None:
        await asyncio.Event().wait()

    allocator.before_answer = never
    async with syncing(amqp_url, csp):
        await until(lambda: allocator.all(BeginListing))
    await until(lambda: not [task for task in asyncio.all_tasks() if "Syncer" in repr(task)])


async def test_names_are_corrected_piece_by_piece_after_the_listing_was_applied(
    allocator: Allocator, syncer: None, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "REFRESH_PIECE", 2)
    allocator.to_refresh = ["1", "2", "3", "4", "5"]
    assert isinstance(await caller.sync(), PoolSynced)
    assert [command.after for command in allocator.all(RefreshSandboxes)] == [None, "2", "4", "5"]


async def test_names_that_could_not_be_corrected_do_not_make_the_sync_fail(
    allocator: Allocator, syncer: None, caller: Caller
) -> None:
    refusal = refusing(RefreshSandboxes, "ALLOCATOR_UNAVAILABLE")
    allocator.refusal = lambda command: refusal if isinstance(command, RefreshSandboxes) else None
    assert isinstance(await caller.sync(), PoolSynced)


async def test_a_tick_joins_the_sync_that_an_administrator_has_started(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str
) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    allocator.before_answer = wait
    async with syncing(amqp_url, csp):
        await until(lambda: allocator.all(ApplyListing))  # that of the first tick
        asked = asyncio.create_task(caller.sync())
        await tick(caller.requester._publisher)
        await caller.all_arrived()
        gate.set()
        assert isinstance(await asked, PoolSynced)
    assert len(allocator.all(BeginListing)) == 1


async def test_two_replicas_run_one_sync(csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str) -> None:
    gate = asyncio.Event()

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await gate.wait()

    allocator.before_answer = wait
    async with syncing(amqp_url, csp), syncing(amqp_url, csp):
        await until(lambda: allocator.all(ApplyListing))
        asked = [asyncio.create_task(caller.sync()) for _ in range(4)]
        await caller.all_arrived()
        gate.set()
        replies = await asyncio.gather(*asked)
    assert all(reply == replies[0] for reply in replies)
    assert len(allocator.all(BeginListing)) == 1


async def test_every_job_that_joined_is_told_how_the_sync_goes_and_that_it_is_done(
    allocator: Allocator, syncer: None, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "REPORT_SEC", 0.01)
    jobs = {uuid.uuid4(), uuid.uuid4()}
    staged = {"listed": 7, "staged": 7}

    async def wait(command: Command) -> None:
        if isinstance(command, ApplyListing):
            await until(lambda: {job.job_id for job in allocator.jobs if job.progress == staged} == jobs)

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
async def test_a_job_is_told_why_the_sync_was_refused(
    allocator: Allocator, syncer: None, caller: Caller, kind: type[Command], code: RefusalCode, state: JobState
) -> None:
    allocator.refusal = lambda command: refusing(kind, code) if isinstance(command, kind) else None
    await caller.sync(job_id=uuid.uuid4())
    assert (allocator.jobs[-1].state, allocator.jobs[-1].result) == (
        state,
        {"code": code, "message": f"no {kind.__name__} now"},
    )


async def test_the_purge_goes_on_until_nothing_is_left(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.to_purge = 1100
    async with syncing(amqp_url, csp, record_retention_days=2):
        await until(lambda: len(allocator.purges) >= 4)
    (tick,) = {command.request_id for command in allocator.purges}
    assert str(tick).startswith("tick-")
    assert allocator.purges == [
        *[DeleteStale(request_id=tick, stale_for_sec=24 * 3600, limit=500)] * 3,
        PurgeRecords(request_id=tick, status="deleted", for_sec=2 * 24 * 3600, limit=500),
    ]


async def test_a_purge_that_is_refused_is_left_to_the_next_run(
    csp: Csp, allocator: Allocator, caller: Caller, amqp_url: str
) -> None:
    refusal = refusing(DeleteStale, "ALLOCATOR_UNAVAILABLE")
    allocator.refusal = lambda command: refusal if isinstance(command, DeleteStale) else None
    with capture_logs() as logs:
        async with syncing(amqp_url, csp):
            await until(lambda: any(line["event"] == "purge.postponed" for line in logs))
            assert isinstance(await caller.sync(), PoolSynced)
