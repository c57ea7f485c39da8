"""Clean-ups that an administrator asks for."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from reaper import jobs
from sandbox_broker import topology
from sandbox_broker.bus import Publisher, Requester
from sandbox_broker.messages import (
    CleanedUp,
    CleanUpNow,
    Command,
    ExpireLeases,
    HurryDeletions,
    RecordJob,
    Refused,
    Reply,
)

from .reaper_harness import Allocator, Csp, emptied, reaping, simulated_csp, until


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=7) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, amqp_url: str) -> AsyncIterator[Allocator]:
    await emptied(amqp_url)
    allocator = Allocator(csp)
    async with allocator.consuming(amqp_url):
        yield allocator


class Administrator:
    def __init__(self, requester: Requester) -> None:
        self._requester = requester

    async def ask(self, job_id: uuid.UUID | None = None) -> Reply:
        return await self.command(CleanUpNow(request_id="r", job_id=job_id or uuid.uuid4()))

    async def command(self, command: Command) -> Reply:
        return await self._requester.request(topology.REAPER_COMMANDS, command, timeout_sec=20)


@pytest.fixture
async def administrator(amqp_url: str, allocator: Allocator) -> AsyncIterator[Administrator]:
    publisher = Publisher(amqp_url, "administrator")
    requester = Requester(amqp_url, "administrator", publisher)
    async with running(publisher, requester):
        yield Administrator(requester)


@asynccontextmanager
async def running(*parts: Publisher | Requester) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.wait([task])


async def put_off(allocator: Allocator) -> None:
    """Everything in CSP failed before and is to be tried in an hour."""
    await allocator.add_due()
    for sandbox_id in allocator.due:
        allocator.due_at[sandbox_id] = asyncio.get_running_loop().time() + 3600


async def test_what_is_put_off_is_deleted_now(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await put_off(allocator)
    async with reaping(amqp_url, csp):
        reply = await administrator.ask()
    assert isinstance(reply, CleanedUp)
    assert (reply.deleted, reply.failed) == (7, 0)
    assert await csp.accounts() == {}


async def test_what_fails_is_not_tried_again_at_once(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await put_off(allocator)
    await csp.behave(fail_next_deletes=3)
    async with reaping(amqp_url, csp, cleanup_concurrency=1):
        reply = await administrator.ask()
    assert isinstance(reply, CleanedUp)
    assert (reply.deleted, reply.failed) == (4, 3)
    assert len(await csp.deletions()) == 7


async def test_with_nothing_pending_it_is_done_at_once(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    async with reaping(amqp_url, csp):
        reply = await administrator.ask()
    assert isinstance(reply, CleanedUp)
    assert (reply.deleted, reply.failed) == (0, 0)


async def test_a_second_one_joins_the_first(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await put_off(allocator)
    await csp.behave(delete_latency_sec=0.2)
    same = uuid.uuid4()
    async with reaping(amqp_url, csp, cleanup_batch_size=1, cleanup_concurrency=1):
        first = asyncio.create_task(administrator.ask(same))
        await until(lambda: allocator.all(HurryDeletions))
        others = await asyncio.gather(administrator.ask(), administrator.ask(same))
        assert {reply.type for reply in (await first, *others)} == {"CleanedUp"}
    assert len(await csp.deletions()) == 7
    ended = [command.job_id for command in allocator.all(RecordJob) if command.state == "completed"]
    assert len(ended) == len(set(ended)) == 2


async def test_how_it_goes_is_recorded_and_how_it_ended(
    csp: Csp,
    allocator: Allocator,
    administrator: Administrator,
    amqp_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "PERIOD_SEC", 0.02)
    await put_off(allocator)
    await csp.behave(delete_latency_sec=0.1)
    job_id = uuid.uuid4()
    async with reaping(amqp_url, csp, cleanup_concurrency=1):
        await administrator.ask(job_id)
    told = allocator.all(RecordJob)
    assert {command.job_id for command in told} == {job_id}
    assert told[-1].state == "completed"
    assert told[-1].result is not None
    assert told[-1].result["deleted"] == 7
    going = [command.progress["deleted"] for command in told if command.state == "running"]
    assert sorted(going) == going
    assert len(set(going)) > 2


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [({"reject_tokens": True}, "refuses our token"), ({"delete_error_rate": 1}, "keeps failing")],
)
async def test_csp_in_trouble_is_told_instead_of_waited_for(
    csp: Csp,
    allocator: Allocator,
    administrator: Administrator,
    amqp_url: str,
    behaviour: dict[str, object],
    why: str,
) -> None:
    await csp.behave(**behaviour)
    await put_off(allocator)
    async with reaping(amqp_url, csp):
        for _ in range(2):  # in the midst of it, and when it is known already
            reply = await administrator.ask()
            assert isinstance(reply, Refused)
            assert reply.code == "CSP_UNAVAILABLE"
            assert why in reply.message
    assert {command.state for command in allocator.all(RecordJob)} == {"failed"}


async def test_while_another_reaper_is_at_work_it_waits(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await put_off(allocator)
    allocator.on_duty = (uuid.uuid4(), asyncio.get_running_loop().time() + 3600)
    async with reaping(amqp_url, csp):
        asked = asyncio.create_task(administrator.ask())
        await until(lambda: len(allocator.all(HurryDeletions)) > 1)
        assert await csp.deletions() == []
        allocator.on_duty = (None, 0)
        assert (await asked).type == "CleanedUp"


async def test_an_allocator_that_refuses_is_told(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    allocator.refuses = lambda _: True
    async with reaping(amqp_url, csp):
        reply = await administrator.ask()
    assert isinstance(reply, Refused)
    assert reply.code == "ALLOCATOR_UNAVAILABLE"


async def test_a_command_for_somebody_else_is_refused(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    async with reaping(amqp_url, csp):
        reply = await administrator.command(ExpireLeases(grace_sec=0, limit=1))
    assert isinstance(reply, Refused)
    assert reply.code == "INVALID_COMMAND"
