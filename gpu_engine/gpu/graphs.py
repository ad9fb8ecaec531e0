"""CUDA graphs of the shapes that a slot runs often: captured at a shape's second launch, replayed from then on.

The first launch is plain, because it may load machine code and reserve scratch, which no capture can hold. Captured are
the launches between steps that Python runs: one graph for most models, several where array functions, which allocate,
or bodies come between. Segments whose extents only running tells are bound anew each time, and run plainly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gpu_engine.gpu.driver import Driver, Replay
from gpu_engine.gpu.launches import Launch
from gpu_engine.plan.plan import Plan

_LOGGER = logging.getLogger(__name__)

CAPTURED_SHAPES = 16
"""Of one slot. Every node of a graph takes memory of the device."""
NODE_NBYTES = 16 << 10
"""Of a launch in a graph: a guess. Drivers before 550 take 64 KiB, newer ones less
(https://docs.pytorch.org/docs/stable/torch.compiler_cudagraph_trees.html)."""
LEAST_LAUNCHES = 2
"""A graph of one launch saves nothing."""
TRIES = 2
"""A capture can fail because something else of the process disturbed it, such as the garbage collector freeing another
library's memory on this thread; if it fails again, it always does."""


@dataclass(eq=False)
class Habit:
    """How a shape is launched: plainly until every step was started `wanted` times, then by `graphs`, which start at
    their keys' steps."""

    wanted: int = 1
    launched: int = 0
    failed: int = 0
    graphs: dict[int, Replay] = field(default_factory=dict)


def runs_of_launches(plan: Plan, steps: range) -> tuple[range, ...]:
    """The steps cut so that launches are together and every other step is alone."""
    found: list[range] = []
    for i in steps:
        launches = isinstance(plan.steps[i].kernel, Launch)
        if found and launches and isinstance(plan.steps[found[-1].start].kernel, Launch):
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return tuple(found)


def is_captured(plan: Plan, steps: range) -> bool:
    """Whether one of the runs becomes a graph."""
    return len(steps) >= LEAST_LAUNCHES and isinstance(plan.steps[steps.start].kernel, Launch)


def captured_nbytes(plan: Plan) -> int:
    """About what the graphs of one shape take of the device."""
    runs = runs_of_launches(plan, plan.program.segments[0].steps)
    return NODE_NBYTES * sum(len(steps) for steps in runs if is_captured(plan, steps))


class Graphs:
    """The graphs of one slot, of the shapes launched last. `runs` are the steps of the plan's first segment."""

    def __init__(self, plan: Plan, driver: Driver, wanted: bool) -> None:
        self._driver = driver
        self.runs = runs_of_launches(plan, plan.program.segments[0].steps)
        self._captured = [steps for steps in self.runs if wanted and driver.captures and is_captured(plan, steps)]
        self._held: dict[Habit, None] = {}

    def prepare(self, habit: Habit, run: Callable[[range], object]) -> None:
        """Before a launch of a shape: capture it, where it is time. `run` starts steps."""
        if habit.graphs:
            del self._held[habit]
            self._held[habit] = None
        elif habit.launched >= habit.wanted and habit.failed < TRIES and self._captured:
            self._capture(habit, run)

    def clear(self) -> None:
        """Give up all graphs: what they were captured for lies elsewhere now."""
        self._held.clear()

    def forget(self, habit: Habit) -> None:
        """Give up a shape."""
        self._held.pop(habit, None)

    def _capture(self, habit: Habit, run: Callable[[range], object]) -> None:
        try:
            found = {steps.start: self._driver.capture(partial(run, steps)) for steps in self._captured}
        except Exception as error:
            habit.failed += 1
            again = "it is tried once more" if habit.failed < TRIES else "its kernels are launched one by one"
            _LOGGER.warning("a shape could not be captured as a CUDA graph, %s: %s", again, str(error))
            return
        habit.graphs = found
        self._held[habit] = None
        if len(self._held) > CAPTURED_SHAPES:
            self._evict(next(iter(self._held)))

    def _evict(self, habit: Habit) -> None:
        """Shapes that do not fit beside each other must not be captured again and again: each time one has to be
        launched twice as often."""
        del self._held[habit]
        habit.graphs, habit.launched, habit.wanted = {}, 0, 2 * habit.wanted
