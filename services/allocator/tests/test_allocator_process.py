"""`python -m allocator` as a process: graceful stop, kill between commit and reply, freeze."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.processes import Process, spawn
from sandbox_broker.contract import topology

from .allocator_harness import Pool, allocate_command, granted_lease
from .bus_harness import Client

# Dies after the commit of the first batch, before its first reply.
DIES_BEFORE_REPLY = """
import os, signal
import allocator.consumer
async def die(*_): os.kill(os.getpid(), signal.SIGKILL)
allocator.consumer.publish_replies = die
from allocator.main import main
main()
"""

# RabbitMQ detects a frozen process by its missing heartbeats.
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


async def test_the_next_allocator_replies_after_a_kill_between_commit_and_reply(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await pool.fill(10)
    first = await client.publish(
        [allocate_command("ann"), allocate_command("bob"), allocate_command("ann", key="k")]
    )
    dying = await start(clean_queues, pool.url, "-c", DIES_BEFORE_REPLY)
    assert await asyncio.wait_for(dying.wait(), 30) == -signal.SIGKILL
    assert await pool.value("SELECT count(*) FROM leases") == 2
    second = await start(clean_queues, pool.url)
    try:
        (replies,) = await client.replies_to(first)
        leases = [granted_lease(reply) for reply in replies]
        assert [lease.new for lease in leases] == 3 * [False]
        assert leases[0] == leases[2]
        assert await pool.value("SELECT count(*) FROM leases") == 2
    finally:
        assert await second.stop() == 0
    await pool.assert_sound()


async def test_a_stop_under_load_loses_no_request(pool: Pool, clean_queues: str, client: Client) -> None:
    envelopes, students = 150, 4
    await pool.fill(envelopes * students + 1)
    first = await start(clean_queues, pool.url)
    correlation_ids = [
        await client.publish([allocate_command(f"student-{envelope}-{student}") for student in range(students)])
        for envelope in range(envelopes)
    ]

    async def has_started() -> bool:
        return bool(await pool.value("SELECT EXISTS (SELECT FROM leases)"))

    await wait_until(has_started)
    assert await first.stop() == 0
    second = await start(clean_queues, pool.url)
    try:
        replies = [
            reply for correlation_id in correlation_ids for reply in (await client.replies_to(correlation_id))[0]
        ]
        granted_lease(
            await client.request_one(allocate_command("late"))
        )  # the second one works, even if the first one handled all
    finally:
        assert await second.stop() == 0
    assert len({granted_lease(reply).sandbox_id for reply in replies}) == envelopes * students
    assert await client.message_count(topology.ALLOCATOR_COMMANDS.name) == 0
    await pool.assert_sound()


async def test_a_frozen_allocator_is_replaced_and_fenced_when_it_resumes(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await pool.fill(3)
    frozen = await start(clean_queues, pool.url, "-c", SHORT_HEARTBEAT)
    try:
        granted_lease(await client.request_one(allocate_command("ann")))
        frozen.send(signal.SIGSTOP)
        # When the frozen process resumes, its buffer still contains this request, which the second one has
        # answered.
        waiting = await client.publish([allocate_command("bob")])
        second = await start(clean_queues, pool.url)
        try:
            (reply,) = (await client.replies_to(waiting))[0]
            assert granted_lease(reply).new
            frozen.send(signal.SIGCONT)
            granted_lease(await client.request_one(allocate_command("cid")))
        finally:
            assert await second.stop() == 0
    finally:
        frozen.send(signal.SIGCONT)
        assert await frozen.stop() == 0
    assert await pool.value("SELECT count(*) FROM leases") == 3
    await pool.assert_sound()
