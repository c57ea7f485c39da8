"""`python -m allocator` as it runs in production: stopped in order, killed at the worst moment, frozen."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from devstack.ports import free_port
from devstack.processes import Process, spawn
from sandbox_broker.contract import topology

from .allocator_harness import Pool, ask, granted, until
from .bus_harness import Client

# Dies when the first batch is committed and nothing of it is answered.
DIES_BEFORE_IT_ANSWERS = """
import os, signal
import allocator.consumer
async def die(*_): os.kill(os.getpid(), signal.SIGKILL)
allocator.consumer.answer = die
from allocator.main import main
main()
"""

# RabbitMQ finds out about a frozen process by its heartbeat.
SHORT_HEARTBEAT = """
import sandbox_broker.messaging.connection
sandbox_broker.messaging.connection.HEARTBEAT_SEC = 1
from allocator.main import main
main()
"""


async def start(amqp_url: str, database_url: str, *arguments: str) -> Process:
    return await spawn(
        "allocator",
        [sys.executable, *(arguments or ("-m", "allocator"))],
        cwd=Path(__file__).parent,  # no .env here
        env=os.environ | {"AMQP_URL": amqp_url, "DATABASE_URL": database_url, "ALLOCATOR_PORT": str(free_port())},
    )


async def test_a_process_that_dies_between_commit_and_reply_leaves_the_answers_to_the_next(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await pool.fill(10)
    first = await asking.publish([ask("ann"), ask("bob"), ask("ann", key="k")])
    dying = await start(clean_queues, pool.url, "-c", DIES_BEFORE_IT_ANSWERS)
    assert await asyncio.wait_for(dying.wait(), 30) == -signal.SIGKILL
    assert await pool.value("SELECT count(*) FROM leases") == 2
    second = await start(clean_queues, pool.url)
    try:
        (replies,) = await asking.answers(first)
        leases = [granted(reply) for reply in replies]
        assert [lease.new for lease in leases] == 3 * [False]
        assert leases[0] == leases[2]
        assert await pool.value("SELECT count(*) FROM leases") == 2
    finally:
        assert await second.stop() == 0
    await pool.sound()


async def test_a_process_that_is_told_to_stop_under_load_leaves_nothing_unanswered(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    envelopes, students = 150, 4
    await pool.fill(envelopes * students + 1)
    first = await start(clean_queues, pool.url)
    asked = [
        await asking.publish([ask(f"student-{envelope}-{student}") for student in range(students)])
        for envelope in range(envelopes)
    ]

    async def at_work() -> bool:
        return bool(await pool.value("SELECT EXISTS (SELECT FROM leases)"))

    await until(at_work)
    assert await first.stop() == 0
    second = await start(clean_queues, pool.url)
    try:
        replies = [reply for one in asked for reply in (await asking.answers(one))[0]]
        granted(await asking.ask_one(ask("late")))  # the second is at work, however fast the first was
    finally:
        assert await second.stop() == 0
    assert len({granted(reply).sandbox_id for reply in replies}) == envelopes * students
    assert await asking.waiting(topology.ALLOCATOR_COMMANDS.name) == 0
    await pool.sound()


async def test_a_process_that_freezes_is_succeeded_and_changes_nothing_when_it_wakes(
    pool: Pool, clean_queues: str, asking: Client
) -> None:
    await pool.fill(3)
    frozen = await start(clean_queues, pool.url, "-c", SHORT_HEARTBEAT)
    try:
        granted(await asking.ask_one(ask("ann")))
        frozen.send(signal.SIGSTOP)
        # It has this one in its buffer when it wakes, long after somebody else has answered it.
        waiting = await asking.publish([ask("bob")])
        second = await start(clean_queues, pool.url)
        try:
            (reply,) = (await asking.answers(waiting))[0]
            assert granted(reply).new
            frozen.send(signal.SIGCONT)
            granted(await asking.ask_one(ask("cid")))
        finally:
            assert await second.stop() == 0
    finally:
        frozen.send(signal.SIGCONT)
        assert await frozen.stop() == 0
    assert await pool.value("SELECT count(*) FROM leases") == 3
    await pool.sound()
