"""Mutants: planted bugs, each with the smallest round in which the checker can detect it.

A round creates the one situation in which a guarantee depends on the code that the bug removes.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import asyncpg
import psutil

from devstack.conditions import wait_until
from devstack.processes import Process
from sandbox_broker.contract import topology
from tests.chaos import checker
from tests.chaos.client import (
    TOKEN_STOCK_STUDENTS,
    TOKEN_STUDENTS,
    TOKEN_TRACK,
    Credentials,
    History,
    Students,
)
from tests.chaos.evidence import Evidence, FailoverPeriod, Operation, Recovery
from tests.chaos.proxy import Proxy
from tests.integration.stack import ADMIN, Stack

ALLOCATORS = ("allocator", "second allocator")
MUTATED = {**dict.fromkeys(ALLOCATORS, "allocator"), "provisioner": "provisioner"}
"""Module of each process that runs with the planted bugs."""
TOKEN_STUDENT = f"{TOKEN_STUDENTS[0]}1"
WAITING_STUDENT = f"{TOKEN_STOCK_STUDENTS}1"
"""Student in the waiting line. A round has no sandbox of this prefix."""
STOCK_POLICY = {
    "name": "stock",
    "match": {"name_prefix": "stock-"},
    "stock": {"name_prefix": "stock-", "min": 1, "max": 2},
}
ALLOCATE_TIMEOUT_SEC = 6
"""Time-out of the gateway for a reply. It is long, because a round needs the reply even on a busy machine."""
SERVED_WITHIN_SEC = 5.0
"""Limit for an allocation while another transaction locks a row. The lock lasts slightly longer."""
SELECT_NEXT_SANDBOX = """
SELECT sandbox_id FROM sandboxes WHERE available_since IS NOT NULL ORDER BY available_since, sandbox_id LIMIT 1
"""
SELECT_ACTIVE_PORT = """
SELECT client_port FROM pg_stat_activity JOIN allocator_epoch ON pid = backend_pid WHERE queue = $1
"""
SELECT_BLOCKED_BACKENDS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'allocator.commands' AND wait_event_type = 'Lock'
"""


@dataclass
class Trial:
    """Round on a running broker, with its records for the checker."""

    stack: Stack
    """Broker with two allocators."""
    links: dict[str, Proxy]
    """Links of the allocators by name, such as `second allocator to RabbitMQ`."""
    start: Callable[[str], Awaitable[None]]
    """Starts a process of MUTATED again."""
    stop_at: Path
    """File with a point; the process that reaches it dies or freezes."""
    students: Students
    history: History
    recoveries: list[Recovery] = field(default_factory=list)
    failover_periods: list[FailoverPeriod] = field(default_factory=list)

    async def allocate(self, student: str, **more: Any) -> Operation:
        return await self.students.send_request(
            "allocate", student, rng=random.Random(0), timeout_sec=ALLOCATE_TIMEOUT_SEC + 5, **more
        )

    async def release(self, student: str, sandbox_id: str | None, **more: Any) -> Operation:
        return await self.students.send_request(
            "release", student, sandbox_id, rng=random.Random(0), timeout_sec=ALLOCATE_TIMEOUT_SEC + 5, **more
        )

    async def issue_token(self, name: str) -> Credentials:
        """Issue a token for all name prefixes of TOKEN_TRACK and one active lease."""
        token = await self.stack.issue_token(name=name, role="track", tracks=[TOKEN_TRACK], max_active=1)
        return Credentials(token, name)

    async def find_active_allocator(self) -> str:
        """Return the name of the allocator with the current fencing epoch."""
        port = await self.stack.database.fetchval(SELECT_ACTIVE_PORT, topology.ALLOCATOR_COMMANDS.name)
        (name,) = [name for name in ALLOCATORS if port in self.links[f"{name} to PostgreSQL"].outgoing_ports]
        return name

    def reset_link(self, allocator: str, server: str) -> None:
        """Reset the connections of a link. New connections pass."""
        link = self.links[f"{allocator} to {server}"]
        link.reset()
        link.heal()

    async def wait_for_stop(self) -> None:
        """Wait until a process has reached the point in `stop_at`."""

        async def is_reached() -> bool:
            return not self.stop_at.exists()

        await wait_until(is_reached)

    async def wait_for_frozen_allocator(self) -> str:
        """Wait until an allocator is frozen, and return its name."""
        frozen: list[str] = []

        async def is_frozen() -> bool:
            frozen[:] = [name for name in ALLOCATORS if _is_stopped(self.stack.processes[name])]
            return frozen != []

        await wait_until(is_frozen)
        return frozen[0]

    @asynccontextmanager
    async def hold_transaction(self, statement: str, *arguments: object) -> AsyncIterator[None]:
        """Run the statement in another transaction, and roll it back at the end of the block."""
        other = await asyncpg.connect(self.stack.environment["DATABASE_URL"])
        try:
            transaction = other.transaction()
            await transaction.start()
            await other.execute(statement, *arguments)
            yield
            await transaction.rollback()
        finally:
            await other.close()

    async def list_blocked_backends(self) -> list[int]:
        """Return the pids of the PostgreSQL backends waiting for a lock in a student's statement."""
        return [row["pid"] for row in await self.stack.database.fetch(SELECT_BLOCKED_BACKENDS)]

    async def wait_for_blocked_backends(self, count: int) -> None:
        async def are_blocked() -> bool:
            return len(await self.list_blocked_backends()) == count

        await wait_until(are_blocked)

    async def wait_for_backend_exit(self, pid: int) -> None:
        """Wait until the backend of a broken connection has exited."""

        async def has_ended() -> bool:
            count = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"
            return bool(await self.stack.database.fetchval(count, pid) == 0)

        await wait_until(has_ended)


async def hold_next_row(trial: Trial) -> None:
    """Lock the row of the next sandbox in another transaction while students allocate."""
    async with trial.hold_transaction(f"{SELECT_NEXT_SANDBOX} FOR UPDATE"):
        since = time.time()
        served_at = await trial.students.probe("ada", until=since + SERVED_WITHIN_SEC + 1)
    trial.recoveries.append(
        Recovery(fault="locked row", since=since, served_at=served_at, within_sec=SERVED_WITHIN_SEC)
    )


async def break_connection_during_statement(trial: Trial) -> None:
    """Block a statement by an uncommitted lease until the allocator has retried it on a new connection."""
    database = trial.stack.database
    next_sandbox = await database.fetchval(SELECT_NEXT_SANDBOX)
    lease = "INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ($1, 'other student', now())"
    async with trial.hold_transaction(lease, next_sandbox):
        allocation = asyncio.create_task(trial.allocate("ada"))
        await trial.wait_for_blocked_backends(1)
        (pid,) = await trial.list_blocked_backends()
        trial.reset_link(await trial.find_active_allocator(), "PostgreSQL")

        async def has_run_again() -> bool:
            return allocation.done() or len(await trial.list_blocked_backends()) == 2

        await wait_until(has_run_again)
    await allocation
    await trial.wait_for_backend_exit(pid)


async def claim_in_two_allocators(trial: Trial) -> None:
    """Block the statement of one allocator and disconnect it from RabbitMQ: the other gets the next student.

    The disconnection is a second after the gateway's time-out, because the other allocator must not get the first
    student too: the command of that student expires in RabbitMQ slightly later than in the gateway.
    """
    lease = "INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ('elsewhere', 'ada', now())"
    async with trial.hold_transaction(lease):
        operation = await trial.allocate("ada")
        await trial.wait_for_blocked_backends(1)
        await _wait_for_time(operation.ended_at + 1)
        trial.reset_link(await trial.find_active_allocator(), "RabbitMQ")
        allocation = asyncio.create_task(trial.allocate("bob"))
        await trial.wait_for_blocked_backends(2)
    await allocation


async def resume_frozen_allocator(trial: Trial) -> None:
    """Freeze an allocator before its commit. Resume it after the standby has served the student and the sandbox is
    released.
    """
    trial.stop_at.write_text("allocator: before commit, frozen")
    allocation = asyncio.create_task(trial.allocate("ada"))
    frozen = await trial.wait_for_frozen_allocator()
    trial.reset_link(frozen, "RabbitMQ")
    operation = await allocation
    assert operation.outcome == "ok"
    await trial.release("ada", operation.sandbox_id)
    trial.stack.processes[frozen].send(SIGCONT)

    async def has_tried() -> bool:
        fenced = any("allocator.fenced" in line for line in trial.stack.processes[frozen].tail)
        return fenced or bool(await trial.stack.database.fetchval("SELECT count(*) = 2 FROM leases"))

    await wait_until(has_tried)


async def kill_allocator_before_commit(trial: Trial) -> None:
    since = time.time()
    trial.stop_at.write_text("allocator: before commit")
    await trial.allocate("ada")
    await trial.wait_for_stop()
    trial.failover_periods.append(FailoverPeriod(since=since, until=time.time()))


async def kill_allocator_after_commit(trial: Trial) -> None:
    trial.stop_at.write_text("allocator: after commit")
    await trial.allocate("ada")
    await trial.wait_for_stop()


async def kill_allocator_after_reply(trial: Trial) -> None:
    """Kill the allocator after its reply, and let the standby repeat the command in the next second.

    The delay makes a second lease visible, because responses contain times in whole seconds.
    """
    active = await trial.find_active_allocator()
    (standby,) = [trial.stack.processes[name] for name in ALLOCATORS if name != active]
    standby.send(SIGSTOP)
    trial.stop_at.write_text("allocator: after reply")
    operation = await trial.allocate("ada")
    assert operation.outcome == "ok"
    await trial.wait_for_stop()
    await _wait_for_time(int(operation.ended_at) + 1)
    standby.send(SIGCONT)
    await trial.allocate("bob")  # queued behind the command of the killed allocator


async def list_deleted_account(trial: Trial) -> None:
    stack = trial.stack
    await stack.control("PATCH", "behaviour", {"deleted_stay_listed": None})
    lease = await trial.allocate("ada")
    await trial.release("ada", lease.sandbox_id)

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    assert (await stack.sync()).status_code == 200


async def release_with_another_token(trial: Trial) -> None:
    own, other = await trial.issue_token("own"), await trial.issue_token("other")
    lease = await trial.allocate(TOKEN_STUDENT, credentials=own)
    assert lease.outcome == "ok"
    await trial.release(TOKEN_STUDENT, lease.sandbox_id, credentials=other)


async def exceed_quota_of_a_token(trial: Trial) -> None:
    token = await trial.issue_token("own")
    for number in range(2):
        await trial.allocate(f"{TOKEN_STUDENT}-{number}", credentials=token)


async def ask_for_the_place_of_another(trial: Trial) -> None:
    """Repeat the request of a waiting student without the secret."""
    token = await trial.issue_token("own")
    waiting = await trial.allocate(WAITING_STUDENT, credentials=replace(token, secret="secret of the student"))
    assert waiting.outcome == "waiting"
    await trial.allocate(WAITING_STUDENT, credentials=token)


async def kill_provisioner_after_creation(trial: Trial) -> None:
    """Kill the provisioner when CSP has created the account, and let the next one continue the intent."""
    trial.stop_at.write_text("provisioner: after CSP")
    applied = await trial.stack.client.put(
        f"{trial.stack.url}/v1/admin/policies", headers=ADMIN, json={"policies": [STOCK_POLICY]}
    )
    assert applied.status_code == 200, applied.text
    await trial.wait_for_stop()
    await trial.start("provisioner")

    async def is_full() -> bool:
        levels = "SELECT available = 1 AND creating = 0 FROM stock_levels"
        counts_two = "SELECT count(*) = 2 FROM sandboxes WHERE name LIKE 'stock-%'"
        return any([await trial.stack.database.fetchval(query) for query in (levels, counts_two)])

    await wait_until(is_full)


async def _wait_for_time(unix_time: float) -> None:
    async def is_later() -> bool:
        return time.time() > unix_time

    await wait_until(is_later)


def _is_stopped(process: Process) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


@dataclass(frozen=True, slots=True)
class Mutant:
    bugs: tuple[str, ...]
    """Bugs of mutating.py to plant."""
    run_round: Callable[[Trial], Awaitable[None]]
    detected_by: Callable[[Evidence], Iterator[str]]
    dropped_index: str | None = None
    baseline_bugs: tuple[str, ...] = ()
    """Bugs planted in the round without the mutant too. They disable the other guards, so that the mutant
    removes the last one.
    """


MUTANTS = {
    "no SKIP LOCKED": Mutant(("no_skip_locked",), hold_next_row, checker.students_are_served_again_in_time),
    "no unique index per sandbox": Mutant(
        (),
        claim_in_two_allocators,
        checker.one_lease_per_sandbox,
        dropped_index="leases_one_per_sandbox",
        baseline_bugs=("no_epoch_guard", "no_lock_and_no_recheck"),
    ),
    "no unique index per holder": Mutant(
        (),
        break_connection_during_statement,
        checker.one_active_lease_per_student,
        dropped_index="leases_one_per_holder",
    ),
    "no epoch guard": Mutant(
        ("no_epoch_guard",), resume_frozen_allocator, checker.every_unknown_resolves_to_once_or_never
    ),
    "ack before commit": Mutant(
        ("ack_before_commit",),
        kill_allocator_before_commit,
        checker.requests_are_answered_while_a_standby_is_there,
    ),
    "reply before commit": Mutant(
        ("reply_before_commit",), kill_allocator_after_reply, checker.every_answer_is_a_lease
    ),
    "outbox row outside the transaction": Mutant(
        ("outbox_in_separate_statement",), kill_allocator_after_commit, checker.every_event_is_published
    ),
    "no tombstones": Mutant(("no_tombstones",), list_deleted_account, checker.only_the_specs_transitions),
    "no token scope in the release": Mutant(
        ("no_token_scope_in_release",), release_with_another_token, checker.tokens_stay_in_their_scope
    ),
    "no token quota": Mutant(("no_token_quota",), exceed_quota_of_a_token, checker.no_token_exceeds_its_quota),
    "no secret of a place": Mutant(
        ("no_secret_of_a_place",), ask_for_the_place_of_another, checker.places_need_their_secret
    ),
    "no look-up by name": Mutant(
        ("no_look_up_by_name",), kill_provisioner_after_creation, checker.one_account_per_intent_or_none
    ),
}
