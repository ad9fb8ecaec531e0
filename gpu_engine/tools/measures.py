"""Percentiles, spread and steadiness of measurements: arithmetic on numbers, without a clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
STEADY_WINDOWS, STEADY_WITHIN = 3, 0.10
"""The rule of Triton's perf_analyzer: the last three windows, each within 10 % of their mean."""
UNSTEADY_VARIANCE = 0.025
"""trtexec's limit for the coefficient of variance."""

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """Milliseconds: the mean, the population's standard deviation, extremes, and {p: the p-th percentile}."""

    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    percentiles_ms: dict[float, float]

    def at(self, percent: float) -> float:
        """A percentile that was asked for; KeyError for others."""
        return self.percentiles_ms[percent]


def rank(count: int, percent: float) -> int:
    """Which of `count` sorted values, from 1 on, is the percentile: the ceil(count * percent / 100)-th.

    ValueError unless 1 <= percent <= 100 and there is a value. `percent` counts as the decimal number that it prints
    as, so the 99.9th of 1,000 values is the 999th.
    """
    if not 1 <= percent <= 100:
        raise ValueError(f"a percentile lies between 1 and 100, given {percent:g}")
    if count < 1:
        raise ValueError("there is no percentile of no values")
    return math.ceil(count * Fraction(str(percent)) / 100)


def percentile(values: Sequence[float] | Times, percent: float) -> float:
    """The smallest value that at least `percent` per cent of the values do not exceed."""
    return float(np.sort(np.asarray(values, np.float64))[rank(len(values), percent) - 1])


def latency_of(seconds: Sequence[float] | Times, percentiles: Sequence[float] = PERCENTILES) -> Latency:
    """The summary of latencies given in seconds; ValueError if there are none."""
    ordered = np.sort(np.asarray(seconds, np.float64)) * 1e3
    found = {percent: float(ordered[rank(len(ordered), percent) - 1]) for percent in sorted(percentiles)}
    return Latency(float(ordered.mean()), float(ordered.std()), float(ordered[0]), float(ordered[-1]), found)


def is_steady(figures: Sequence[float]) -> bool:
    """Whether the last STEADY_WINDOWS figures all lie within STEADY_WITHIN of their mean."""
    last = figures[-STEADY_WINDOWS:]
    if len(last) < STEADY_WINDOWS:
        return False
    mean = sum(last) / len(last)
    return mean > 0 and all(abs(figure - mean) <= STEADY_WITHIN * mean for figure in last)


def variance(figures: Sequence[float]) -> float:
    """The coefficient of variance: standard deviation over mean; 0 for fewer than two figures."""
    if len(figures) < 2:
        return 0.0
    mean = float(np.mean(figures))
    return float(np.std(figures)) / mean if mean else math.inf


def window_rates(finished_s: Sequence[float] | Times, start_s: float, stop_s: float, windows: int) -> list[float]:
    """How many of the sorted times fall into each of equal windows between start and stop, per second."""
    edges = np.linspace(start_s, stop_s, windows + 1)
    places = np.searchsorted(np.asarray(finished_s, np.float64), edges, side="right")
    return [float(count) / ((stop_s - start_s) / windows) for count in np.diff(places)]
