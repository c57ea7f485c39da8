"""Effort and seed of the randomized tests.

By default each of these tests tries a few fixed cases. `SEARCH=10000` tries that many random cases. The header of
pytest's output shows the seed, and `SEARCH_SEED` repeats a run.
"""

import os
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings

RANDOM_CASES = int(os.environ.get("SEARCH", "0"))
"""Number of random cases or steps; 0 for the fixed cases of a normal run."""

SEED = int(os.environ.setdefault("SEARCH_SEED", str(secrets.randbits(32))))
"""Seed of random cases. It is stored in the environment, so that all pytest workers use the same seed."""

TIMEOUT_SEC = 0 if RANDOM_CASES else 600
"""Timeout for pytest, 0 for none. The fixed cases take half a minute on an idle machine."""

T = TypeVar("T", bound=Callable[..., Any])


def build_settings(examples: int, steps: int = 1) -> settings:
    """Return Hypothesis settings for `examples` examples of `steps` steps, or for RANDOM_CASES steps in total."""
    return settings(
        max_examples=-(-RANDOM_CASES // steps) if RANDOM_CASES else examples,
        stateful_step_count=max(steps, 2),
        derandomize=not RANDOM_CASES,
        database=None,
        report_multiple_bugs=False,  # spend the shrinking time on one failure
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


def with_seed(test: T) -> T:
    return seed(SEED)(test) if RANDOM_CASES else test
