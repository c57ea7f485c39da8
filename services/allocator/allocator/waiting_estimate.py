"""Estimate of the time until a waiting student gets a sandbox, from creations in flight and measured times.

The estimate serves the line with the sandboxes that are being created, in the order of their expected times. It
changes nothing: `handlers.waiting` serves the line when the sandboxes are there.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from allocator.waiting_line import assign_sandboxes

REFRESH_SEC = 1.0
"""Time after which the creations in flight are read again."""


@dataclass(frozen=True, slots=True)
class Creation:
    """Account that is being created, or will be."""

    name: str
    is_in_hand: bool
    """Whether the provisioner works on it, or CSP has created it and no sync has imported it yet."""
    median_sec: float
    slow_sec: float
    """90th percentile of the time from the attempt to the import."""
    elapsed_sec: float
    """Seconds since the start of the attempt, if it is in hand."""
    due_in_sec: float
    """Seconds until it can be begun, if it is not in hand."""


def expect_sandboxes(creations: Sequence[Creation]) -> list[tuple[float, str]]:
    """Return the seconds until each creation is expected to be a sandbox, with its name; the next one first.

    A creation that is not in hand begins when an earlier one ends, so as many run at once as now. A creation that
    takes longer than usual has no expected time, and without one in hand the others have none.
    """
    in_hand = [
        (max(0.0, usual_sec - creation.elapsed_sec), creation.name)
        for creation in creations
        if creation.is_in_hand and (usual_sec := _choose_usual_time(creation)) is not None
    ]
    ends = [sec for sec, _ in in_hand]
    heapq.heapify(ends)
    expected = list(in_hand)
    for creation in creations:
        if ends and not creation.is_in_hand:
            sec = max(ends[0], creation.due_in_sec) + creation.median_sec
            heapq.heapreplace(ends, sec)
            expected.append((sec, creation.name))
    return sorted(expected)


def _choose_usual_time(creation: Creation) -> float | None:
    times = (creation.median_sec, creation.slow_sec)
    return next((sec for sec in times if creation.elapsed_sec <= sec), None)


def estimate_waits(prefixes: Sequence[str], expected: Sequence[tuple[float, str]]) -> list[int | None]:
    """Return the seconds until each student in the line is served, at least 1; None if unknown.

    `prefixes` are the name prefixes of the line, in its order.
    """
    if not expected:
        return [None] * len(prefixes)
    fitting = {prefix: [name for _, name in expected if name.startswith(prefix)] for prefix in set(prefixes)}
    seconds = {name: sec for sec, name in expected}
    return [
        None if name is None else max(1, math.ceil(seconds[name])) for name in assign_sandboxes(prefixes, fitting)
    ]
