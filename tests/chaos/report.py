"""Report of a round as text tables."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.chaos.client import QUOTA_STUDENTS, STOCK_STUDENTS, TOKEN_STOCK_STUDENTS, TOKEN_STUDENTS, ScriptRun
from tests.chaos.evidence import Operation
from tests.chaos.rounds import InjectedStep, Round


def format_tables(round_: Round) -> Iterator[str]:
    yield from _format_faults(round_.injected)
    yield from _format_unreached_faults(round_)
    yield ""
    yield from _format_operations(round_)


def save_records(round_: Round, directory: Path) -> None:
    """Write operations, faults and leases as JSON lines beside the logs."""
    with (directory / "operations.jsonl").open("w") as file:
        for operation in round_.history.operations:
            file.write(json.dumps(asdict(operation)) + "\n")
    with (directory / "faults.jsonl").open("w") as file:
        for step in round_.injected:
            file.write(json.dumps(asdict(step.recovery)) + "\n")
    with (directory / "leases.jsonl").open("w") as file:
        for lease in round_.evidence.leases:
            file.write(json.dumps(asdict(lease)) + "\n")


def list_failed_runs(round_: Round) -> list[ScriptRun]:
    """List the failed script runs. A round should have no failure, because its pool is never empty.

    The refusal of a student above the quota is not a failure, and neither is that of a replacement from the stock,
    which can be empty. A token that has ended, or was issued during a lease, does not reach this lease.
    """
    return [run for run in round_.history.script_runs if not run.succeeded and not _is_expected(run.last)]


def describe_failed_run(run: ScriptRun) -> str:
    return (
        f"a script failed: {run.kind} of {run.student} after {run.attempts} attempts "
        f"and {run.ended_at - run.began_at:.1f} s: {_describe_failure(run.last)} (operation {run.last.number})"
    )


def _is_expected(refusal: Operation) -> bool:
    if refusal.code == "QUOTA_EXCEEDED":
        return refusal.student.startswith(QUOTA_STUDENTS + TOKEN_STUDENTS)
    if refusal.code in ("UNAUTHORIZED", "FORBIDDEN_SCOPE"):
        return refusal.student.startswith(TOKEN_STUDENTS)
    is_replacement = refusal.kind == "replace" and refusal.code == "POOL_EXHAUSTED"
    return is_replacement and refusal.student.startswith((*STOCK_STUDENTS, TOKEN_STOCK_STUDENTS))


def _format_faults(injected: Sequence[InjectedStep]) -> Iterator[str]:
    """Format the number of faults by kind.

    For single faults: the wait of a new student, and the longest time without a served student until the end of the
    fault, in seconds.
    """
    alone: dict[str, list[float]] = defaultdict(list)
    in_pairs = Counter[str]()
    pair_waits: list[float] = []
    gaps: dict[str, list[float]] = defaultdict(list)
    limits: dict[str, float] = {}
    for step in injected:
        served_at = step.recovery.served_at
        wait = float("inf") if served_at is None else served_at - step.recovery.since
        if len(step.faults) == 1:
            alone[step.faults[0].kind].append(wait)
            gaps[step.faults[0].kind].append(step.longest_gap_sec)
        else:
            in_pairs.update(fault.kind for fault in step.faults)
            pair_waits.append(wait)
        limits |= {fault.kind: fault.served_within_sec for fault in step.faults}
    waits = f"{'p50 s':>8}{'p99 s':>8}{'limit':>8}{'gap p50':>9}{'gap max':>9}"
    yield f"{'fault':<44}{'alone':>7}{'in pairs':>10}{waits}"
    for kind, limit in sorted(limits.items()):
        counts = f"{len(alone[kind]):>7}{in_pairs[kind]:>10}"
        yield f"{kind:<44}{counts}{_format_quantiles(alone[kind])}{limit:>8.0f}{_format_gaps(gaps[kind])}"
    number = sum(len(step.faults) for step in injected)
    yield f"{'all':<44}{number - 2 * len(pair_waits):>7}{2 * len(pair_waits):>10}"
    yield f"{'pairs':<44}{'':>7}{len(pair_waits):>10}{_format_quantiles(pair_waits)}"


def _format_unreached_faults(round_: Round) -> Iterator[str]:
    for reason, number in Counter(round_.not_reached).most_common():
        yield f"did not occur {number} times: {reason}"


def _format_operations(round_: Round) -> Iterator[str]:
    operations, script_runs = round_.history.operations, round_.history.script_runs
    outcomes = Counter(operation.outcome for operation in operations)
    yield f"{'operations':<44}{len(operations):>7}"
    for outcome in ("ok", "waiting", "refused", "unknown"):
        yield f"  {outcome:<42}{outcomes[outcome]:>7}"
    failures = (one for one in operations if one.outcome in ("refused", "unknown"))
    for code, number in Counter(map(_describe_failure, failures)).most_common():
        yield f"    {code:<40}{number:>7}"
    yield f"{'script runs':<44}{len(script_runs):>7}"
    yield f"{'  failed':<44}{len(list_failed_runs(round_)):>7}"
    longest = max((one.ended_at - one.began_at for one in script_runs), default=0)
    yield f"{'  longest, s':<44}{longest:>7.1f}"
    yield f"{'leases':<44}{len(round_.evidence.leases):>7}"
    yield f"{'  without a successful response':<44}{_count_unanswered_leases(round_):>7}"
    yield f"{'events with duplicates':<44}{len(round_.evidence.events):>7}"
    longest_gap = round_.history.measure_longest_gap()
    yield f"{'longest time without a served student, s':<44}{longest_gap:>7.1f}"
    stalled = sum(stall.until - stall.since for stall in round_.evidence.stalls)
    yield f"{'time in which the machine stalled, s':<44}{stalled:>7.1f}"


def _count_unanswered_leases(round_: Round) -> int:
    """Count leases without a successful response. Each keeps its sandbox until it expires."""
    granted = (one for one in round_.history.operations if one.kind == "allocate" and one.outcome == "ok")
    answered = {(one.student, one.sandbox_id) for one in granted}
    return sum((lease.holder, lease.sandbox_id) not in answered for lease in round_.evidence.leases)


def compute_quantile(values: Sequence[float], share: float) -> float:
    """Return the value of the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _format_quantiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return f"{'':>8}{'':>8}"
    return f"{compute_quantile(seconds, 0.5):>8.1f}{compute_quantile(seconds, 0.99):>8.1f}"


def _format_gaps(seconds: Sequence[float]) -> str:
    return f"{compute_quantile(seconds, 0.5):>9.1f}{max(seconds):>9.1f}" if seconds else ""


def _describe_failure(operation: Operation) -> str:
    return " ".join(filter(None, (str(operation.status or ""), operation.code)))
