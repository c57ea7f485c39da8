"""`python -m bench [SCENARIO …]`: measures, prints one table, writes one JSON file.

The exit status is 0 whatever the figures are, 1 when something broke (a request failed, a database did not hold
what was promised), 2 when something has to be installed or set first.
"""

import argparse
import asyncio
import logging
import os
import platform
import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from bench import goals, load, report, rows, scenarios, servers
from bench.meter import Run
from bench.scenarios import Scenario
from bench.servers import Servers
from bench.sizes import Sizes
from devstack.errors import CannotRun
from devstack.main import Interruption
from devstack.output import Terminal
from devstack.processes import unless_one_dies

_RESULTS = Path(__file__).parent / "results"
_INTERRUPTED = 130


def main() -> int:
    arguments = _arguments()
    _allow_many_connections()
    # Tries that find nobody are ours to report, not the client library's.
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        return asyncio.run(_run_until_stopped(arguments, Terminal()))
    except CannotRun as reason:
        sys.stdout.flush()
        sys.stderr.write(f"make bench: {reason}\n")
        return reason.status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures the broker.")
    groups = list(dict.fromkeys(scenario.group for scenario in scenarios.ALL))
    usual = Sizes()
    parser.add_argument("scenario", nargs="*", help=f"{', '.join(groups)}, or one alone, like ours-200")
    parser.add_argument("--seconds", type=int, default=usual.seconds, help="of load in a run")
    parser.add_argument("--warm-up", type=int, default=usual.warm_up, metavar="SECONDS", help="before each run")
    parser.add_argument("--students", type=int, default=usual.students, help="of a class")
    parser.add_argument("--accounts", type=int, default=usual.accounts, help="in a listing of CSP")
    parser.add_argument(
        "--cycles", type=int, default=usual.cycles, help="of allocation and release in the long run"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each scenario; their medians are shown")
    parser.add_argument("--traced", type=float, metavar="RATIO", help="of the requests to the broker; 0 to 1")
    parser.add_argument("--json", type=Path, help="the file with the results")
    arguments = parser.parse_args()
    names = [scenario.name for scenario in scenarios.ALL]
    if unknown := set(arguments.scenario) - {*groups, *names}:
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return arguments


async def _run_until_stopped(arguments: argparse.Namespace, terminal: Terminal) -> int:
    work = asyncio.create_task(_bench(arguments, terminal))
    interruption = Interruption(work, terminal)
    interruption.listen()
    try:
        return await work
    except asyncio.CancelledError:
        if not interruption.requested:
            raise
        return _INTERRUPTED
    finally:
        interruption.requested = True


async def _bench(arguments: argparse.Namespace, terminal: Terminal) -> int:
    await load.ensure_wrk_installed(terminal)
    chosen = scenarios.chosen(arguments.scenario, long=os.environ.get("LONG") == "1")
    sizes = Sizes(arguments.seconds, arguments.warm_up, arguments.students, arguments.accounts, arguments.cycles)
    async with servers.running(terminal, traced=arguments.traced) as running:
        machine = await _machine(running)
        measuring = _measure(chosen, arguments.repeats, running, sizes, terminal)
        runs = await unless_one_dies(measuring, running.processes)
    return _report(arguments, machine, runs, terminal)


async def _measure(
    chosen: Sequence[Scenario], repeats: int, running: Servers, sizes: Sizes, terminal: Terminal
) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {scenario.name: [] for scenario in chosen}
    for repeat in range(1, repeats + 1):
        for scenario in chosen:
            if scenario.long and repeat > 1:
                continue
            running.forget_logs()
            run = await scenario.run(running, sizes)
            runs[scenario.name].append(run)
            p99 = "" if run.load.p99 is None else f", p99 {run.load.p99:.1f} ms"
            terminal.note(f"{repeat}/{repeats} {scenario.name}: {run.throughput:,.0f}/s{p99}")
            for problem in run.problems:
                terminal.complain(f"    {problem}")
    return runs


def _report(
    arguments: argparse.Namespace, machine: dict[str, Any], runs: dict[str, list[Run]], terminal: Terminal
) -> int:
    medians = {name: rows.row(its) for name, its in runs.items()}
    reached = goals.reached(medians)
    terminal.say()
    for line in (*report.table(medians), "", *report.more(medians), "", *report.goals(reached), ""):
        terminal.say(line)
    path = arguments.json or _RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.json"
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    report.write(path, machine=machine, options=options, rows=medians, reached=reached, runs=runs)
    terminal.say(f"All figures are in {path}")
    problems = [f"{name}: {problem}" for name, its in runs.items() for run in its for problem in run.problems]
    for problem in problems:
        terminal.complain(problem)
    return 1 if problems else 0


async def _machine(running: Servers) -> dict[str, Any]:
    database = running.ours.database
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "postgresql": await database.fetchval("SHOW server_version"),
        **{
            setting: await database.fetchval(f"SHOW {setting}")
            for setting in ("synchronous_commit", "fsync", "autovacuum", "shared_buffers")
        },
    }


def _allow_many_connections() -> None:
    """As many files as the system lets us have; the processes that we start inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())
