"""What a round was like, in tables for the eye."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from tests.chaos.client import Script
from tests.chaos.evidence import Operation
from tests.chaos.rounds import Done, Round


def tables(round_: Round) -> Iterator[str]:
    yield from _faults(round_.done)
    yield from _missed(round_)
    yield ""
    yield from _work(round_)


def keep(round_: Round, directory: Path) -> None:
    """What the students did, and what was done to the broker, beside its logs."""
    with (directory / "operations.jsonl").open("w") as file:
        for operation in round_.history.operations:
            file.write(json.dumps(asdict(operation)) + "\n")
    with (directory / "faults.jsonl").open("w") as file:
        for one in round_.done:
            file.write(json.dumps(asdict(one.recovery)) + "\n")
    with (directory / "leases.jsonl").open("w") as file:
        for lease in round_.evidence.leases:
            file.write(json.dumps(asdict(lease)) + "\n")


def failed(round_: Round) -> list[Script]:
    """Runs of a script that did not succeed. The pool is never empty here, so none of them should fail."""
    return [script for script in round_.history.scripts if not script.succeeded]


def told(script: Script) -> str:
    return (
        f"a script failed: {script.kind} of {script.student} after {script.attempts} attempts "
        f"and {script.ended_at - script.began_at:.1f} s: {_why(script.last)} (operation {script.last.number})"
    )


def _faults(done: Sequence[Done]) -> Iterator[str]:
    """How often each kind was, and how long new students waited after it when it was alone, in seconds."""
    alone: dict[str, list[float]] = defaultdict(list)
    beside = Counter[str]()
    pairs: list[float] = []
    limits: dict[str, float] = {}
    for one in done:
        served_at = one.recovery.served_at
        wait = float("inf") if served_at is None else served_at - one.recovery.since
        if len(one.faults) == 1:
            alone[one.faults[0].kind].append(wait)
        else:
            beside.update(fault.kind for fault in one.faults)
            pairs.append(wait)
        limits |= {fault.kind: fault.served_within_sec for fault in one.faults}
    yield f"{'fault':<44}{'alone':>7}{'in pairs':>10}{'p50 s':>8}{'p99 s':>8}{'limit':>8}"
    for kind, limit in sorted(limits.items()):
        yield f"{kind:<44}{len(alone[kind]):>7}{beside[kind]:>10}{_quantiles(alone[kind])}{limit:>8.0f}"
    number = sum(len(one.faults) for one in done)
    yield f"{'all':<44}{number - 2 * len(pairs):>7}{2 * len(pairs):>10}"
    yield f"{'pairs':<44}{'':>7}{len(pairs):>10}{_quantiles(pairs)}"


def _missed(round_: Round) -> Iterator[str]:
    for reason, number in Counter(round_.not_reached).most_common():
        yield f"came to nothing {number} times: {reason}"


def _work(round_: Round) -> Iterator[str]:
    operations, scripts = round_.history.operations, round_.history.scripts
    outcomes = Counter(operation.outcome for operation in operations)
    yield f"{'operations':<44}{len(operations):>7}"
    for outcome in ("ok", "refused", "unknown"):
        yield f"  {outcome:<42}{outcomes[outcome]:>7}"
    for code, number in Counter(_why(one) for one in operations if one.outcome != "ok").most_common():
        yield f"    {code:<40}{number:>7}"
    yield f"{'runs of a script':<44}{len(scripts):>7}"
    yield f"{'  that failed':<44}{len(failed(round_)):>7}"
    longest = max((one.ended_at - one.began_at for one in scripts), default=0)
    yield f"{'  longest, s':<44}{longest:>7.1f}"
    yield f"{'leases':<44}{len(round_.evidence.leases):>7}"
    yield f"{'  that nobody was told of':<44}{_untold(round_):>7}"
    yield f"{'events, repetitions included':<44}{len(round_.evidence.events):>7}"
    yield f"{'longest time in which nobody was served, s':<44}{_longest_silence(operations):>7.1f}"
    stalled = sum(stall.until - stall.since for stall in round_.evidence.stalls)
    yield f"{'time that the machine had not for us, s':<44}{stalled:>7.1f}"


def _untold(round_: Round) -> int:
    """The work of requests whose students had gone: each keeps a sandbox until it expires."""
    granted = (one for one in round_.history.operations if one.kind == "allocate" and one.outcome == "ok")
    answered = {(one.student, one.sandbox_id) for one in granted}
    return sum((lease.holder, lease.sandbox_id) not in answered for lease in round_.evidence.leases)


def quantile(figures: Sequence[float], share: float) -> float:
    """The nearest rank: one of the figures."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _quantiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return f"{'':>8}{'':>8}"
    return f"{quantile(seconds, 0.5):>8.1f}{quantile(seconds, 0.99):>8.1f}"


def _why(operation: Operation) -> str:
    return " ".join(filter(None, (str(operation.status or ""), operation.code)))


def _longest_silence(operations: Sequence[Operation]) -> float:
    served = sorted(one.ended_at for one in operations if one.outcome == "ok")
    return max((after - before for before, after in pairwise(served)), default=0)
