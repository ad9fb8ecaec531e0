"""Scenarios of a benchmark: how load arrives, what counts, and MLPerf's rules for its four.

MLPerf's: https://github.com/mlcommons/inference_policies and loadgen's test_settings.h (minima in code) and mlperf.conf
(minima of a submission).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MIN_SECONDS, MIN_QUERIES = 10.0, 100
"""loadgen's minima in code; mlperf.conf asks for 600 s, and for 662 queries in MultiStream."""
OPEN_LOOP_SHARE = 0.7
"""The open loop's rate where none is given, of what the closed loop reached."""


@dataclass(frozen=True)
class Scenario:
    """`load` is "closed", "open" or "offline"; a query is `size` requests; `in_flight` queries at a time (None: what
    keeps the engine busy); `percentile` is the one that the scenario judges by; `metric` is its figure of merit."""

    name: str
    load: str
    metric: str
    percentile: float | None = None
    size: int = 1
    in_flight: int | None = None
    mlperf: bool = True


SCENARIOS = {
    each.name: each
    for each in (
        Scenario("closed", "closed", "items/s", mlperf=False),
        Scenario("open", "open", "latency at the rate", mlperf=False),
        Scenario("SingleStream", "closed", "90th percentile latency", 90.0, in_flight=1),
        Scenario("MultiStream", "closed", "99th percentile latency of 8 samples", 99.0, size=8, in_flight=1),
        Scenario("Server", "open", "highest rate whose 99th percentile latency keeps the bound", 99.0),
        Scenario("Offline", "offline", "samples/s"),
    )
}


def scenario(name: str) -> Scenario:
    """The scenario of that name, in any letter case; ValueError for others."""
    for each in SCENARIOS.values():
        if each.name.lower() == name.lower().replace("_", "").replace("-", ""):
            return each
    raise ValueError(f"unknown scenario {name!r}; there are {', '.join(SCENARIOS)}")


def violations(
    chosen: Scenario, queries: int, seconds: float, tail_ms: float | None = None, bound_ms: float | None = None
) -> list[str]:
    """What keeps a result from being a valid one under MLPerf's rules; nothing for scenarios that are not MLPerf's."""
    if not chosen.mlperf:
        return []
    found = []
    if seconds < MIN_SECONDS:
        found.append(f"it ran {seconds:.3g} s, loadgen's minimum is {MIN_SECONDS:g} s")
    if queries < MIN_QUERIES:
        found.append(f"it ran {queries} queries, loadgen's minimum is {MIN_QUERIES}")
    if bound_ms is not None and tail_ms is not None and tail_ms > bound_ms:
        found.append(f"the {chosen.percentile:g}th percentile is {tail_ms:.3g} ms, the bound {bound_ms:.3g} ms")
    return found


def find_peak(keeps_bound: Callable[[float], bool], guess: float, within: float = 0.05) -> float:
    """The highest rate that keeps the bound, to within that share of it: doubled or halved until one does and one does
    not, then bisected, as loadgen's FindPeakPerformance. 0 if not even a thousandth of the guess does."""
    low, high = (guess, math.inf) if keeps_bound(guess) else (0.0, guess)
    while high == math.inf:
        if keeps_bound(2 * low):
            low *= 2
        else:
            high = 2 * low
    while low == 0:
        if high < guess / 1000:
            return 0.0
        if keeps_bound(high / 2):
            low = high / 2
        else:
            high /= 2
    while high - low > within * low:
        middle = (low + high) / 2
        if keeps_bound(middle):
            low = middle
        else:
            high = middle
    return low
