"""How far the tests go that search for a difference between what we say and what we do.

Every run of all tests searches a little, and always the same. `SEARCH=10000` searches as much as that, by chance;
the seed stands at the head of pytest's output, and `SEARCH_SEED` repeats it.
"""

import os
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings

AMOUNT = int(os.environ.get("SEARCH", "0"))
"""Cases or steps; 0 for the little that every run has."""

SEED = int(os.environ.setdefault("SEARCH_SEED", str(secrets.randbits(32))))
"""In the environment, so that pytest's workers have the same."""

TIMEOUT_SEC = 0 if AMOUNT else 600
"""For pytest; 0 is none. Searching a little takes half a minute on a machine that does nothing else."""

T = TypeVar("T", bound=Callable[..., Any])


def effort(examples: int, steps: int = 1) -> settings:
    """For Hypothesis: so many examples of so many steps each, or as many examples as AMOUNT allows."""
    return settings(
        max_examples=-(-AMOUNT // steps) if AMOUNT else examples,
        stateful_step_count=max(steps, 2),
        derandomize=not AMOUNT,
        database=None,
        report_multiple_bugs=False,  # the time for making it short is for one story
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


def seeded(test: T) -> T:
    return seed(SEED)(test) if AMOUNT else test
