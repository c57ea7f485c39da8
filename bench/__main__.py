"""`python -m bench [SCENARIO …]`: run scenarios, print their figures and write them to a JSON file.

Exit status: 0 success, whatever the figures; 1 a request failed or the database violates an invariant; 2 a
prerequisite is missing.
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

from bench import aggregate, goals, load, report, scenarios, servers
from bench.meter import Run
from bench.scenarios import Scenario
from bench.servers import Servers
from bench.sizes import Sizes
from devstack.errors import CannotRun
from devstack.main import Interruption
from devstack.output import Terminal
from devstack.processes import run_unless_process_dies

_RESULTS_DIRECTORY = Path(__file__).parent / "results"
_EXIT_INTERRUPTED = 130


def main() -> int:
    arguments = _parse_arguments()
    _raise_open_file_limit()
    # The benchmark reports failed connections itself.
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        return asyncio.run(_run_until_interrupted(arguments, Terminal()))
    except CannotRun as reason:
        sys.stdout.flush()
        sys.stderr.write(f"make bench: {reason}\n")
        return reason.status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the broker.")
    groups = list(dict.fromkeys(scenario.group for scenario in scenarios.ALL))
    defaults = Sizes()
    parser.add_argument(
        "scenario", nargs="*", help=f"a group ({', '.join(groups)}) or a single scenario, for example ours-200"
    )
    parser.add_argument("--seconds", type=int, default=defaults.seconds, help="duration of the load in a run")
    parser.add_argument(
        "--warm-up", type=int, default=defaults.warm_up, metavar="SECONDS", help="load before each run"
    )
    parser.add_argument("--students", type=int, default=defaults.students, help="students of a class")
    parser.add_argument("--accounts", type=int, default=defaults.accounts, help="accounts in CSP's listing")
    parser.add_argument(
        "--cycles", type=int, default=defaults.cycles, help="allocations and releases in the long run"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs per scenario; the report shows medians")
    parser.add_argument("--traced", type=float, metavar="RATIO", help="ratio of traced requests, 0 to 1")
    parser.add_argument("--json", type=Path, help="results file")
    arguments = parser.parse_args()
    names = [scenario.name for scenario in scenarios.ALL]
    if unknown := set(arguments.scenario) - {*groups, *names}:
        parser.error(f"unknown scenario {', '.join(sorted(unknown))}. Scenarios: {', '.join(names)}")
    return arguments


async def _run_until_interrupted(arguments: argparse.Namespace, terminal: Terminal) -> int:
    work = asyncio.create_task(_run_benchmark(arguments, terminal))
    interruption = Interruption(work, terminal)
    interruption.listen()
    try:
        return await work
    except asyncio.CancelledError:
        if not interruption.requested:
            raise
        return _EXIT_INTERRUPTED
    finally:
        interruption.requested = True


async def _run_benchmark(arguments: argparse.Namespace, terminal: Terminal) -> int:
    await load.ensure_wrk_installed(terminal)
    selected = scenarios.select_scenarios(arguments.scenario, include_long=os.environ.get("LONG") == "1")
    sizes = Sizes(arguments.seconds, arguments.warm_up, arguments.students, arguments.accounts, arguments.cycles)
    async with servers.start_servers(terminal, trace_ratio=arguments.traced) as running:
        machine = await _describe_machine(running)
        measuring = _run_scenarios(selected, arguments.repeats, running, sizes, terminal)
        runs = await run_unless_process_dies(measuring, running.processes)
    return _report_results(arguments, machine, runs, terminal)


async def _run_scenarios(
    selected: Sequence[Scenario], repeats: int, running: Servers, sizes: Sizes, terminal: Terminal
) -> dict[str, list[Run]]:
    """Run all scenarios in turn, `repeats` times, so that they meet the same state of the machine."""
    runs: dict[str, list[Run]] = {scenario.name: [] for scenario in selected}
    for repeat in range(1, repeats + 1):
        for scenario in selected:
            if scenario.long and repeat > 1:
                continue
            running.truncate_logs()
            run = await scenario.run(running, sizes)
            runs[scenario.name].append(run)
            p99 = "" if run.load.p99 is None else f", p99 {run.load.p99:.1f} ms"
            terminal.print_step(f"{repeat}/{repeats} {scenario.name}: {run.throughput:,.0f}/s{p99}")
            for problem in run.problems:
                terminal.print_error(f"    {problem}")
    return runs


def _report_results(
    arguments: argparse.Namespace, machine: dict[str, Any], runs: dict[str, list[Run]], terminal: Terminal
) -> int:
    """Print the tables and write the JSON file. Returns the exit status."""
    results = {name: aggregate.aggregate_runs(scenario_runs) for name, scenario_runs in runs.items()}
    goal_results = goals.evaluate_goals(results)
    terminal.print_line()
    tables = (
        report.format_results(results),
        report.format_scenario_figures(results),
        report.format_goals(goal_results),
    )
    for table in tables:
        for line in (*table, ""):
            terminal.print_line(line)
    path = arguments.json or _RESULTS_DIRECTORY / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.json"
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    report.write_json(path, machine=machine, options=options, results=results, goals=goal_results, runs=runs)
    terminal.print_line(f"All figures are in {path}")
    problems = [
        f"{name}: {problem}"
        for name, scenario_runs in runs.items()
        for run in scenario_runs
        for problem in run.problems
    ]
    for problem in problems:
        terminal.print_error(problem)
    return 1 if problems else 0


async def _describe_machine(running: Servers) -> dict[str, Any]:
    database = running.broker.database
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


def _raise_open_file_limit() -> None:
    """Raise the limit of open files to its maximum. Child processes inherit it; each connection is an open file."""
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


if __name__ == "__main__":
    sys.exit(main())
