"""Percentiles, steadiness and windows of measurements, and MLPerf's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.tools.measures import is_steady, latency_of, percentile, rank, variance, window_rates
from gpu_engine.tools.scenarios import SCENARIOS, find_peak, scenario, violations


@pytest.mark.parametrize(
    ("count", "percent", "place"),
    [(1, 1, 1), (1, 100, 1), (10, 50, 5), (11, 50, 6), (100, 99, 99), (101, 99, 100), (1000, 99.9, 999), (4, 25, 1)],
)
def test_the_percentile_is_the_ceiling_of_its_share_of_the_values(count: int, percent: float, place: int) -> None:
    assert rank(count, percent) == place
    assert percentile(list(range(count, 0, -1)), percent) == place


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(10, 1000))
def test_so_many_values_do_not_exceed_a_percentile_and_no_smaller_value_has_that(
    values: list[float], tenths: int
) -> None:
    percent = tenths / 10
    found = percentile(values, percent)
    assert sum(value <= found for value in values) * 1000 >= len(values) * tenths
    assert sum(value < found for value in values) * 1000 < len(values) * tenths


@pytest.mark.parametrize("percent", [0, 0.5, 100.1, -1, math.nan])
def test_a_percentile_lies_between_1_and_100(percent: float) -> None:
    with pytest.raises(ValueError, match="between 1 and 100"):
        rank(10, percent)


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        latency_of([])


def test_latencies_are_in_milliseconds() -> None:
    found = latency_of([0.001, 0.003], (50.0, 99.0))
    assert (found.mean_ms, found.std_ms, found.min_ms, found.max_ms) == pytest.approx((2, 1, 1, 3))
    assert found.percentiles_ms == pytest.approx({50.0: 1, 99.0: 3})


@pytest.mark.parametrize(
    ("figures", "steady"),
    [
        ([100, 100], False),
        ([100, 109, 91], True),
        ([100, 112, 88], False),
        ([5, 300, 100, 101, 99], True),
        ([100, 100, 100, 150], False),
        ([0, 0, 0], False),
    ],
)
def test_steady_are_three_windows_within_a_tenth_of_their_mean(figures: list[float], steady: bool) -> None:
    assert is_steady(figures) is steady


def test_variance_is_deviation_over_mean() -> None:
    assert variance([90, 110]) == pytest.approx(0.1)
    assert variance([7]) == 0 and variance([-1, 1]) == math.inf


def test_windows_count_what_finished_in_them() -> None:
    assert window_rates([0.1, 0.2, 0.9, 1.0, 1.5], 0.0, 2.0, 2) == [4.0, 1.0]
    assert sum(window_rates(np.linspace(0.01, 5, 500), 0.0, 5.0, 10)) / 2 == 500


def test_scenarios_are_found_in_any_spelling() -> None:
    assert scenario("single_stream") is SCENARIOS["SingleStream"] and scenario("OFFLINE") is SCENARIOS["Offline"]
    assert SCENARIOS["SingleStream"].percentile == 90 and SCENARIOS["Server"].percentile == 99
    assert (SCENARIOS["MultiStream"].size, SCENARIOS["MultiStream"].percentile) == (8, 99)
    with pytest.raises(ValueError, match="there are closed, open, SingleStream"):
        scenario("batch")


def test_mlperf_asks_for_ten_seconds_and_a_hundred_queries_within_the_bound() -> None:
    server = SCENARIOS["Server"]
    assert violations(server, 100, 10.0, 19.0, 20.0) == []
    assert len(violations(server, 99, 9.0, 21.0, 20.0)) == 3
    assert violations(SCENARIOS["closed"], 1, 0.1) == []


@pytest.mark.parametrize("peak", [0.7, 3.0, 180.0, 5000.0])
def test_the_peak_is_found_by_doubling_and_halving(peak: float) -> None:
    tried: list[float] = []

    def keeps_bound(rate: float) -> bool:
        tried.append(rate)
        return rate <= peak

    assert peak * 0.95 <= find_peak(keeps_bound, 100.0) <= peak
    assert len(tried) < 16


def test_no_rate_may_keep_the_bound() -> None:
    assert find_peak(lambda rate: False, 100.0) == 0
