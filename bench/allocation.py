"""Scenarios in which students allocate and no maintenance runs."""

import asyncio
import math
from functools import partial
from itertools import count

import httpx

from bench import load, meter, pool, replenish
from bench.load import LoadResult, Workload
from bench.meter import Run
from bench.servers import ADMIN_TOKEN, TOKEN, Servers, Target
from bench.sizes import Sizes
from devstack.errors import CannotRun

# Upper bounds of the measured throughput, so that no pool runs dry during a run.
_MAX_PER_SECOND = 15_000
_MAX_PER_SECOND_AND_CONNECTION = 2_500
_CONNECTIONS = 200
"""Connections of scenarios that vary another parameter."""
_WARM_UP_CONNECTIONS = 50
_TRACK = "bench-track"
"""Lab of the load (students.lua)."""
_TIMEOUT_SEC = 30.0
_ISSUING_CONNECTIONS = 20
"""Tokens that are issued at the same time."""
_token_numbers = count(1)


async def run_baseline(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    return await _run_new_students(servers.baseline, sizes, connections, has_events=False)


async def run_broker(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    return await _run_new_students(servers.broker, sizes, connections, has_events=True)


async def run_prefixes(servers: Servers, sizes: Sizes, *, prefixes: int) -> Run:
    """Cycle the requests through `prefixes` sandbox name prefixes."""
    target = servers.broker
    run = await _run_new_students(target, sizes, _CONNECTIONS, has_events=True, prefixes=prefixes)
    wrong = await pool.count_wrong_prefixes(target.database)
    return run.with_problems((f"{wrong} leases have a wrong prefix",) if wrong else ())


async def run_tokens(servers: Servers, sizes: Sizes, *, tokens: int, has_quota: bool) -> Run:
    """Use named tokens in turn. Each is limited to the lab of the load, and with `has_quota` to more leases than
    the run makes."""
    target = servers.broker
    if has_quota not in servers.tokens:
        servers.tokens[has_quota] = await _issue_tokens(target, tokens, max_active=1_000_000 if has_quota else None)
    token = ",".join(servers.tokens[has_quota])
    return await _run_new_students(target, sizes, _CONNECTIONS, has_events=True, token=token)


async def _issue_tokens(target: Target, number: int, *, max_active: int | None) -> list[str]:
    async def issue(_: int) -> str:
        name = f"bench-{next(_token_numbers)}"
        grant = {"name": name, "role": "track", "tracks": [_TRACK], "max_active": max_active}
        response = await client.post(f"{target.url}/v1/admin/tokens", json=grant)
        if response.status_code != 201:
            raise CannotRun(f"a new token was answered {response.status_code}: {response.text}", status=1)
        return str(response.json()["token"])

    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    limits = httpx.Limits(max_connections=_ISSUING_CONNECTIONS)
    async with httpx.AsyncClient(timeout=_TIMEOUT_SEC, trust_env=False, headers=headers, limits=limits) as client:
        return await asyncio.gather(*map(issue, range(number)))


async def run_repeats(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    """Request a sandbox again and again for students with a lease."""
    target, workload = servers.broker, Workload(students=sizes.students)
    await pool.fill(target.database, 2 * sizes.students)
    await pool.insert_leases(target.database, workload.student_prefix, sizes.students)
    await _allocate(target, connections, sizes.warm_up, workload)
    await pool.wait_until_idle(target.database)
    generate_load = partial(_allocate, target, connections, sizes.seconds, workload)
    run = await meter.measure_load(target, generate_load, has_events=True)
    problems = await pool.find_problems(target.database, sandboxes=2 * sizes.students, confirmed=sizes.students)
    if run.load.known != run.load.requests:
        problems = (f"{run.load.requests - (run.load.known or 0)} repeats were not answered with 200", *problems)
    return run.with_problems(problems)


async def run_pool_size(servers: Servers, sizes: Sizes, *, sandboxes: int) -> Run:
    """Allocate from a pool in which `sandboxes` stay available, because new ones replace allocated ones."""
    target = servers.broker
    await pool.fill(target.database, sandboxes)
    # A checkpoint of a million new rows during the measurement would distort it.
    await target.database.execute("CHECKPOINT")
    async with replenish.keep_replenished(target, sandboxes) as replenished:
        warm_up = await _allocate(target, _CONNECTIONS, sizes.warm_up)
        await pool.wait_until_idle(target.database)
        generate_load = partial(_allocate, target, _CONNECTIONS, sizes.seconds)
        run = await meter.measure_load(target, generate_load, has_events=True)
    problems = await pool.find_problems(
        target.database,
        sandboxes=replenished.sandboxes,
        confirmed=warm_up.requests + run.load.requests,
        cut_off=2 * _CONNECTIONS,
    )
    return run.with_problems(problems).with_figures({"available at least": replenished.min_available})


async def run_class_start(servers: Servers, sizes: Sizes) -> Run:
    """Send one request per student of a class at the same moment, each on its own connection."""
    return await _run_class(servers, sizes)


async def run_class_beside_events(servers: Servers, sizes: Sizes) -> Run:
    """Start a class while the outbox relay publishes a `sandbox.discovered` for each account of a listing."""
    run = await _run_class(servers, sizes, discovered=sizes.accounts)
    if not run.lag.events:
        run = run.with_problems(("all events were published before the end of the load",))
    return run.with_figures({"events left": run.lag.events})


async def _run_class(servers: Servers, sizes: Sizes, *, discovered: int = 0) -> Run:
    """Start a class, with events of this number of sandboxes in the outbox. The sandboxes of the class are among
    them."""
    target = servers.broker
    sandboxes = _max_allocations(sizes.warm_up, _WARM_UP_CONNECTIONS) + max(sizes.students, discovered)
    await pool.fill(target.database, sandboxes)
    warm_up = await _allocate(target, _WARM_UP_CONNECTIONS, sizes.warm_up)
    await pool.wait_until_idle(target.database)
    if discovered:
        await pool.announce_sandboxes(target.database, discovered)
    generate_load = partial(_allocate, target, sizes.students, sizes.seconds, Workload(burst=sizes.students))
    run = await meter.measure_load(target, generate_load, has_events=True)
    unanswered = sizes.students - run.load.requests
    problems = await pool.find_problems(
        target.database,
        sandboxes=sandboxes,
        confirmed=warm_up.requests + run.load.requests,
        cut_off=_WARM_UP_CONNECTIONS,
    )
    if unanswered:
        problems = (f"{unanswered} of {sizes.students} students got no sandbox", *problems)
    # The burst ends with its slowest response. wrk itself runs on until the end of its duration.
    return run.with_problems(problems).with_duration((run.load.slowest or math.nan) / 1e3)


async def run_floor(servers: Servers, sizes: Sizes, *, connections: int) -> Run:
    target = servers.floor
    await _allocate(target, connections, sizes.warm_up)
    generate_load = partial(_allocate, target, connections, sizes.seconds)
    return await meter.measure_load(target, generate_load, has_events=False)


async def _run_new_students(
    target: Target, sizes: Sizes, connections: int, *, has_events: bool, prefixes: int = 0, token: str = TOKEN
) -> Run:
    """Allocate with each request for a new student, from a pool large enough for the whole run."""
    sandboxes = _max_allocations(sizes.warm_up + sizes.seconds, connections)
    await pool.fill(target.database, sandboxes, prefixes=prefixes)
    warm_up = await _allocate(target, connections, sizes.warm_up, Workload(prefixes=prefixes), token)
    if has_events:
        await pool.wait_until_idle(target.database)
    generate_load = partial(_allocate, target, connections, sizes.seconds, Workload(prefixes=prefixes), token)
    run = await meter.measure_load(target, generate_load, has_events=has_events)
    problems = await pool.find_problems(
        target.database,
        sandboxes=sandboxes,
        confirmed=warm_up.requests + run.load.requests,
        cut_off=2 * connections,
    )
    return run.with_problems(problems)


async def _allocate(
    target: Target, connections: int, seconds: int, workload: Workload | None = None, token: str = TOKEN
) -> LoadResult:
    return await load.run_wrk(target.url, token, workload or Workload(), connections=connections, seconds=seconds)


def _max_allocations(seconds: int, connections: int) -> int:
    """Return an upper bound for the number of allocations in this time."""
    return seconds * min(_MAX_PER_SECOND, connections * _MAX_PER_SECOND_AND_CONNECTION)
