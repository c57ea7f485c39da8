"""Delay between two attempts to delete a sandbox."""

from reaper.settings import Settings
from sandbox_broker.csp.backoff import compute_backoff


def compute_retry_delay(settings: Settings, attempts: int, retry_after_sec: float | None) -> float | None:
    """Return the seconds until the next attempt, or None after the last one.

    `attempts` counts the attempts before the one that just failed. `retry_after_sec` is CSP's Retry-After.
    """
    if attempts + 1 >= settings.deletion_max_attempts:
        return None
    return compute_backoff(
        attempts, settings.deletion_backoff_base_sec, settings.deletion_backoff_max_sec, retry_after_sec
    )
