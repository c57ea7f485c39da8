"""What is read from the load generators, and what becomes of it."""

from pathlib import Path
from typing import Any

import pytest

from bench import goals, load, pgbench, report, rows, scenarios
from bench.load import LoadResult
from bench.meter import Run
from bench.pool import OutboxLag
from bench.rows import Row

WRK = """\
Running 2s test @ http://127.0.0.1:8080/v1/allocate
  1 threads and 200 connections
  Non-2xx or 3xx responses: 3
Requests/sec:   5000.00
{"requests": 10003, "duration_us": 2000000, "p50_us": 1500, "p99_us": 9000, "slowest_us": 12345, \
"http_errors": 3, "socket_errors": 2, "new": -1, "known": -1, "released": -1}
"""

PGBENCH = """\
pgbench (17.2)
number of clients: 16
number of transactions actually processed: 16500
number of failed transactions: 0 (0.000%)
latency average = 1.939 ms
initial connection time = 20.000 ms
tps = 8250.000000 (without initial connection time)
"""


def test_of_what_wrk_counted_only_2xx_are_requests() -> None:
    found = load.parse_wrk_output(WRK, cpu_sec=0.5)
    assert found == LoadResult(10_000, 2.0, errors=5, p50=1.5, p99=9.0, slowest=12.345, cpu_sec=0.5)


def test_answers_are_told_apart_where_the_load_generator_looks_at_them() -> None:
    assert load.parse_wrk_output(WRK).known is None
    looked = load.parse_wrk_output(WRK.replace('"new": -1, "known": -1', '"new": 0, "known": 10000'))
    assert (looked.new, looked.known, looked.released) == (0, 10_000, None)


def test_the_time_of_pgbench_is_without_its_connecting() -> None:
    assert pgbench.parse_output(PGBENCH) == LoadResult(16_500, 2.0)


def test_a_row_holds_the_median_of_each_figure() -> None:
    found = rows.row([_run(requests=100, p99=9.0), _run(requests=300, p99=5.0), _run(requests=200, p99=7.0)])
    assert (found.throughput, found.p99) == (200.0, 7.0)


def test_the_errors_of_all_runs_are_added_up() -> None:
    assert rows.row([_run(errors=1), _run(), _run(errors=2)]).errors == 3


def test_cpu_is_told_for_a_thousand_requests() -> None:
    assert rows.row([_run(requests=2_000, cpu=1.0)]).cpu == {"server": 0.5}


def test_events_that_come_late_count_against_the_throughput() -> None:
    run = _run(requests=300, drained=2.0)
    assert (run.throughput, run.sustained) == (300.0, 100.0)


def test_a_goal_is_told_when_all_it_needs_was_run() -> None:
    found = goals.reached({"ours-200": _row(350), "baseline-200": _row(100)})
    assert ("throughput at 200 ÷ baseline", 3.5, True) in [(goal.name, goal.value, goal.met) for goal in found]
    assert not [goal for goal in found if "pgbench" in goal.name]


def test_pgbench_is_compared_at_its_best_number_of_clients() -> None:
    claims = {f"claim-{clients}": _row(clients * 10) for clients in (8, 16, 50)}
    found = {goal.name: goal for goal in goals.reached({"ours-200": _row(250), **claims})}
    assert found["throughput at 200 ÷ pgbench claim"].value == 0.5
    assert not found["throughput at 200 ÷ pgbench claim"].met


@pytest.mark.parametrize(
    ("name", "value", "figures"),
    [
        ("throughput at 1,000,000 sandboxes ÷ 1,000", 0.8, {"pool-1000000": {"requests": 80}, "pool-1000": {}}),
        ("throughput with 200 prefixes ÷ without", 0.5, {"prefix-200": {"requests": 50}, "ours-200": {}}),
        ("p99 beside a sync ÷ without", 3.0, {"sync-beside": {"p99": 6.0}, "beside-nothing": {"p99": 2.0}}),
        ("p99 beside expiry ÷ without", 3.0, {"expiry-beside": {"p99": 6.0}, "beside-nothing": {"p99": 2.0}}),
        ("p99 beside a purge ÷ without", 3.0, {"purge-beside": {"p99": 6.0}, "beside-nothing": {"p99": 2.0}}),
        ("a sync beside students (s)", 61.0, {"sync-beside": {"more": {"sync s": 61.0}}}),
        ("long run, last tenth ÷ first", 0.8, {"long": {"more": {"last tenth ÷ first": 0.8}}}),
        ("long run, largest service (MB)", 151.0, {"long": {"memory": 151.0}}),
        ("long run, memory at the end ÷ middle", 1.2, {"long": {"more": {"memory at the end ÷ middle": 1.2}}}),
    ],
)
def test_a_goal_is_missed_by_a_figure_beyond_it(
    name: str, value: float, figures: dict[str, dict[str, Any]]
) -> None:
    reached = goals.reached({scenario: rows.row([_run(**its)]) for scenario, its in figures.items()})
    found = {goal.name: (goal.value, goal.met) for goal in reached}
    assert found[name] == (value, False)


def test_what_only_some_scenarios_measure_has_a_table_of_its_own() -> None:
    lines = list(
        report.more({"ours-1": rows.row([_run()]), "sync-beside": rows.row([_run(more={"sync s": 12.5})])})
    )
    assert [line.split() for line in lines[1:]] == [["sync-beside:", "sync", "s", "12.50"]]


def test_the_table_is_aligned_and_shows_what_is_not_known_as_a_dash() -> None:
    head, line = report.table({"claim-8": rows.row([_run(requests=12_345, p99=None)])})
    assert head.startswith("scenario")
    assert line.split()[:5] == ["claim-8", "12,345", "12,345", "-", "-"]


def test_what_takes_long_is_left_out_unless_it_is_asked_for() -> None:
    def names(*words: str, long: bool = False) -> set[str]:
        return {scenario.name for scenario in scenarios.chosen(words, long=long)}

    assert names("long") == {"long"}
    assert names("ours-1") == names("ours-1", long=True) == {"ours-1"}
    assert names(long=True) == {*names(), "long"}
    assert "long" not in names()


@pytest.mark.parametrize("script", ["claim", "lease"])
def test_pgbench_gets_one_statement_a_transaction(script: str) -> None:
    text = (Path(pgbench.__file__).parent / f"{script}.sql").read_text()
    assert text.count(";") == 1


def _run(
    *,
    requests: int = 100,
    p99: float | None = 1.0,
    errors: int = 0,
    cpu: float = 0.1,
    drained: float = 0.0,
    memory: float = 80.0,
    more: dict[str, float] | None = None,
) -> Run:
    loaded = LoadResult(requests, 1.0, errors=errors, p99=p99)
    return Run(
        loaded, 1.0, {"server": cpu}, {"server": memory}, {"server": memory}, OutboxLag(), drained, more=more or {}
    )


def _row(requests: int) -> Row:
    return rows.row([_run(requests=requests)])
