"""Scenarios in which students allocate, and nothing else goes on."""

import math
from functools import partial

from bench import comeback, load, meter, pool
from bench.load import LoadResult, Workload
from bench.meter import Run
from bench.servers import TOKEN, Servers, Target
from bench.sizes import Sizes

# More than any of them gives, so that no pool runs dry in the middle.
_PER_SECOND = 15_000
_PER_SECOND_AND_CONNECTION = 2_500
_MANY = 200
"""Connections where something else is compared."""


async def baseline(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    return await _new_students(servers.baseline, sizes, connections, events=False)


async def ours(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    return await _new_students(servers.ours, sizes, connections, events=True)


async def prefix(servers: Servers, sizes: Sizes, *, prefixes: int) -> Run:
    """Each request asks for one of so many prefixes of names."""
    target = servers.ours
    run = await _new_students(target, sizes, _MANY, events=True, prefixes=prefixes)
    elsewhere = await pool.count_wrong_prefixes(target.database)
    return run.having((f"{elsewhere} leases are of another prefix",) if elsewhere else ())


async def repeat(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    """Students who all have a sandbox ask again and again."""
    target, students = servers.ours, Workload(students=sizes.students)
    await pool.fill(target.database, 2 * sizes.students)
    await pool.insert_leases(target.database, students.student_prefix, sizes.students)
    await allocate(target, connections, sizes.warm_up, students)
    await pool.wait_until_idle(target.database)
    run = await meter.measure(target, partial(allocate, target, connections, sizes.seconds, students), events=True)
    problems = await pool.find_problems(target.database, sandboxes=2 * sizes.students, promised=sizes.students)
    if run.load.known != run.load.requests:
        problems = (f"{run.load.requests - (run.load.known or 0)} repeats were not answered with 200", *problems)
    return run.having(problems)


async def stock(servers: Servers, sizes: Sizes, *, sandboxes: int) -> Run:
    """So many sandboxes are available, and stay as many: what students take comes back."""
    target = servers.ours
    await pool.fill(target.database, sandboxes)
    # A million rows that wait to be written would be written in the middle of what is measured.
    await target.database.execute("CHECKPOINT")
    async with comeback.restocked(target, sandboxes) as restocked:
        warm = await allocate(target, _MANY, sizes.warm_up)
        await pool.wait_until_idle(target.database)
        run = await meter.measure(target, partial(allocate, target, _MANY, sizes.seconds), events=True)
    problems = await pool.find_problems(
        target.database,
        sandboxes=restocked.sandboxes,
        promised=warm.requests + run.load.requests,
        cut_off=2 * _MANY,
    )
    return run.having(problems).telling({"available at least": restocked.least})


async def class_start(servers: Servers, sizes: Sizes) -> Run:
    """All students of a class at the same moment: a connection and a request each."""
    target = servers.ours
    sandboxes = _enough(sizes.warm_up, 50) + sizes.students
    await pool.fill(target.database, sandboxes)
    warm = await allocate(target, 50, sizes.warm_up)
    await pool.wait_until_idle(target.database)
    at_once = partial(allocate, target, sizes.students, sizes.seconds, Workload(burst=sizes.students))
    run = await meter.measure(target, at_once, events=True)
    unanswered = sizes.students - run.load.requests
    problems = await pool.find_problems(
        target.database, sandboxes=sandboxes, promised=warm.requests + run.load.requests, cut_off=50
    )
    if unanswered:
        problems = (f"{unanswered} of {sizes.students} students got no sandbox", *problems)
    # The time that the load ran is only a bound here: it ended with the last answer.
    return run.having(problems).lasting((run.load.slowest or math.nan) / 1e3)


async def floor(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    target = servers.floor
    await allocate(target, connections, sizes.warm_up)
    return await meter.measure(target, partial(allocate, target, connections, sizes.seconds), events=False)


async def _new_students(target: Target, sizes: Sizes, connections: int, *, events: bool, prefixes: int = 0) -> Run:
    """Allocation after allocation, on a pool that does not run dry."""
    sandboxes = _enough(sizes.warm_up + sizes.seconds, connections)
    await pool.fill(target.database, sandboxes, prefixes=prefixes)
    warm = await allocate(target, connections, sizes.warm_up, Workload(prefixes=prefixes))
    if events:
        await pool.wait_until_idle(target.database)
    students = Workload(prefixes=prefixes)
    run = await meter.measure(
        target, partial(allocate, target, connections, sizes.seconds, students), events=events
    )
    return run.having(
        await pool.find_problems(
            target.database,
            sandboxes=sandboxes,
            promised=warm.requests + run.load.requests,
            cut_off=2 * connections,
        )
    )


async def allocate(target: Target, connections: int, seconds: int, students: Workload | None = None) -> LoadResult:
    return await load.run_wrk(target.url, TOKEN, students or Workload(), connections=connections, seconds=seconds)


def _enough(seconds: int, connections: int) -> int:
    """Sandboxes for so long."""
    return seconds * min(_PER_SECOND, connections * _PER_SECOND_AND_CONNECTION)
