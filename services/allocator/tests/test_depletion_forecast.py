"""Depletion forecast."""

import math

import pytest

from allocator.background.depletion_forecast import DepletionForecast


def test_without_new_leases_the_pool_lasts_forever() -> None:
    forecast = DepletionForecast()
    assert forecast.exhaustion_sec(0, 100, 7) == math.inf
    assert forecast.exhaustion_sec(15, 100, 7) == math.inf


def test_the_forecast_divides_the_pool_by_the_lease_rate() -> None:
    forecast = DepletionForecast()
    forecast.exhaustion_sec(0, 130, 1000)
    assert forecast.exhaustion_sec(15, 100, 1030) == pytest.approx(50)  # 2 leases per second
    assert forecast.exhaustion_sec(30, 70, 1060) == pytest.approx(35)


def test_an_empty_pool_is_exhausted_at_once() -> None:
    forecast = DepletionForecast()
    forecast.exhaustion_sec(0, 30, 0)
    assert forecast.exhaustion_sec(15, 0, 30) == 0


def test_only_the_last_five_minutes_count() -> None:
    forecast = DepletionForecast()
    for step in range(100):
        forecast.exhaustion_sec(15 * step, 1000, 100 * step)
    still = [forecast.exhaustion_sec(15 * (100 + step), 1000, 9900) for step in range(21)]
    assert still[0] < still[10] < still[18]
    assert still[-1] == math.inf


def test_a_decreasing_lease_count_resets_the_forecast() -> None:
    forecast = DepletionForecast()
    forecast.exhaustion_sec(0, 10, 5000)
    assert forecast.exhaustion_sec(15, 10, 3) == math.inf
    assert forecast.exhaustion_sec(30, 10, 18) == 10
