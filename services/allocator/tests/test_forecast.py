"""How long the pool lasts."""

import math

import pytest

from allocator.forecast import Forecast


def test_nobody_allocates_so_it_lasts_for_ever() -> None:
    forecast = Forecast()
    assert forecast.exhaustion_sec(0, 100, 7) == math.inf
    assert forecast.exhaustion_sec(15, 100, 7) == math.inf


def test_it_lasts_as_many_seconds_as_the_rate_of_leases_says() -> None:
    forecast = Forecast()
    forecast.exhaustion_sec(0, 130, 1000)
    assert forecast.exhaustion_sec(15, 100, 1030) == pytest.approx(50)  # 2 a second
    assert forecast.exhaustion_sec(30, 70, 1060) == pytest.approx(35)


def test_an_empty_pool_is_exhausted_now() -> None:
    forecast = Forecast()
    forecast.exhaustion_sec(0, 30, 0)
    assert forecast.exhaustion_sec(15, 0, 30) == 0


def test_only_the_last_five_minutes_count() -> None:
    forecast = Forecast()
    for step in range(100):
        forecast.exhaustion_sec(15 * step, 1000, 100 * step)
    still = [forecast.exhaustion_sec(15 * (100 + step), 1000, 9900) for step in range(21)]
    assert still[0] < still[10] < still[18]
    assert still[-1] == math.inf


def test_another_database_begins_anew() -> None:
    forecast = Forecast()
    forecast.exhaustion_sec(0, 10, 5000)
    assert forecast.exhaustion_sec(15, 10, 3) == math.inf
    assert forecast.exhaustion_sec(30, 10, 18) == 10
