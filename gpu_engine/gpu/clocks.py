"""What each step of a launch took on a GPU: a mark behind every step, read once all of them have passed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gpu_engine.gpu.driver import Driver
from gpu_engine.runtime.device import StepTimes


class StepClocks:
    """The marks of one slot; `times` are those of the launch that was waited for last."""

    def __init__(self, driver: Driver, steps: int) -> None:
        self._driver, self._steps = driver, steps
        self._marks: list[Any] = []
        self._ended: list[int] = []
        self.times: StepTimes | None = None

    def begin(self) -> None:
        """The inputs are on their way; the first step follows."""
        self._marks, self._ended, self.times = [self._driver.mark()], [], None

    def ended(self, step: int) -> None:
        """A step was started, and the next one follows it."""
        self._marks.append(self._driver.mark())
        self._ended.append(step)

    def finish(self) -> None:
        """Wait for the launch and read the marks; the last one has passed just now."""
        self._driver.finish()
        passed = self._driver.seconds(self._marks)
        bounds_s = np.array(passed) + (time.monotonic() - passed[-1])
        step = np.array(self._ended, np.int64)
        seconds, runs = np.zeros(self._steps), np.zeros(self._steps, np.int64)
        np.add.at(seconds, step, np.diff(bounds_s))
        np.add.at(runs, step, 1)
        self.times = StepTimes(seconds, runs, step, bounds_s)
