"""List of all faults, and plans of rounds with single faults and pairs."""

import itertools
import random
from collections.abc import Iterator

from tests.chaos import (
    clock_faults,
    cluster_faults,
    delivery_faults,
    link_faults,
    process_faults,
    queue_faults,
    server_faults,
    setup_faults,
)
from tests.chaos.faults import Fault

Step = tuple[Fault, ...]
"""Faults injected together."""
PAIR = 2
LONG_SEC = 5.0
"""Shortest duration of a fault that can overlap with a second one."""


def list_faults(rng: random.Random, *, cluster: bool = False) -> list[Fault]:
    """List all faults of single servers, or of clusters: the loss of a node in place of the loss of a server."""
    return [
        *process_faults.list_faults(),
        *link_faults.list_faults(),
        *(cluster_faults.list_faults(rng) if cluster else server_faults.list_faults()),
        *queue_faults.list_faults(),
        *delivery_faults.list_faults(rng),
        *clock_faults.list_faults(),
        *setup_faults.list_faults(),
    ]


def plan_short_round(rng: random.Random, words: str = "", *, cluster: bool = False) -> list[Step]:
    """Plan one fault of each kind.

    To keep the round short, each long fault is paired with the longest remaining fault it can be combined with.
    """
    faults = _select_by_name(list_faults(rng, cluster=cluster), words)
    rng.shuffle(faults)
    of_kind = {fault.kind: fault for fault in faults}
    left = sorted(of_kind.values(), key=lambda fault: -fault.duration_sec)
    steps: list[Step] = []
    while left:
        first = left.pop(0)
        partners = [fault for fault in left if first.duration_sec >= LONG_SEC and _can_combine(first, fault)]
        steps.append((first, *partners[:1]))
        left = [fault for fault in left if fault not in steps[-1]]
    rng.shuffle(steps)
    return steps


def plan_repeated_round(
    rng: random.Random, times: int, words: str = "", *, cluster: bool = False
) -> Iterator[Step]:
    """Plan every fault alone, this number of times."""
    faults = _select_by_name(list_faults(rng, cluster=cluster), words)
    for _ in range(times):
        rng.shuffle(faults)
        yield from ((fault,) for fault in faults)


def plan_long_round(rng: random.Random, words: str = "", *, cluster: bool = False) -> Iterator[Step]:
    """Plan every fault alone, then random pairs of all faults without end."""
    faults = _select_by_name(list_faults(rng, cluster=cluster), words)
    rng.shuffle(faults)
    yield from ((fault,) for fault in faults)
    yield from _pair_without_end(rng, faults)


def plan_pairs(rng: random.Random, number: int, words: str = "", *, cluster: bool = False) -> Iterator[Step]:
    """Plan this number of random pairs. Returns no pair if no two faults can be combined."""
    faults = _select_by_name(list_faults(rng, cluster=cluster), words)
    if any(_can_combine(one, other) for one in faults for other in faults):
        pairs = (step for step in _pair_without_end(rng, faults) if len(step) == PAIR)
        yield from itertools.islice(pairs, number)


def _pair_without_end(rng: random.Random, faults: list[Fault]) -> Iterator[Step]:
    """Yield each fault once, with another one where possible, and again without end."""
    while True:
        rng.shuffle(faults)
        left = list(faults)
        while left:
            first = left.pop()
            second = next((fault for fault in left if _can_combine(first, fault)), None)
            if second is None:
                yield (first,)
            else:
                left.remove(second)
                yield (first, second)


def _can_combine(one: Fault, other: Fault) -> bool:
    return one.kind != other.kind and not one.affects & other.affects


def _select_by_name(faults: list[Fault], words: str) -> list[Fault]:
    return [fault for fault in faults if any(word in fault.name for word in words.split(","))]
