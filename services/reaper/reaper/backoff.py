"""Delay between two attempts to delete a sandbox."""

import random

from reaper.settings import Settings


def compute_retry_delay(settings: Settings, attempts: int, retry_after_sec: float | None) -> float | None:
    """Return the seconds until the next attempt, or None after the last one.

    `attempts` counts the attempts before the one that just failed. `retry_after_sec` is CSP's Retry-After.

    The delay doubles with each attempt up to DELETION_BACKOFF_MAX_SEC. A fifth of it is random, because sandboxes
    that failed together would fail together again. It is never shorter than Retry-After.
    """
    if attempts + 1 >= settings.deletion_max_attempts:
        return None
    doubled = settings.deletion_backoff_base_sec * 2.0 ** min(attempts, 30)
    longest = min(1.25 * doubled, settings.deletion_backoff_max_sec)
    return max(random.uniform(0.8 * longest, longest), retry_after_sec or 0)  # noqa: S311 (jitter)
