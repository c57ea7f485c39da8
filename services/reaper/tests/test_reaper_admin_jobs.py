"""Tests of admin_jobs.py in a clean-up run."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from devstack.conditions import wait_until
from devstack.testing import empty_queues
from reaper import admin_jobs
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow, Command, ExpireLeases, HurryDeletions, RecordJob
from sandbox_broker.contract.replies import CleanedUp, Refused, Reply
from sandbox_broker.messaging.outcome import CommandRefused
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient

from .reaper_harness import Allocator, Csp, reaping, simulated_csp


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=7) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, amqp_url: str) -> AsyncIterator[Allocator]:
    await empty_queues(amqp_url)
    allocator = Allocator(csp)
    async with allocator.consuming(amqp_url):
        yield allocator


class Administrator:
    def __init__(self, rpc_client: RpcClient) -> None:
        self._rpc_client = rpc_client

    async def clean_up(self, job_id: uuid.UUID | None = None) -> Reply:
        return await self.send(CleanUpNow(request_id="r", job_id=job_id or uuid.uuid4()))

    async def send(self, command: Command) -> Reply:
        """Return the reply, also if it is a refusal."""
        try:
            reply: Reply = await self._rpc_client.request(topology.REAPER_COMMANDS, command, timeout_sec=20)
        except CommandRefused as error:
            return error.refusal
        return reply


@pytest.fixture
async def administrator(amqp_url: str, allocator: Allocator) -> AsyncIterator[Administrator]:
    publisher = Publisher(amqp_url, "administrator")
    rpc_client = RpcClient(amqp_url, "administrator", publisher)
    async with running(publisher, rpc_client):
        yield Administrator(rpc_client)


@asynccontextmanager
async def running(*parts: Publisher | RpcClient) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.wait([task])


async def postpone_all(allocator: Allocator) -> None:
    """Add the deletion of every account in CSP, due in an hour after earlier failures."""
    await allocator.add_due()
    for sandbox_id in allocator.due:
        allocator.due_at[sandbox_id] = asyncio.get_running_loop().time() + 3600


async def test_a_job_deletes_postponed_sandboxes_now(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await postpone_all(allocator)
    async with reaping(amqp_url, csp):
        reply = await administrator.clean_up()
    assert isinstance(reply, CleanedUp)
    assert (reply.deleted, reply.failed) == (7, 0)
    assert await csp.accounts() == {}


async def test_a_job_tries_each_sandbox_once(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await postpone_all(allocator)
    await csp.behave(fail_next_deletes=3)
    async with reaping(amqp_url, csp, cleanup_concurrency=1):
        reply = await administrator.clean_up()
    assert isinstance(reply, CleanedUp)
    assert (reply.deleted, reply.failed) == (4, 3)
    assert len(await csp.deletions()) == 7


async def test_a_job_without_pending_deletions_completes_at_once(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    async with reaping(amqp_url, csp):
        reply = await administrator.clean_up()
    assert isinstance(reply, CleanedUp)
    assert (reply.deleted, reply.failed) == (0, 0)


async def test_a_second_job_joins_the_first(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await postpone_all(allocator)
    await csp.behave(delete_latency_sec=0.2)
    same = uuid.uuid4()
    async with reaping(amqp_url, csp, cleanup_batch_size=1, cleanup_concurrency=1):
        first = asyncio.create_task(administrator.clean_up(same))
        await wait_until(lambda: allocator.all(HurryDeletions))
        others = await asyncio.gather(administrator.clean_up(), administrator.clean_up(same))
        assert {reply.type for reply in (await first, *others)} == {"CleanedUp"}
    assert len(await csp.deletions()) == 7
    ended = [command.job_id for command in allocator.all(RecordJob) if command.state == "completed"]
    assert len(ended) == len(set(ended)) == 2


async def test_progress_and_end_of_a_job_are_recorded(
    csp: Csp,
    allocator: Allocator,
    administrator: Administrator,
    amqp_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin_jobs, "REPORT_PERIOD_SEC", 0.02)
    await postpone_all(allocator)
    await csp.behave(delete_latency_sec=0.1)
    job_id = uuid.uuid4()
    async with reaping(amqp_url, csp, cleanup_concurrency=1):
        await administrator.clean_up(job_id)
    reports = allocator.all(RecordJob)
    assert {command.job_id for command in reports} == {job_id}
    assert reports[-1].state == "completed"
    assert reports[-1].result is not None
    assert reports[-1].result["deleted"] == 7
    progress = [command.progress["deleted"] for command in reports if command.state == "running"]
    assert sorted(progress) == progress
    assert len(set(progress)) > 2


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [({"reject_tokens": True}, "refuses the broker's token"), ({"delete_error_rate": 1}, "keeps failing")],
)
async def test_a_job_fails_at_once_while_csp_fails(
    csp: Csp,
    allocator: Allocator,
    administrator: Administrator,
    amqp_url: str,
    behaviour: dict[str, object],
    why: str,
) -> None:
    await csp.behave(**behaviour)
    await postpone_all(allocator)
    async with reaping(amqp_url, csp):
        for _ in range(2):  # while the breaker opens, and when it is open
            reply = await administrator.clean_up()
            assert isinstance(reply, Refused)
            assert reply.code == "CSP_UNAVAILABLE"
            assert why in reply.message
    assert {command.state for command in allocator.all(RecordJob)} == {"failed"}


async def test_a_job_waits_while_another_reaper_is_the_leader(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    await postpone_all(allocator)
    allocator.leader = (uuid.uuid4(), asyncio.get_running_loop().time() + 3600)
    async with reaping(amqp_url, csp):
        requested = asyncio.create_task(administrator.clean_up())
        await wait_until(lambda: len(allocator.all(HurryDeletions)) > 1)
        assert await csp.deletions() == []
        allocator.leader = (None, 0)
        assert (await requested).type == "CleanedUp"


async def test_a_job_fails_when_the_allocator_refuses(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    allocator.refuses = lambda _: True
    async with reaping(amqp_url, csp):
        reply = await administrator.clean_up()
    assert isinstance(reply, Refused)
    assert reply.code == "ALLOCATOR_UNAVAILABLE"


async def test_a_foreign_command_is_refused(
    csp: Csp, allocator: Allocator, administrator: Administrator, amqp_url: str
) -> None:
    async with reaping(amqp_url, csp):
        reply = await administrator.send(ExpireLeases(grace_sec=0, limit=1))
    assert isinstance(reply, Refused)
    assert reply.code == "INVALID_COMMAND"
