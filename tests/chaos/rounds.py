"""Round of the chaos test: students send requests, faults are injected, and the evidence is collected."""

import asyncio
import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from devstack.conditions import wait_until
from tests.chaos.client import (
    QUOTA_TRACK,
    STOCK_PREFIX,
    TOKEN_PREFIX,
    TOKEN_TRACK,
    Credentials,
    History,
    Students,
)
from tests.chaos.evidence import EpochObservation, Evidence, FailoverPeriod, Recovery, Stall
from tests.chaos.evidence_collector import (
    collect_evidence,
    list_active_leases,
    record_epochs,
    record_stalls,
    wait_until_idle,
)
from tests.chaos.faults import Fault, FaultNotReached
from tests.chaos.matrix import Step
from tests.chaos.stack import ChaosBroker
from tests.integration.stack import ADMIN

MIN_AVAILABLE = 500
"""Minimum number of available sandboxes. The pool starts with three times as many."""
PLACES = 8
QUOTA = 2
STOCK_MAX = 16
"""Also sandboxes of students who let their lease expire count for it, so students wait for these, too."""
STOCK_MIN = (0, 4)
"""Each change of the policies chooses another `min`, so intents are granted and abandoned."""
CREATION_FAULTS = {
    "create_latency_sec": 0.3,
    "create_latency_spread_sec": 1,
    "create_error_rate": 0.2,
    "create_error_status": [500, 502, 503, 504, "cut"],
    "create_error_after_effect": True,
}
APPLY_PAUSE_SEC = (1.0, 5.0)
"""Pause between two changes of the policies."""
TOKEN_GRANT = {"role": "track", "tracks": [TOKEN_TRACK], "prefixes": [TOKEN_PREFIX, STOCK_PREFIX], "max_active": 3}
TOKEN_PAUSE_SEC = (5.0, 40.0)
"""Time for which students use a token before it ends."""
TOKEN_END_SEC = 8.0
"""Time for which students use a token that has ended."""
WARM_UP_SEC = 3.0
"""Time before the first fault."""
PAUSE_SEC = (0.5, 2.0)
PAIR_DELAY_SEC = (0.0, 2.0)
"""Delay of the second fault of a pair."""
PROBE_SEC = 60.0
"""Longest time of the probe for a served student after a fault."""
FILL_SEC = 120.0
REFILL_PAUSE_SEC = 5.0
IMPORT_SEC = 60.0
"""Time after which accounts that no sync has imported are created once more."""


@dataclass(frozen=True, slots=True)
class InjectedStep:
    """Faults injected together, with the recovery after them."""

    faults: Step
    recovery: Recovery
    longest_gap_sec: float
    """Longest time without a served student, from the beginning of the fault to its end and the recovery."""


@dataclass(frozen=True, slots=True)
class Round:
    injected: list[InjectedStep]
    not_reached: list[str]
    """Faults that did not occur, each with its reason."""
    history: History
    evidence: Evidence


async def run_round(
    broker: ChaosBroker, steps: Iterable[Step], seed: str, say: Callable[[str], None], *, every_sec: float = 0
) -> Round:
    """Run all steps, one after the other, and return the evidence.

    A step starts after the previous one is healed, and at least `every_sec` after its start. Raises AssertionError
    if the pool cannot be filled.
    """
    rng = random.Random(seed)
    history, epochs, stalls = History(), list[EpochObservation](), list[Stall]()
    injected: list[InjectedStep] = []
    failover_periods: list[FailoverPeriod] = []
    not_reached: list[str] = []
    await broker.stack.control("PATCH", "behaviour", CREATION_FAULTS)
    await _fill_pool(broker)
    say("the pool is filled; students start")
    async with (
        Students(broker.gateways, history, random.Random(rng.random())) as students,
        _run_in_background(record_epochs(broker, epochs)),
        _run_in_background(record_stalls(stalls)),
        _run_in_background(_refill_pool(broker)),
        _run_in_background(_change_policies(broker, random.Random(rng.random()))),
        _run_in_background(_change_tokens(broker, students, random.Random(rng.random()))),
    ):
        measuring = students.measure() if broker.servers.cluster is not None else _do_nothing()
        async with _run_in_background(students.run(PLACES)) as work, _run_in_background(measuring):
            await asyncio.sleep(WARM_UP_SEC)
            for number, step in enumerate(steps):
                is_failover = len(step) == 1 and step[0].standby_answers_pending
                if any(fault.has_standby for fault in step):
                    await broker.wait_for_standby()  # the previous step may have killed it
                if is_failover:
                    failover_since = time.time()
                    await students.wait_for_pending()  # from now on, pending requests began in the period
                began_at = time.time()
                runner = _StepRunner(broker, step, rng)
                recovery = await runner.run(students, f"probe-{number}")
                not_reached += runner.not_reached
                if is_failover and runner.reached:
                    await students.wait_for_pending()
                    failover_periods.append(FailoverPeriod(since=failover_since, until=time.time()))
                if recovery is None:
                    say(f"     -  {'; '.join(runner.not_reached)}")
                else:
                    gap_sec = history.measure_longest_gap(began_at, max(time.time(), recovery.served_at or 0))
                    injected.append(InjectedStep(tuple(runner.reached), recovery, gap_sec))
                    times = f"{_format_wait(recovery)}  {gap_sec:5.1f}s"
                    say("; ".join([f"{times}  {recovery.fault}", *runner.not_reached]))
                pause_sec = rng.uniform(*PAUSE_SEC)
                await asyncio.sleep(max(pause_sec, began_at + every_sec - time.time()))
            say("all faults are healed; students finish and release their sandboxes")
            students.stop()
            await work
        await broker.wait_until_ready()
        await students.release_all(await list_active_leases(broker))
        say("waiting until every lease has ended and every used sandbox is deleted")
        if not await wait_until_idle(broker):
            say("the broker did not become idle in time")
    evidence = await collect_evidence(broker, history, epochs, [step.recovery for step in injected])
    evidence = dataclasses.replace(
        evidence,
        failover_periods=failover_periods,
        stalls=stalls,
        quotas={QUOTA_TRACK: QUOTA},
        stock_limits={STOCK_PREFIX: STOCK_MAX},
    )
    return Round(injected, not_reached, history, evidence)


class _StepRunner:
    """Injects and heals the faults of one step."""

    def __init__(self, broker: ChaosBroker, step: Sequence[Fault], rng: random.Random) -> None:
        self._broker = broker
        self._step = step
        self._delays_sec = [0.0, *(rng.uniform(*PAIR_DELAY_SEC) for _ in step[1:])]
        self.reached: list[Fault] = []
        self.not_reached: list[str] = []

    async def run(self, students: Students, name: str) -> Recovery | None:
        """Run all faults to their end and return the recovery, or None if no fault was reached."""
        recovery_starts = [asyncio.get_running_loop().create_future() for _ in self._step]
        async with asyncio.TaskGroup() as tasks:
            for fault, delay_sec, recovery_start in zip(self._step, self._delays_sec, recovery_starts, strict=True):
                tasks.create_task(self._run_fault(fault, delay_sec, recovery_start))
            starts: list[float] = [start for start in await asyncio.gather(*recovery_starts) if start is not None]
            served_at = None
            if starts:
                served_at = await students.probe(name, until=max(starts) + PROBE_SEC)
        if not self.reached:
            return None
        return Recovery(
            fault=" and ".join(fault.name for fault in self.reached),
            since=max(starts),
            served_at=served_at,
            within_sec=max(fault.served_within_sec for fault in self.reached),
        )

    async def _run_fault(
        self, fault: Fault, delay_sec: float, recovery_start: "asyncio.Future[float | None]"
    ) -> None:
        """Inject and heal a fault. Set `recovery_start` to the time from which students must be served again."""
        await asyncio.sleep(delay_sec)
        try:
            await fault.inject(self._broker)
            if fault.has_standby:
                recovery_start.set_result(time.time())
            await asyncio.sleep(fault.duration_sec)
            await fault.heal(self._broker)
        except FaultNotReached as reason:
            self.not_reached.append(f"{fault.name}: {reason}")
        else:
            self.reached.append(fault)
        if not recovery_start.done():
            recovery_start.set_result(time.time() if fault in self.reached else None)


async def _fill_pool(broker: ChaosBroker) -> None:
    """Fill the pool to three times MIN_AVAILABLE."""
    missing = 3 * MIN_AVAILABLE - (await broker.stack.stats())["available"]
    await broker.stack.control("POST", "accounts", {"count": missing, "name_prefix": "sandbox-"})

    async def is_filled() -> bool:
        await broker.stack.sync(force="true")
        return (await broker.stack.stats())["available"] >= MIN_AVAILABLE

    await wait_until(is_filled, within_sec=FILL_SEC)


async def _refill_pool(broker: ChaosBroker) -> None:
    """Create accounts in CSP when sandboxes run short. The periodic syncs of the csp-syncer import them.

    More accounts are created only after an import, or the pool would grow without limit on a slow machine.
    """

    async def is_filled() -> bool:
        with contextlib.suppress(Exception):  # requests may fail during a fault; the loop tries again soon
            return (await broker.stack.stats())["available"] >= MIN_AVAILABLE
        return False

    while True:
        await asyncio.sleep(REFILL_PAUSE_SEC)
        if not await is_filled():
            with contextlib.suppress(Exception):
                await broker.stack.control("POST", "accounts", {"count": MIN_AVAILABLE, "name_prefix": "sandbox-"})
            with contextlib.suppress(AssertionError):
                await wait_until(is_filled, within_sec=IMPORT_SEC, every_sec=REFILL_PAUSE_SEC)


async def _change_policies(broker: ChaosBroker, rng: random.Random) -> None:
    """Apply other policies without end, sometimes without the quota. Its limit and the `max` of the stock stay."""
    quota = {"name": QUOTA_TRACK, "match": {"track_name": QUOTA_TRACK}, "max_active": QUOTA}
    stock = {"name": "stock", "match": {"name_prefix": STOCK_PREFIX}}
    while True:
        rule = {"name_prefix": STOCK_PREFIX, "min": rng.randint(*STOCK_MIN), "max": STOCK_MAX}
        policies = [
            {**stock, "stock": rule},
            *([{**quota, "max_replacements": rng.randint(1, 5)}] if rng.random() < 0.8 else []),
        ]
        with contextlib.suppress(Exception):  # requests may fail during a fault; the next change follows soon
            await broker.stack.client.put(
                f"{rng.choice(broker.gateways)}/v1/admin/policies", headers=ADMIN, json={"policies": policies}
            )
        await asyncio.sleep(rng.uniform(*APPLY_PAUSE_SEC))


async def _change_tokens(broker: ChaosBroker, students: Students, rng: random.Random) -> None:
    """Issue tokens for students without end. Revoke each one, or suspend it for some time and revoke it later."""

    async def request(method: str, path: str, **more: Any) -> httpx.Response | None:
        with contextlib.suppress(Exception):  # requests may fail during a fault; the next token follows soon
            url = f"{rng.choice(broker.gateways)}/v1/admin/tokens{path}"
            return await broker.stack.client.request(method, url, headers=ADMIN, **more)
        return None

    for number in itertools.count(1):
        name = f"{TOKEN_TRACK}-{number}"
        issued = await request("POST", "", json={**TOKEN_GRANT, "name": name})
        if issued is not None and issued.status_code == 201:
            students.credentials = Credentials(issued.json()["token"], name)
        await asyncio.sleep(rng.uniform(*TOKEN_PAUSE_SEC))
        if rng.random() < 0.5:
            await request("POST", f"/{name}/suspend")
            await asyncio.sleep(TOKEN_END_SEC)
            await request("POST", f"/{name}/resume")
            await asyncio.sleep(rng.uniform(*TOKEN_PAUSE_SEC))
        await request("DELETE", f"/{name}")
        await asyncio.sleep(TOKEN_END_SEC)


@contextlib.asynccontextmanager
async def _run_in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _do_nothing() -> None:
    pass


def _format_wait(recovery: Recovery) -> str:
    return "never " if recovery.served_at is None else f"{recovery.served_at - recovery.since:5.1f}s"
