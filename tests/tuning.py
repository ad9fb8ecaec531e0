"""A processor's costs in a formula, for the search of `gpu-engine tune` and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gpu_engine.tools.environment import Environment
from gpu_engine.tools.search import Found, Measured, Point, Space, search, space
from gpu_engine.tools.tune import Tuned, Tuning

MACHINE = Environment(
    "2026-11-29T12:00:00+00:00", "a processor", 8, 16, None, 1 << 34, "Linux", "3.11.7", {"gpu-engine": "0.1.0"}
)


@dataclass
class Costs:
    """An execution costs `call_ms` and `row_ms` for each row; `waits` is what more threads of a stream lose.

    Every measurement is off by the next of `noise`, in shares. `points` are those measured.
    """

    call_ms: float = 4.0
    row_ms: float = 2.0
    waits: float = 0.08
    noise: tuple[float, ...] = (0.0,)
    points: list[Point] = field(default_factory=list)

    def __call__(self, point: Point) -> Measured:
        self.points.append(point)
        exact = self.exact(point)
        off = 1 + self.noise[len(self.points) % len(self.noise)]
        return Measured(point, exact.items_per_s * off, exact.median_ms / off, exact.tail_ms / off, point.batch)

    def exact(self, point: Point) -> Measured:
        threads = point.threads or 1
        speed = threads / (1 + self.waits * (threads - 1))
        batch_ms = (self.call_ms + self.row_ms * point.batch) / speed
        waiting = point.in_flight / point.streams / point.batch
        rate = point.streams * point.batch / batch_ms * 1e3
        return Measured(point, rate, batch_ms * waiting, batch_ms * waiting * 1.2, point.batch)


def tuned(bound_ms: float | None = 60.0, costs: Costs | None = None) -> Tuned:
    """What a search over the formula finds."""
    where: Space = space(8, 32)
    found: Found = search(where, costs or Costs(), bound_ms)
    tuning = Tuning(Path("a_model.onnx"), bound_ms=bound_ms)
    point = found.chosen.point
    options = {"device": "cpu", "streams": point.streams, "threads": point.threads, "batch": point.batch}
    return Tuned(tuning, found, where, options | {"requests": point.in_flight}, MACHINE)
