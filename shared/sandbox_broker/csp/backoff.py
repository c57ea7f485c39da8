"""Delay between two attempts of a call to CSP."""

import random


def compute_backoff(attempts: int, base_sec: float, max_sec: float, retry_after_sec: float | None) -> float:
    """Return the seconds until the next attempt.

    `attempts` counts the attempts before the one that just failed. `retry_after_sec` is CSP's Retry-After.

    The delay doubles with each attempt up to `max_sec`. A fifth of it is random, because calls that failed together
    would fail together again. It is never shorter than Retry-After.
    """
    longest = min(1.25 * base_sec * 2.0 ** min(attempts, 30), max_sec)
    return max(random.uniform(0.8 * longest, longest), retry_after_sec or 0)  # noqa: S311 (jitter)
