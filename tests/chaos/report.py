"""What a round was like, in tables for the eye."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tests.chaos.evidence import Operation
from tests.chaos.rounds import Done, Round


def tables(round_: Round) -> Iterator[str]:
    yield from _faults(round_.done)
    yield ""
    yield from _work(round_)


def _faults(done: Sequence[Done]) -> Iterator[str]:
    """How often each kind was, and how long new students waited, in seconds."""
    waits: dict[str, list[float]] = defaultdict(list)
    for one in done:
        served_at = one.recovery.served_at
        waits[one.fault.kind].append(float("inf") if served_at is None else served_at - one.recovery.since)
    yield f"{'fault':<40}{'times':>7}{'p50 s':>8}{'p99 s':>8}{'limit':>8}"
    limits = {one.fault.kind: one.recovery.within_sec for one in done}
    for kind, seconds in sorted(waits.items()):
        p50, p99 = quantile(seconds, 0.5), quantile(seconds, 0.99)
        yield f"{kind:<40}{len(seconds):>7}{p50:>8.1f}{p99:>8.1f}{limits[kind]:>8.0f}"


def _work(round_: Round) -> Iterator[str]:
    operations, scripts = round_.history.operations, round_.history.scripts
    outcomes = Counter(operation.outcome for operation in operations)
    yield f"{'operations':<40}{len(operations):>7}"
    for outcome in ("ok", "refused", "unknown"):
        yield f"  {outcome:<38}{outcomes[outcome]:>7}"
    for code, number in Counter(_why(one) for one in operations if one.outcome != "ok").most_common():
        yield f"    {code:<36}{number:>7}"
    failed = [script for script in scripts if not script.succeeded]
    yield f"{'runs of a script':<40}{len(scripts):>7}"
    yield f"{'  that failed':<40}{len(failed):>7}"
    yield f"{'  longest, s':<40}{max((one.ended_at - one.began_at for one in scripts), default=0):>7.1f}"
    yield f"{'leases':<40}{len(round_.evidence.leases):>7}"
    yield f"{'events, repetitions included':<40}{len(round_.evidence.events):>7}"
    yield f"{'longest time in which nobody was served':<40}{_longest_silence(operations):>7.1f}"


def quantile(figures: Sequence[float], share: float) -> float:
    """The nearest rank: one of the figures."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _why(operation: Operation) -> str:
    return " ".join(filter(None, (str(operation.status or ""), operation.code)))


def _longest_silence(operations: Sequence[Operation]) -> float:
    served = sorted(one.ended_at for one in operations if one.outcome == "ok")
    return max((after - before for before, after in pairwise(served)), default=0)
