"""`gpu-engine tune`: streams, threads and batch for a latency bound, found by measuring, and a file that says them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from cpu_fallback.cores import usable_cores
from gpu_engine.configuration import read_configuration
from gpu_engine.tools.environment import Environment, environment
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.heap import frozen_heap
from gpu_engine.tools.load import Course, closed_loop
from gpu_engine.tools.measures import latency_of
from gpu_engine.tools.peers import Mode
from gpu_engine.tools.search import Found, Measured, Point, Space, exhaustive, reasons, search, space
from gpu_engine.tools.subject import open_subject

TUNED = ("streams", "threads", "batch", "requests")
LEAST_QUERIES = 100

Tell = Callable[[Point, int, int], None]
"""tell(what is measured next, how many were measured, the most that there can be)"""


@dataclass(frozen=True)
class Tuning:
    """What is to be found: the highest throughput whose `percent`-th percentile is at most `bound_ms` (None: any).

    `options` are those of compile() that stay as they are.
    """

    model: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    request: Request = field(default_factory=Request)
    bound_ms: float | None = None
    percent: float = 99.0
    seconds: float = 2.0
    most_batch: int = 32
    exhaustive: bool = False


@dataclass(frozen=True)
class Tuned:
    """What was found, in which space, on which machine; `options` are those of compile() that the file gets."""

    tuning: Tuning
    found: Found
    space: Space
    options: dict[str, Any]
    environment: Environment

    @property
    def reasons(self) -> list[str]:
        return reasons(self.found)


def tune(tuning: Tuning, tell: Tell) -> Tuned:
    """Measure until the point is found; raises what compile() and requests raise."""
    kept = {name: value for name, value in _said(tuning).items() if name not in TUNED}
    where, device = _space(tuning, kept)
    count = 0

    def measure(point: Point) -> Measured:
        nonlocal count
        tell(point, count, len(where.points))
        count += 1
        return measure_point(tuning, kept, point)

    found = (exhaustive if tuning.exhaustive else search)(where, measure, tuning.bound_ms)
    options = {"device": device, **kept, **_options(found.chosen.point)}
    return Tuned(tuning, found, where, options, environment())


def _said(tuning: Tuning) -> dict[str, Any]:
    """The options, with those of a configuration file that they name."""
    given = dict(tuning.options)
    stored = read_configuration(given.pop("config", {}))
    return stored | {name: value for name, value in given.items() if (name, value) != ("device", "auto")}


def _space(tuning: Tuning, kept: Mapping[str, Any]) -> tuple[Space, str]:
    """The batches that the model and the memory allow, on the cores that there are; and the device."""
    subject = open_subject(tuning.model, {**kept, "streams": 1, "batch": tuning.most_batch}, tuning.request)
    subject.close()
    device = subject.engine.device.split()[0]
    cores = len(usable_cores().numbers) if device == "cpu" else None
    return space(cores, subject.engine.batch), device


def _options(point: Point) -> dict[str, Any]:
    found = {"streams": point.streams, "threads": point.threads, "batch": point.batch, "requests": point.in_flight}
    return {name: value for name, value in found.items() if value is not None}


def measure_point(tuning: Tuning, kept: Mapping[str, Any], point: Point) -> Measured:
    """A closed loop with the point's requests in flight, after a warm-up."""
    subject = open_subject(tuning.model, {**kept, **_options(point)}, tuning.request)
    try:
        in_flight = max(1, point.in_flight // subject.rows)
        target = subject.target(Mode(cores=0, in_flight=in_flight, queue=True))
        course = Course(tuning.seconds, tuning.seconds / 4, least=LEAST_QUERIES)
        with frozen_heap():
            taken = closed_loop(target, in_flight, course)
        latency = latency_of(taken.latencies_s, (50.0, tuning.percent))
        return Measured(
            point=point,
            items_per_s=len(taken.finished_s) * subject.rows / taken.seconds,
            median_ms=latency.at(50.0),
            tail_ms=latency.at(tuning.percent),
            mean_batch=subject.engine.statistics().mean_batch,
            steady=taken.warm,
        )
    finally:
        subject.close()


def configuration_text(tuned: Tuned) -> str:
    """The configuration file: TOML, with what was measured in its comments."""
    document = tomlkit.document()
    for line in comments(tuned):
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    for name, value in tuned.options.items():
        document.add(name, tomlkit.item(value))
    return tomlkit.dumps(document)


def comments(tuned: Tuned) -> list[str]:
    """Where a configuration comes from and what it is for."""
    chosen, tuning = tuned.found.chosen, tuned.tuning
    bound = "no latency bound" if tuning.bound_ms is None else f"at most {tuning.bound_ms:g} ms"
    return [
        f"Written by `gpu-engine tune` for {tuning.model.name} on {tuned.environment.date}.",
        f"{tuned.environment.processor}, {tuned.environment.cores} cores.",
        f"Bound: {bound} at the {tuning.percent:g}th percentile.",
        f"Measured: {chosen.items_per_s:,.4g} items/s, median {chosen.median_ms:.3g} ms, "
        f"{tuning.percent:g}th percentile {chosen.tail_ms:.3g} ms.",
        "Every option of gpu_engine.compile() may stand here. `requests` is what the caller keeps in flight.",
    ]
