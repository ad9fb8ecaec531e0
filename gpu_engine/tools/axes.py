"""Axes of a chart: where values lie on a scale, and the round numbers to write beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with its ticks; `logarithmic` needs low > 0."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, in per cent of the axis."""
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return 100 * (at - low) / (high - low)


def linear_axis(values: Sequence[float], most_ticks: int = 6) -> Axis:
    """From 0 to a round number above all values."""
    top = max([*values, 0.0]) or 1.0
    step = next(step for step in _steps(top) if math.ceil(top * 1.05 / step) <= most_ticks)
    count = math.ceil(top * 1.05 / step)
    return Axis(0.0, count * step, tuple(step * i for i in range(count + 1)))


def _steps(top: float) -> list[float]:
    exponent = math.floor(math.log10(top)) - 1
    return [step * 10.0**power for power in range(exponent, exponent + 3) for step in STEPS]


def log_axis(values: Sequence[float]) -> Axis:
    """Around all values, which are above 0, with the 1-2-5 numbers inside; twice the least if they are all the same."""
    low, high = min(values) / 1.25, max(values) * 1.25
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = tuple(step * 10.0**power for power in powers for step in STEPS if low <= step * 10.0**power <= high)
    return Axis(low, high, ticks, logarithmic=True)
