"""One round: students at work, one fault after the other, and the evidence in the end."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from tests.chaos.client import History, Students
from tests.chaos.collecting import collect, come_to_rest, watch_epochs
from tests.chaos.evidence import Epoch, Evidence, Recovery
from tests.chaos.faults import Fault, NotReached
from tests.chaos.stack import Chaos
from tests.integration.stack import eventually

ACCOUNTS = 500
"""As many sandboxes at least are available at any time; the pool is filled up to three times as many."""
PLACES = 8
BEGIN_SEC = 3.0
"""Of undisturbed work before the first fault."""
BETWEEN_SEC = (0.5, 2.0)
PATIENCE_SEC = 60.0
"""How long a new student is tried to be served after a fault."""
FILL_SEC = 120.0


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that has been put on the broker."""

    fault: Fault
    recovery: Recovery


@dataclass(frozen=True, slots=True)
class Round:
    done: list[Done]
    history: History
    evidence: Evidence


async def run(chaos: Chaos, faults: Iterable[Fault], seed: str, say: Callable[[str], None]) -> Round:
    """Ends when all faults have been, each healed before the next. Raises AssertionError where the broker does not
    even get ready."""
    chance = random.Random(seed)
    history, epochs, done = History(), list[Epoch](), list[Done]()
    students = Students(chaos.gateways, history, random.Random(chance.random()))
    await _fill(chaos)
    say("the pool is filled; students begin")
    async with _in_background(watch_epochs(chaos.postgres.url, epochs)), _in_background(_keep_filled(chaos)):
        work = asyncio.create_task(students.run(PLACES))
        await asyncio.sleep(BEGIN_SEC)
        for number, fault in enumerate(faults):
            try:
                done.append(Done(fault, await _put(chaos, fault, students, f"probe-{number}")))
                say(f"{_seconds(done[-1].recovery)}  {fault.name}")
            except NotReached:
                say(f"     -  {fault.name}: nobody came there")
            await asyncio.sleep(chance.uniform(*BETWEEN_SEC))
        students.stop()
        await work
        await chaos.until_all_are_ready()
        say("waiting until every lease has ended and every used sandbox is deleted")
        if not await come_to_rest(chaos):
            say("it did not come to rest")
    return Round(done, history, await collect(chaos, history, epochs, [one.recovery for one in done]))


async def _put(chaos: Chaos, fault: Fault, students: Students, name: str) -> Recovery:
    began_at = time.time()
    await fault.inject(chaos)
    if not fault.standby:
        await asyncio.sleep(fault.lasts_sec)
        await fault.heal(chaos)
    since = began_at if fault.standby and fault.lasts_sec else time.time()
    served_at = await students.probe(name, until=since + PATIENCE_SEC)
    if fault.standby:
        await asyncio.sleep(max(0.0, began_at + fault.lasts_sec - time.time()))
        await fault.heal(chaos)
    return Recovery(fault=fault.name, since=since, served_at=served_at, within_sec=fault.served_within_sec)


async def _fill(chaos: Chaos) -> None:
    """Brings the pool to three times ACCOUNTS."""
    missing = 3 * ACCOUNTS - (await chaos.stack.stats())["available"]
    await chaos.stack.control("POST", "accounts", {"count": missing, "name_prefix": "sandbox-"})

    async def filled() -> bool:
        await chaos.stack.sync(force="true")
        return (await chaos.stack.stats())["available"] >= ACCOUNTS

    await eventually(filled, within_sec=FILL_SEC)


async def _keep_filled(chaos: Chaos) -> None:
    """More sandboxes when they run short; the syncs that the csp-syncer runs by itself find them."""
    while True:
        await asyncio.sleep(5)
        with contextlib.suppress(Exception):  # while a fault lasts; the next look is soon
            if (await chaos.stack.stats())["available"] < ACCOUNTS:
                await chaos.stack.control("POST", "accounts", {"count": ACCOUNTS, "name_prefix": "sandbox-"})


@contextlib.asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _seconds(recovery: Recovery) -> str:
    return "never " if recovery.served_at is None else f"{recovery.served_at - recovery.since:5.1f}s"
