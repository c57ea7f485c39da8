"""What is measured. A scenario is run several times, in turn with the others, so that what is compared meets the
same state of the machine."""

import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial

from bench import load, meter, pgbench, pool
from bench.load import Load
from bench.meter import Run
from bench.servers import TOKEN, Servers, Target

# More than any of them gives, so that no pool runs dry in the middle.
_PER_SECOND = 15_000
_PER_SECOND_AND_CONNECTION = 2_500


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long, and how many."""

    seconds: int = 8
    warm_up: int = 2
    students: int = 1_000
    """In a class."""


@dataclass(frozen=True, slots=True)
class Scenario:
    group: str
    """A word that chooses it together with its like."""
    name: str
    """The word that chooses it alone."""
    run: Callable[[Servers, Sizes], Awaitable[Run]]


async def baseline(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    return await _new_students(servers.baseline, sizes, connections, events=False)


async def ours(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    return await _new_students(servers.ours, sizes, connections, events=True)


async def class_start(servers: Servers, sizes: Sizes) -> Run:
    """All students of a class at the same moment: a connection and a request each."""
    target = servers.ours
    sandboxes = _enough(sizes.warm_up, 50) + sizes.students
    await pool.fill(target.database, sandboxes)
    warm = await _allocate(target, 50, sizes.warm_up)
    await pool.settle(target.database)

    async def one_each() -> Load:
        return await load.allocations(
            target.url, TOKEN, connections=sizes.students, seconds=sizes.seconds, each_once=True
        )

    run = await meter.measure(target, one_each, events=True)
    unanswered = sizes.students - run.load.requests
    problems = await pool.problems(
        target.database, sandboxes=sandboxes, promised=warm.requests + run.load.requests, cut_off=50
    )
    if unanswered:
        problems = (f"{unanswered} of {sizes.students} students got no sandbox", *problems)
    # The time that the load ran is only a bound here: it ended with the last answer.
    return run.having(problems).lasting((run.load.slowest or math.nan) / 1e3)


async def floor(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    target = servers.floor
    await _allocate(target, connections, sizes.warm_up)
    return await meter.measure(target, partial(_allocate, target, connections, sizes.seconds), events=False)


async def claim(servers: Servers, sizes: Sizes, *, clients: int) -> Run:
    """A sandbox is claimed in each transaction, and that is all."""
    target, sandboxes = servers.bare, _enough(sizes.seconds, clients)
    await pool.fill(target.database, sandboxes)
    run = await meter.measure(target, _pgbench(target, "claim", clients, sizes), events=False)
    claimed = await pool.claimed(target.database)
    return run.having(() if claimed == run.load.requests else (f"{claimed} sandboxes are claimed",))


async def lease(servers: Servers, sizes: Sizes, *, clients: int) -> Run:
    """Each transaction does what an allocation does: sandbox, lease and event."""
    target, sandboxes = servers.bare, _enough(sizes.seconds, clients)
    await pool.fill(target.database, sandboxes)
    run = await meter.measure(target, _pgbench(target, "lease", clients, sizes), events=False)
    return run.having(await pool.problems(target.database, sandboxes=sandboxes, promised=run.load.requests))


def _pgbench(target: Target, script: str, clients: int, sizes: Sizes) -> Callable[[], Awaitable[Load]]:
    return partial(pgbench.transactions, target.database_url, script, clients=clients, seconds=sizes.seconds)


async def _new_students(target: Target, sizes: Sizes, connections: int, *, events: bool) -> Run:
    """Allocation after allocation, on a pool that does not run dry."""
    sandboxes = _enough(sizes.warm_up + sizes.seconds, connections)
    await pool.fill(target.database, sandboxes)
    warm = await _allocate(target, connections, sizes.warm_up)
    if events:
        await pool.settle(target.database)
    run = await meter.measure(target, partial(_allocate, target, connections, sizes.seconds), events=events)
    return run.having(
        await pool.problems(
            target.database,
            sandboxes=sandboxes,
            promised=warm.requests + run.load.requests,
            cut_off=2 * connections,
        )
    )


async def _allocate(target: Target, connections: int, seconds: int) -> Load:
    return await load.allocations(target.url, TOKEN, connections=connections, seconds=seconds)


def _enough(seconds: int, connections: int) -> int:
    """Sandboxes for so long."""
    return seconds * min(_PER_SECOND, connections * _PER_SECOND_AND_CONNECTION)


def _each(group: str, what: str, run: Callable[..., Awaitable[Run]], numbers: Iterable[int]) -> list[Scenario]:
    return [Scenario(group, f"{group}-{number}", partial(run, **{what: number})) for number in numbers]


_CONNECTIONS = (1, 50, 200)
_CLIENTS = (8, 16, 50)

# Neighbours are compared with each other.
ALL: tuple[Scenario, ...] = (
    *(
        scenario
        for pair in zip(
            _each("baseline", "connections", baseline, _CONNECTIONS),
            _each("ours", "connections", ours, _CONNECTIONS),
            strict=True,
        )
        for scenario in pair
    ),
    *_each("ours", "connections", ours, [1_000]),
    *_each("claim", "clients", claim, _CLIENTS),
    *_each("lease", "clients", lease, _CLIENTS),
    *_each("floor", "connections", floor, [200]),
    Scenario("class-start", "class-start", class_start),
)
