"""Bugs to be planted into the broker, each with the smallest round that shows it: what students do, and what goes
wrong around them in the one moment in which the broker's promise rests on what the bug has taken away."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import asyncpg
import psutil

from devstack.processes import Process
from sandbox_broker.contract import topology
from tests.chaos import checker
from tests.chaos.client import History, Students
from tests.chaos.evidence import Covered, Evidence, Operation, Recovery
from tests.chaos.proxy import Proxy
from tests.integration.stack import Stack, eventually

ALLOCATORS = ("allocator", "second allocator")
PATIENCE_SEC = 10
"""A gateway's with the allocator: a round rests on an answer, and the machine may be busy."""
SERVED_WITHIN_SEC = 5.0
"""While somebody holds a row; the row is held for a little longer."""
NEXT_IN_LINE = """
SELECT sandbox_id FROM sandboxes WHERE available_since IS NOT NULL ORDER BY available_since, sandbox_id LIMIT 1
"""
WHO_WRITES = """
SELECT client_port FROM pg_stat_activity JOIN allocator_epoch ON pid = backend_pid WHERE queue = $1
"""
WAITING = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'allocator.commands' AND wait_event_type = 'Lock'
"""


@dataclass
class Trial:
    """One round on a running broker, and what the checker is to know of it."""

    stack: Stack
    """With two allocators."""
    links: dict[str, Proxy]
    """Those of the allocators, as in `second allocator to RabbitMQ`."""
    stop_at: Path
    """Who reaches the point that is written here dies or freezes."""
    students: Students
    history: History
    recoveries: list[Recovery] = field(default_factory=list)
    covered: list[Covered] = field(default_factory=list)

    async def ask(self, student: str) -> Operation:
        return await self.students.attempt(
            "allocate", student, chance=random.Random(0), timeout_sec=PATIENCE_SEC + 5
        )

    async def give_back(self, student: str, sandbox_id: str | None) -> Operation:
        return await self.students.attempt(
            "release", student, sandbox_id, chance=random.Random(0), timeout_sec=PATIENCE_SEC + 5
        )

    async def active(self) -> str:
        """The allocator that has written last."""
        port = await self.stack.database.fetchval(WHO_WRITES, topology.ALLOCATOR_COMMANDS.name)
        (name,) = [name for name in ALLOCATORS if port in self.links[f"{name} to PostgreSQL"].outgoing_ports]
        return name

    def cut(self, allocator: str, server: str) -> None:
        """What it carries is lost; new connections are welcome."""
        link = self.links[f"{allocator} to {server}"]
        link.reset()
        link.heal()

    async def stopped_there(self) -> None:
        """Waits until an allocator has come to the point that was written for it."""

        async def has_come() -> bool:
            return not self.stop_at.exists()

        await eventually(has_come)

    async def frozen(self) -> str:
        """Waits until an allocator is frozen; returns its name."""
        frozen: list[str] = []

        async def is_frozen() -> bool:
            frozen[:] = [name for name in ALLOCATORS if _is_stopped(self.stack.processes[name])]
            return frozen != []

        await eventually(is_frozen)
        return frozen[0]

    @asynccontextmanager
    async def undone(self, statement: str, *arguments: object) -> AsyncIterator[None]:
        """Somebody else runs the statement, and takes it back at the end of the block."""
        other = await asyncpg.connect(self.stack.environment["DATABASE_URL"])
        try:
            transaction = other.transaction()
            await transaction.start()
            await other.execute(statement, *arguments)
            yield
            await transaction.rollback()
        finally:
            await other.close()

    async def waiting(self) -> list[int]:
        """The processes of PostgreSQL that run a student's statement and wait for a lock."""
        return [row["pid"] for row in await self.stack.database.fetch(WAITING)]

    async def until_waiting(self, number: int) -> None:
        async def are_waiting() -> bool:
            return len(await self.waiting()) == number

        await eventually(are_waiting)

    async def ended(self, pid: int) -> None:
        """Waits for the end of a process of PostgreSQL whose client has gone."""

        async def has_ended() -> bool:
            there = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"
            return bool(await self.stack.database.fetchval(there, pid) == 0)

        await eventually(has_ended)


async def a_row_is_held(trial: Trial) -> None:
    """Somebody has locked the sandbox that is next in line; students come."""
    async with trial.undone(f"{NEXT_IN_LINE} FOR UPDATE"):
        since = time.time()
        served_at = await trial.students.probe("ada", until=since + SERVED_WITHIN_SEC + 1)
    trial.recoveries.append(
        Recovery(fault="a row was held", since=since, served_at=served_at, within_sec=SERVED_WITHIN_SEC)
    )


async def a_connection_breaks_amid_a_statement(trial: Trial) -> None:
    """The statement waits for a lease that somebody else is about to write, and goes on when its allocator has
    run it again on another connection."""
    database = trial.stack.database
    next_in_line = await database.fetchval(NEXT_IN_LINE)
    lease = "INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ($1, 'somebody else', now())"
    async with trial.undone(lease, next_in_line):
        asking = asyncio.create_task(trial.ask("ada"))
        await trial.until_waiting(1)
        (pid,) = await trial.waiting()
        trial.cut(await trial.active(), "PostgreSQL")

        async def has_run_again() -> bool:
            return asking.done() or len(await trial.waiting()) == 2

        await eventually(has_run_again)
    await asking
    await trial.ended(pid)


async def two_allocators_claim_at_once(trial: Trial) -> None:
    """The one waits in the middle of its statement until its student has given up, and RabbitMQ has lost it; so the
    other is given the next student."""
    lease = "INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ('elsewhere', 'ada', now())"
    async with trial.undone(lease):
        await trial.ask("ada")
        await trial.until_waiting(1)
        trial.cut(await trial.active(), "RabbitMQ")
        asking = asyncio.create_task(trial.ask("bob"))
        await trial.until_waiting(2)
    await asking


async def a_zombie_wakes_up(trial: Trial) -> None:
    """An allocator freezes with a request in hand; when it wakes, the other has answered, and the sandbox has been
    given back."""
    trial.stop_at.write_text("allocator: before commit, frozen")
    asking = asyncio.create_task(trial.ask("ada"))
    zombie = await trial.frozen()
    trial.cut(zombie, "RabbitMQ")
    lease = await asking
    assert lease.outcome == "ok"
    await trial.give_back("ada", lease.sandbox_id)
    trial.stack.processes[zombie].send(SIGCONT)

    async def has_tried() -> bool:
        fenced = any("allocator.fenced" in line for line in trial.stack.processes[zombie].tail)
        return fenced or bool(await trial.stack.database.fetchval("SELECT count(*) = 2 FROM leases"))

    await eventually(has_tried)


async def an_allocator_dies_before_the_commit(trial: Trial) -> None:
    since = time.time()
    trial.stop_at.write_text("allocator: before commit")
    await trial.ask("ada")
    await trial.stopped_there()
    trial.covered.append(Covered(since=since, until=time.time()))


async def an_allocator_dies_after_the_commit(trial: Trial) -> None:
    trial.stop_at.write_text("allocator: after commit")
    await trial.ask("ada")
    await trial.stopped_there()


async def an_allocator_dies_after_the_reply(trial: Trial) -> None:
    """The other comes to it in another second: answers tell the time in seconds."""
    active = await trial.active()
    (standby,) = [trial.stack.processes[name] for name in ALLOCATORS if name != active]
    standby.send(SIGSTOP)
    trial.stop_at.write_text("allocator: after reply")
    answer = await trial.ask("ada")
    assert answer.outcome == "ok"
    await trial.stopped_there()

    async def is_another_second() -> bool:
        return time.time() > int(answer.ended_at) + 1

    await eventually(is_another_second)
    standby.send(SIGCONT)
    await trial.ask("bob")  # in line behind what the dead one has left


async def csp_lists_what_it_has_deleted(trial: Trial) -> None:
    stack = trial.stack
    await stack.control("PATCH", "behaviour", {"deleted_stay_listed": None})
    lease = await trial.ask("ada")
    await trial.give_back("ada", lease.sandbox_id)

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(is_deleted)
    assert (await stack.sync()).status_code == 200


def _is_stopped(process: Process) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


@dataclass(frozen=True, slots=True)
class Mutant:
    bugs: tuple[str, ...]
    """Of mutating.py."""
    round: Callable[[Trial], Awaitable[None]]
    caught_by: Callable[[Evidence], Iterator[str]]
    dropped_index: str | None = None
    in_both: tuple[str, ...] = ()
    """Bugs that the broker has in the round without the mutant too: what is taken away is the last of several
    guards, and it alone must be enough."""


MUTANTS = {
    "no SKIP LOCKED": Mutant(("no_skip_locked",), a_row_is_held, checker.students_are_served_again_in_time),
    "no unique index per sandbox": Mutant(
        (),
        two_allocators_claim_at_once,
        checker.one_lease_per_sandbox,
        dropped_index="leases_one_per_sandbox",
        in_both=("no_epoch_guard", "no_lock_and_no_look"),
    ),
    "no unique index per holder": Mutant(
        (),
        a_connection_breaks_amid_a_statement,
        checker.one_active_lease_per_student,
        dropped_index="leases_one_per_holder",
    ),
    "no epoch guard": Mutant(
        ("no_epoch_guard",), a_zombie_wakes_up, checker.every_unknown_resolves_to_once_or_never
    ),
    "ack before commit": Mutant(
        ("ack_before_commit",),
        an_allocator_dies_before_the_commit,
        checker.requests_are_answered_while_a_standby_is_there,
    ),
    "reply before commit": Mutant(
        ("reply_before_commit",), an_allocator_dies_after_the_reply, checker.every_answer_is_a_lease
    ),
    "outbox row outside the transaction": Mutant(
        ("outbox_apart",), an_allocator_dies_after_the_commit, checker.every_event_is_published
    ),
    "no tombstones": Mutant(("no_tombstones",), csp_lists_what_it_has_deleted, checker.only_the_specs_transitions),
}
