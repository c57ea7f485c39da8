"""Tests of backoff.py."""

import random

import pytest

from reaper.backoff import compute_retry_delay

from .reaper_harness import settings

TRIES = 200
SETTINGS = settings(deletion_max_attempts=1000)


def delay(attempts: int, retry_after_sec: float | None = None, **changes: float) -> float:
    seconds = compute_retry_delay(SETTINGS.model_copy(update=changes), attempts, retry_after_sec)
    assert seconds is not None
    return seconds


@pytest.mark.parametrize("attempts", range(7))
def test_the_delay_doubles_within_its_bounds(attempts: int) -> None:
    doubled = 30 * 2**attempts
    for _ in range(TRIES):
        assert min(doubled, 0.8 * 3600) <= delay(attempts) <= min(1.25 * doubled, 3600)


def test_the_delay_stays_within_its_bounds_for_any_settings() -> None:
    for _ in range(TRIES):
        base = random.uniform(0.001, 100)
        longest = base * random.uniform(1.25, 1000)
        seconds = delay(random.randrange(999), deletion_backoff_base_sec=base, deletion_backoff_max_sec=longest)
        assert base * 0.999 <= seconds <= longest


@pytest.mark.parametrize("attempts", [0, 3, 7, 20, 998])
def test_the_delay_is_random_at_the_maximum_too(attempts: int) -> None:
    seconds = [delay(attempts) for _ in range(TRIES)]
    assert max(seconds) - min(seconds) > 0.1 * max(seconds)


def test_the_delay_is_never_shorter_than_retry_after() -> None:
    assert delay(0, 500) == 500
    assert delay(0, 5000) == 5000
    assert delay(5, 1) >= 960
    assert delay(0, 0) >= 30


def test_there_is_no_delay_after_the_last_attempt() -> None:
    eight = settings(deletion_max_attempts=8)
    assert [compute_retry_delay(eight, attempts, None) is None for attempts in range(10)] == [False] * 7 + [
        True
    ] * 3
    assert compute_retry_delay(settings(deletion_max_attempts=1), 0, 60) is None
