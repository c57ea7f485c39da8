"""Scenarios of the benchmark."""

from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

from bench import allocation, meter, pgbench, pool, slow_clients, soak, waiting, with_maintenance
from bench.load import LoadResult
from bench.meter import Run
from bench.servers import Servers, Target
from bench.sizes import Sizes

_MAX_CLAIMS_PER_SECOND = 15_000


@dataclass(frozen=True, slots=True)
class Scenario:
    group: str
    """Name on the command line that selects all scenarios of the group."""
    name: str
    """Name on the command line that selects this scenario."""
    run: Callable[[Servers, Sizes], Awaitable[Run]]
    long: bool = False
    """Runs once instead of `--repeats` times, and only on request."""


async def run_claim(servers: Servers, sizes: Sizes, *, clients: int) -> Run:
    """Claim one sandbox per transaction, without lease and event."""
    target, sandboxes = servers.database_only, sizes.seconds * _MAX_CLAIMS_PER_SECOND
    await pool.fill(target.database, sandboxes)
    run = await meter.measure_load(target, _pgbench(target, "claim", clients, sizes), has_events=False)
    claimed = await pool.count_allocated(target.database)
    problem = f"{claimed} sandboxes are claimed, expected {run.load.requests}"
    return run.with_problems(() if claimed == run.load.requests else (problem,))


async def run_lease(servers: Servers, sizes: Sizes, *, clients: int) -> Run:
    """Claim one sandbox per transaction and write its lease and event, as an allocation does."""
    target, sandboxes = servers.database_only, sizes.seconds * _MAX_CLAIMS_PER_SECOND
    await pool.fill(target.database, sandboxes)
    run = await meter.measure_load(target, _pgbench(target, "lease", clients, sizes), has_events=False)
    problems = await pool.find_problems(target.database, sandboxes=sandboxes, confirmed=run.load.requests)
    return run.with_problems(problems)


def _pgbench(target: Target, script: str, clients: int, sizes: Sizes) -> Callable[[], Awaitable[LoadResult]]:
    return partial(pgbench.run_script, target.database_url, script, clients=clients, seconds=sizes.seconds)


def select_scenarios(names: Collection[str], *, include_long: bool) -> list[Scenario]:
    """Return the scenarios with these names or groups.

    Without names, return all scenarios; long ones only with `include_long`.
    """
    return [
        scenario
        for scenario in ALL
        if {scenario.group, scenario.name} & set(names) or (not names and (include_long or not scenario.long))
    ]


def _build_variants(
    group: str, parameter: str, run: Callable[..., Awaitable[Run]], values: Iterable[int]
) -> list[Scenario]:
    return [Scenario(group, f"{group}-{value}", partial(run, **{parameter: value})) for value in values]


_CONNECTIONS = (1, 50, 200)
_CLIENTS = (8, 16, 50)

# Compared scenarios are neighbours, so that they meet the same state of the machine.
ALL: tuple[Scenario, ...] = (
    *(
        scenario
        for pair in zip(
            _build_variants("baseline", "connections", allocation.run_baseline, _CONNECTIONS),
            _build_variants("ours", "connections", allocation.run_broker, _CONNECTIONS),
            strict=True,
        )
        for scenario in pair
    ),
    Scenario("policies", "policies", waiting.run_with_policies),
    Scenario("tokens", "tokens-500", partial(allocation.run_tokens, tokens=500, has_quota=False)),
    Scenario("tokens", "quotas-500", partial(allocation.run_tokens, tokens=500, has_quota=True)),
    *_build_variants("prefix", "prefixes", allocation.run_prefixes, [1, 20, 200]),
    *_build_variants("waiting", "waiting", waiting.run_with_waiting, [500]),
    *_build_variants("ours", "connections", allocation.run_broker, [1_000]),
    *_build_variants("repeat", "connections", allocation.run_repeats, [200]),
    *_build_variants("claim", "clients", run_claim, _CLIENTS),
    *_build_variants("lease", "clients", run_lease, _CLIENTS),
    *_build_variants("floor", "connections", allocation.run_floor, [200]),
    Scenario("class-start", "class-start", allocation.run_class_start),
    Scenario("class-start", "class-beside-events", allocation.run_class_beside_events),
    *_build_variants("pool", "sandboxes", allocation.run_pool_size, [1_000, 100_000, 1_000_000]),
    Scenario("beside", "beside-nothing", with_maintenance.run_without_maintenance),
    Scenario("slow", "slow-clients", slow_clients.run_with_slow_clients),
    Scenario("beside", "sync-beside", with_maintenance.run_with_sync),
    Scenario("beside", "expiry-beside", with_maintenance.run_with_expiry),
    Scenario("beside", "purge-beside", with_maintenance.run_with_purge),
    Scenario("beside", "replace-beside", with_maintenance.run_with_replacements),
    Scenario("long", "long", soak.run_soak, long=True),
)
