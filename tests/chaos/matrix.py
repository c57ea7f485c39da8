"""All faults, and rounds of them: alone, and two at a time."""

import random
from collections.abc import Iterator

from tests.chaos import clocks, deliveries, killing, links, queues, servers
from tests.chaos.faults import Fault

Step = tuple[Fault, ...]
"""The faults that are put on the broker at a time."""
LONG_SEC = 5.0
"""A fault that lasts so long leaves room for another in its time."""


def every(chance: random.Random) -> list[Fault]:
    return [
        *killing.faults(),
        *links.faults(),
        *servers.faults(),
        *queues.faults(),
        *deliveries.faults(chance),
        *clocks.faults(),
    ]


def short(chance: random.Random, words: str = "") -> list[Step]:
    """One fault of each kind, some alone and some in pairs: beside what lasts long there is the longest of those
    that are left and get along with it, so that the round is over soon."""
    faults = _chosen(every(chance), words)
    chance.shuffle(faults)
    of_kind = {fault.kind: fault for fault in faults}
    left = sorted(of_kind.values(), key=lambda fault: -fault.lasts_sec)
    steps: list[Step] = []
    while left:
        first = left.pop(0)
        beside = [fault for fault in left if first.lasts_sec >= LONG_SEC and _get_along(first, fault)]
        steps.append((first, *beside[:1]))
        left = [fault for fault in left if fault not in steps[-1]]
    chance.shuffle(steps)
    return steps


def long(chance: random.Random, words: str = "") -> Iterator[Step]:
    """Every fault alone, then all of them in pairs, in ever new pairs, for ever."""
    faults = _chosen(every(chance), words)
    chance.shuffle(faults)
    yield from ((fault,) for fault in faults)
    while True:
        chance.shuffle(faults)
        left = list(faults)
        while left:
            first = left.pop()
            second = next((fault for fault in left if _get_along(first, fault)), None)
            if second is None:
                yield (first,)
            else:
                left.remove(second)
                yield (first, second)


def _get_along(one: Fault, other: Fault) -> bool:
    return one.kind != other.kind and not one.touches & other.touches


def _chosen(faults: list[Fault], words: str) -> list[Fault]:
    return [fault for fault in faults if any(word in fault.name for word in words.split(","))]
