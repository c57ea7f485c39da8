"""When a deletion that failed is tried again."""

import random

from reaper.settings import Settings


def retry_in_sec(settings: Settings, attempts: int, retry_after_sec: float | None) -> float | None:
    """Seconds until the next attempt, after `attempts` earlier ones and the one that just failed; None when it
    was the last. Doubles each time up to the maximum, with a fifth of it left to chance so that what failed
    together does not come back together, and is never shorter than what CSP asked for."""
    if attempts + 1 >= settings.deletion_max_attempts:
        return None
    doubled = settings.deletion_backoff_base_sec * 2.0 ** min(attempts, 30)
    longest = min(1.25 * doubled, settings.deletion_backoff_max_sec)
    return max(random.uniform(0.8 * longest, longest), retry_after_sec or 0)  # noqa: S311 (jitter)
