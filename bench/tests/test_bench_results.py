"""Parsing of the load generators' output, aggregation, goals, tables and selection of scenarios."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench import goals, load, pgbench, report, scenarios
from bench.aggregate import ScenarioResult, aggregate_runs
from bench.load import LoadResult
from bench.meter import Run
from bench.pool import OutboxLag

WRK_OUTPUT = """\
Running 2s test @ http://127.0.0.1:8080/v1/allocate
  1 threads and 200 connections
  Non-2xx or 3xx responses: 3
Requests/sec:   5000.00
{"requests": 10003, "duration_us": 2000000, "p50_us": 1500, "p99_us": 9000, "slowest_us": 12345, \
"http_errors": 3, "socket_errors": 2, "new": -1, "known": -1, "released": -1}
"""

PGBENCH_OUTPUT = """\
pgbench (17.2)
number of clients: 16
number of transactions actually processed: 16500
number of failed transactions: 0 (0.000%)
latency average = 1.939 ms
initial connection time = 20.000 ms
tps = 8250.000000 (without initial connection time)
"""


def build_run(
    *,
    requests: int = 100,
    p99: float | None = 1.0,
    errors: int = 0,
    cpu: float = 0.1,
    drained: float = 0.0,
    memory: float = 80.0,
    more: dict[str, float] | None = None,
) -> Run:
    return Run(
        LoadResult(requests, 1.0, errors=errors, p99=p99),
        1.0,
        {"server": cpu},
        {"server": memory},
        {"server": memory},
        OutboxLag(),
        drained,
        more=more or {},
    )


def build_result(requests: int) -> ScenarioResult:
    return aggregate_runs([build_run(requests=requests)])


def test_only_2xx_responses_count_as_requests() -> None:
    result = load.parse_wrk_output(WRK_OUTPUT, cpu_sec=0.5)
    assert result == LoadResult(10_000, 2.0, errors=5, p50=1.5, p99=9.0, slowest=12.345, cpu_sec=0.5)


def test_responses_are_counted_by_kind_only_if_inspected() -> None:
    assert load.parse_wrk_output(WRK_OUTPUT).known is None
    inspected = WRK_OUTPUT.replace('"new": -1, "known": -1', '"new": 0, "known": 10000')
    result = load.parse_wrk_output(inspected)
    assert (result.new, result.known, result.released) == (0, 10_000, None)


def test_the_duration_of_pgbench_excludes_its_connection_time() -> None:
    assert pgbench.parse_output(PGBENCH_OUTPUT) == LoadResult(16_500, 2.0)


@pytest.mark.parametrize("script", ["claim", "lease"])
def test_a_pgbench_script_is_a_single_statement(script: str) -> None:
    text = (Path(pgbench.__file__).parent / f"{script}.sql").read_text()
    assert text.count(";") == 1


def test_a_result_holds_the_median_of_each_figure() -> None:
    result = aggregate_runs(
        [build_run(requests=100, p99=9.0), build_run(requests=300, p99=5.0), build_run(requests=200, p99=7.0)]
    )
    assert (result.throughput, result.p99) == (200.0, 7.0)


def test_errors_of_all_runs_are_summed() -> None:
    assert aggregate_runs([build_run(errors=1), build_run(), build_run(errors=2)]).errors == 3


def test_cpu_is_reported_per_thousand_requests() -> None:
    assert aggregate_runs([build_run(requests=2_000, cpu=1.0)]).cpu == {"server": 0.5}


def test_late_events_reduce_the_sustained_throughput() -> None:
    run = build_run(requests=300, drained=2.0)
    assert (run.throughput, run.sustained) == (300.0, 100.0)


def test_a_goal_is_evaluated_if_all_its_scenarios_ran() -> None:
    evaluated = goals.evaluate_goals({"ours-200": build_result(700), "baseline-200": build_result(100)})
    assert ("throughput at 200 ÷ baseline", 7, True) in [(goal.name, goal.value, goal.met) for goal in evaluated]
    assert not [goal for goal in evaluated if "pgbench" in goal.name]


def test_a_scenario_without_a_response_has_no_ratio() -> None:
    assert goals.evaluate_goals({"waiting-500": build_result(100), "prefix-20": build_result(0)}) == []


def test_the_broker_is_compared_with_the_best_pgbench_result() -> None:
    claims = {f"claim-{clients}": build_result(clients * 10) for clients in (8, 16, 50)}
    evaluated = {goal.name: goal for goal in goals.evaluate_goals({"ours-200": build_result(250), **claims})}
    assert evaluated["throughput at 200 ÷ pgbench claim"].value == 0.5
    assert not evaluated["throughput at 200 ÷ pgbench claim"].met


def test_the_processor_time_of_an_allocation_excludes_the_load_generator() -> None:
    components = {"server": 1.0, "allocator": 1.0, "postgres": 0.5, "rabbitmq": 0.5, "load": 9.0}
    allocation = dataclasses.replace(build_result(100), cpu=components)
    floor = dataclasses.replace(build_result(100), cpu={"server": 0.25, "load": 9.0})
    evaluated = {goal.name: goal for goal in goals.evaluate_goals({"ours-200": allocation, "floor-200": floor})}
    assert evaluated["processor time of an allocation at 200 ÷ floor"].value == 12


@pytest.mark.parametrize(
    ("name", "value", "figures_by_scenario"),
    [
        ("throughput at 1,000,000 sandboxes ÷ 1,000", 0.8, {"pool-1000000": {"requests": 80}, "pool-1000": {}}),
        ("throughput with 200 prefixes ÷ without", 0.5, {"prefix-200": {"requests": 50}, "ours-200": {}}),
        ("throughput with policies ÷ without", 0.5, {"policies": {"requests": 50}, "ours-200": {}}),
        ("throughput with 500 students in line ÷ without", 0.5, {"waiting-500": {"requests": 50}, "prefix-20": {}}),
        ("p99 beside a sync ÷ without", 3.0, {"sync-beside": {"p99": 6.0}, "beside-nothing": {"p99": 2.0}}),
        ("p99 beside expiry ÷ without", 3.0, {"expiry-beside": {"p99": 6.0}, "beside-nothing": {"p99": 2.0}}),
        ("p99 beside a purge ÷ without", 3.0, {"purge-beside": {"p99": 6.0}, "beside-nothing": {"p99": 2.0}}),
        ("a sync beside students (s)", 61.0, {"sync-beside": {"more": {"sync s": 61.0}}}),
        (
            "a replacement beside students, p95 (ms)",
            101.0,
            {"replace-beside": {"more": {"replacement p95 ms": 101.0}}},
        ),
        ("long run, last tenth ÷ first", 0.8, {"long": {"more": {"last tenth ÷ first": 0.8}}}),
        ("long run, largest service (MB)", 151.0, {"long": {"memory": 151.0}}),
        ("long run, memory at the end ÷ middle", 1.2, {"long": {"more": {"memory at the end ÷ middle": 1.2}}}),
    ],
)
def test_a_goal_is_missed_by_a_value_beyond_its_bound(
    name: str, value: float, figures_by_scenario: dict[str, dict[str, Any]]
) -> None:
    results = {
        scenario: aggregate_runs([build_run(**figures)]) for scenario, figures in figures_by_scenario.items()
    }
    evaluated = {goal.name: (goal.value, goal.met) for goal in goals.evaluate_goals(results)}
    assert evaluated[name] == (value, False)


def test_figures_of_single_scenarios_have_their_own_table() -> None:
    results = {
        "ours-1": aggregate_runs([build_run()]),
        "sync-beside": aggregate_runs([build_run(more={"sync s": 12.5})]),
    }
    lines = list(report.format_scenario_figures(results))
    assert [line.split() for line in lines[1:]] == [["sync-beside:", "sync", "s", "12.50"]]


def test_the_table_shows_unmeasured_figures_as_a_dash() -> None:
    head, line = report.format_results({"claim-8": aggregate_runs([build_run(requests=12_345, p99=None)])})
    assert head.startswith("scenario")
    assert line.split()[:5] == ["claim-8", "12,345", "12,345", "-", "-"]


def test_long_scenarios_run_only_on_request() -> None:
    def select(*names: str, include_long: bool = False) -> set[str]:
        return {scenario.name for scenario in scenarios.select_scenarios(names, include_long=include_long)}

    assert select("long") == {"long"}
    assert select("ours-1") == select("ours-1", include_long=True) == {"ours-1"}
    assert select(include_long=True) == {*select(), "long"}
    assert "long" not in select()
