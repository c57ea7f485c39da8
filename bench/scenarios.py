"""What is measured. A scenario is run several times, in turn with the others, so that what is compared meets the
same state of the machine."""

from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

from bench import allocating, beside, life, meter, pgbench, pool, slow
from bench.load import LoadResult
from bench.meter import Run
from bench.servers import Servers, Target
from bench.sizes import Sizes

_CLAIMS_PER_SECOND = 15_000


@dataclass(frozen=True, slots=True)
class Scenario:
    group: str
    """A word that chooses it together with its like."""
    name: str
    """The word that chooses it alone."""
    run: Callable[[Servers, Sizes], Awaitable[Run]]
    long: bool = False
    """Takes so long that it is run once, and only when it is asked for."""


async def claim(servers: Servers, sizes: Sizes, *, clients: int) -> Run:
    """A sandbox is claimed in each transaction, and that is all."""
    target, sandboxes = servers.bare, sizes.seconds * _CLAIMS_PER_SECOND
    await pool.fill(target.database, sandboxes)
    run = await meter.measure(target, _pgbench(target, "claim", clients, sizes), events=False)
    claimed = await pool.count_allocated(target.database)
    return run.having(() if claimed == run.load.requests else (f"{claimed} sandboxes are claimed",))


async def lease(servers: Servers, sizes: Sizes, *, clients: int) -> Run:
    """Each transaction does what an allocation does: sandbox, lease and event."""
    target, sandboxes = servers.bare, sizes.seconds * _CLAIMS_PER_SECOND
    await pool.fill(target.database, sandboxes)
    run = await meter.measure(target, _pgbench(target, "lease", clients, sizes), events=False)
    return run.having(await pool.find_problems(target.database, sandboxes=sandboxes, promised=run.load.requests))


def _pgbench(target: Target, script: str, clients: int, sizes: Sizes) -> Callable[[], Awaitable[LoadResult]]:
    return partial(pgbench.run_script, target.database_url, script, clients=clients, seconds=sizes.seconds)


def _each(group: str, what: str, run: Callable[..., Awaitable[Run]], numbers: Iterable[int]) -> list[Scenario]:
    return [Scenario(group, f"{group}-{number}", partial(run, **{what: number})) for number in numbers]


def chosen(words: Collection[str], *, long: bool) -> list[Scenario]:
    """Those that the words name; without words all, though those that take long only if `long`."""
    return [
        scenario
        for scenario in ALL
        if {scenario.group, scenario.name} & set(words) or (not words and (long or not scenario.long))
    ]


_CONNECTIONS = (1, 50, 200)
_CLIENTS = (8, 16, 50)

# Neighbours are compared with each other.
ALL: tuple[Scenario, ...] = (
    *(
        scenario
        for pair in zip(
            _each("baseline", "connections", allocating.baseline, _CONNECTIONS),
            _each("ours", "connections", allocating.ours, _CONNECTIONS),
            strict=True,
        )
        for scenario in pair
    ),
    *_each("prefix", "prefixes", allocating.prefix, [1, 20, 200]),
    *_each("ours", "connections", allocating.ours, [1_000]),
    *_each("repeat", "connections", allocating.repeat, [200]),
    *_each("claim", "clients", claim, _CLIENTS),
    *_each("lease", "clients", lease, _CLIENTS),
    *_each("floor", "connections", allocating.floor, [200]),
    Scenario("class-start", "class-start", allocating.class_start),
    *_each("pool", "sandboxes", allocating.stock, [1_000, 100_000, 1_000_000]),
    Scenario("beside", "beside-nothing", beside.nothing),
    Scenario("slow", "slow-clients", slow.clients),
    Scenario("beside", "sync-beside", beside.sync),
    Scenario("beside", "expiry-beside", beside.expiry),
    Scenario("beside", "purge-beside", beside.purge),
    Scenario("long", "long", life.long, long=True),
)
