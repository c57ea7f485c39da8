"""One round: students at work, one fault or two at a time, and the evidence in the end."""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.client import History, Students
from tests.chaos.collecting import collect, come_to_rest, held, watch_epochs, watch_machine
from tests.chaos.evidence import Covered, Epoch, Evidence, Recovery, Stall
from tests.chaos.faults import Fault, NotReached
from tests.chaos.matrix import Step
from tests.chaos.stack import Chaos
from tests.integration.stack import eventually

ACCOUNTS = 500
"""As many sandboxes at least are available at any time; the pool is filled up to three times as many."""
PLACES = 8
BEGIN_SEC = 3.0
"""Of undisturbed work before the first fault."""
BETWEEN_SEC = (0.5, 2.0)
APART_SEC = (0.0, 2.0)
"""Of two faults at a time."""
PATIENCE_SEC = 60.0
"""How long a new student is tried to be served after a fault."""
FILL_SEC = 120.0


@dataclass(frozen=True, slots=True)
class Done:
    """What has been put on the broker at a time."""

    faults: Step
    recovery: Recovery


@dataclass(frozen=True, slots=True)
class Round:
    done: list[Done]
    not_reached: list[str]
    """Faults that came to nothing."""
    history: History
    evidence: Evidence


async def run(
    chaos: Chaos, steps: Iterable[Step], seed: str, say: Callable[[str], None], *, every_sec: float = 0
) -> Round:
    """Ends when all steps have been, each healed before the next, which begins `every_sec` after it at the
    earliest. Raises AssertionError where the broker does not even get ready."""
    chance = random.Random(seed)
    history, epochs, stalls, done = History(), list[Epoch](), list[Stall](), list[Done]()
    covered: list[Covered] = []
    not_reached: list[str] = []
    await _fill(chaos)
    say("the pool is filled; students begin")
    async with (
        Students(chaos.gateways, history, random.Random(chance.random())) as students,
        _in_background(watch_epochs(chaos.postgres.url, epochs)),
        _in_background(watch_machine(stalls)),
        _in_background(_keep_filled(chaos)),
    ):
        async with _in_background(students.run(PLACES)) as work:
            await asyncio.sleep(BEGIN_SEC)
            for number, step in enumerate(steps):
                covers = len(step) == 1 and step[0].covered
                if covers:
                    await chaos.until_a_standby_is_there()
                    covered_since = time.time()
                    await students.until_answered()  # what is in hand from now on has been asked since
                began_at = time.time()
                put = _Put(chaos, step, chance)
                recovery = await put.run(students, f"probe-{number}")
                not_reached += put.not_reached
                if covers and put.reached:
                    await students.until_answered()
                    covered.append(Covered(since=covered_since, until=time.time()))
                if recovery is None:
                    say(f"     -  {'; '.join(put.not_reached)}")
                else:
                    done.append(Done(tuple(put.reached), recovery))
                    say("; ".join([f"{_seconds(recovery)}  {recovery.fault}", *put.not_reached]))
                pause_sec = chance.uniform(*BETWEEN_SEC)
                await asyncio.sleep(max(pause_sec, began_at + every_sec - time.time()))
            say("all faults are healed; students finish, and give back what they hold")
            students.stop()
            await work
        await chaos.until_all_are_ready()
        await students.give_back(await held(chaos))
        say("waiting until every lease has ended and every used sandbox is deleted")
        if not await come_to_rest(chaos):
            say("it did not come to rest")
    evidence = await collect(chaos, history, epochs, [one.recovery for one in done])
    return Round(done, not_reached, history, dataclasses.replace(evidence, covered=covered, stalls=stalls))


class _Put:
    """The faults of one step."""

    def __init__(self, chaos: Chaos, step: Sequence[Fault], chance: random.Random) -> None:
        self._chaos = chaos
        self._step = step
        self._after_sec = [0.0, *(chance.uniform(*APART_SEC) for _ in step[1:])]
        self.reached: list[Fault] = []
        self.not_reached: list[str] = []

    async def run(self, students: Students, name: str) -> Recovery | None:
        """Returns when all are healed; None if none was reached."""
        recovering = [asyncio.get_running_loop().create_future() for _ in self._step]
        async with asyncio.TaskGroup() as lives:
            for fault, after_sec, since in zip(self._step, self._after_sec, recovering, strict=True):
                lives.create_task(self._live(fault, after_sec, since))
            sinces: list[float] = [moment for moment in await asyncio.gather(*recovering) if moment is not None]
            served_at = None
            if sinces:
                served_at = await students.probe(name, until=max(sinces) + PATIENCE_SEC)
        if not self.reached:
            return None
        return Recovery(
            fault=" and ".join(fault.name for fault in self.reached),
            since=max(sinces),
            served_at=served_at,
            within_sec=max(fault.served_within_sec for fault in self.reached),
        )

    async def _live(self, fault: Fault, after_sec: float, since: "asyncio.Future[float | None]") -> None:
        """From the beginning of a fault to its end; tells from when on students are to be served again."""
        await asyncio.sleep(after_sec)
        try:
            await fault.inject(self._chaos)
            if fault.standby:
                since.set_result(time.time())
            await asyncio.sleep(fault.lasts_sec)
            await fault.heal(self._chaos)
        except NotReached as reason:
            self.not_reached.append(f"{fault.name}: {reason}")
        else:
            self.reached.append(fault)
        if not since.done():
            since.set_result(time.time() if fault in self.reached else None)


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
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _seconds(recovery: Recovery) -> str:
    return "never " if recovery.served_at is None else f"{recovery.served_at - recovery.since:5.1f}s"
