"""A model under load on a timed device: what every step took, and every batch for a trace."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir.dims import Dim
from gpu_engine.options import Options
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.observation import Execution
from gpu_engine.runtime.statistics import Statistics
from gpu_engine.tools.stages import Extents, Stages, kernel_name, nodes_of_steps, short
from gpu_engine.tools.work import flop_by_source, flop_of_steps, step_nbytes

Inputs = Mapping[str, NDArray[Any]]
TRACED = 2000
"""Executions that are kept whole, for a trace; the table counts all."""


@dataclass
class Record:
    """An observer: sums over all executions, and the last TRACED of them whole."""

    steps: int
    executions: deque[Execution] = field(default_factory=lambda: deque(maxlen=TRACED))
    extents: Counter[tuple[int, ...]] = field(default_factory=Counter)
    compute_s: float = 0.0

    def __post_init__(self) -> None:
        self.seconds, self.runs = np.zeros(self.steps), np.zeros(self.steps, np.int64)
        self._lock = threading.Lock()

    def add(self, execution: Execution) -> None:
        with self._lock:
            self.executions.append(execution)
            self.extents[execution.extents] += 1
            self.compute_s += execution.moments.computed_s - execution.moments.staged_s
            if execution.steps is not None:
                self.seconds += execution.steps.seconds
                self.runs += execution.steps.runs


@dataclass(frozen=True)
class Pressed:
    """What an engine did under a load: rows a second, and its statistics."""

    rows_per_s: float
    statistics: Statistics


@dataclass(frozen=True)
class Profile:
    """A load with clocks behind every step, and the same without them."""

    plan: Plan
    stages: Stages
    record: Record
    timed: Pressed
    plain: Pressed
    streams: int
    batch: int


def profile(
    stages: Stages, device: Device, options: Options, reason: str, inputs: Inputs, in_flight: int, seconds: float
) -> Profile:
    """Keep so many requests in flight for about so many seconds, half of them with clocks and half without.

    `in_flight` 0 means as many as keep every slot busy. Raises what requests raise.
    """
    record = Record(len(stages.plan.steps))
    with Engine(stages.plan, device, options, reason) as engine:
        plain = press(engine, inputs, in_flight or engine.optimal_requests, seconds / 2)
    with Engine(stages.plan, device.timed(), options, reason) as engine:
        engine.run(inputs)
        engine.observe(record.add)
        timed = press(engine, inputs, in_flight or engine.optimal_requests, seconds / 2)
        engine.observe(None)
        return Profile(stages.plan, stages, record, timed, plain, engine.streams, engine.batch)


def press(engine: Engine, inputs: Inputs, in_flight: int, seconds: float) -> Pressed:
    """So many requests in flight until the time is over; each is waited for."""
    engine.run(inputs)
    before = engine.statistics().inference_count
    began = time.monotonic()
    waiting: deque[Future[Any]] = deque(engine.submit(inputs) for _ in range(in_flight))
    while waiting:
        waiting.popleft().result()
        if time.monotonic() - began < seconds:
            waiting.append(engine.submit(inputs))
    took = time.monotonic() - began
    after = engine.statistics()
    return Pressed((after.inference_count - before) / took, after)


@dataclass(frozen=True)
class StepRow:
    """A step of the table: its ONNX nodes, the mean time of an execution that it takes, its share, and its rates.

    `runs` are those in one execution, other than 1 in loops and branches.
    """

    number: int
    nodes: tuple[str, ...]
    kernel: str
    results: str
    mean_us: float
    share: float
    runs: float
    gflop_per_s: float | None
    gb_per_s: float | None


def step_rows(found: Profile) -> list[StepRow]:
    """A row for each step, in order."""
    plan, record = found.plan, found.record
    executions, taken = record.extents.total(), record.seconds.tolist()
    members, _ = nodes_of_steps(found.stages.imported, {step.source for step in plan.steps})
    flop, nbytes = _totals(found, flop_by_source(found.stages.optimized, members))
    total_s = sum(taken) or float("nan")
    rows = []
    for number, step in enumerate(plan.steps):
        seconds = taken[number]
        rows.append(
            StepRow(
                number,
                tuple(map(short, members[step.source] or [step.source])),
                kernel_name(step),
                ", ".join(_buffer(plan, index) for index in step.outputs),
                seconds / max(executions, 1) * 1e6,
                seconds / total_s,
                int(record.runs[number]) / max(executions, 1),
                _rate(flop[number], seconds),
                _rate(nbytes[number], seconds),
            )
        )
    return rows


def _totals(found: Profile, flops: Mapping[str, Dim]) -> tuple[list[int | None], list[int | None]]:
    """For each step the arithmetic and the bytes of all executions; None where an extent is not known, or for a step
    in a loop."""
    plan, record = found.plan, found.record
    executions = record.extents.total()
    flop: list[int | None] = [0] * len(plan.steps)
    nbytes: list[int | None] = [0] * len(plan.steps)
    for values, count in record.extents.items():
        extents: Extents = dict(zip(plan.symbols, values, strict=True))
        one_flop = flop_of_steps(plan, flops, record.seconds.tolist(), extents)
        for number, step in enumerate(plan.steps):
            once = record.runs[number] == executions
            flop[number] = _add(flop[number], one_flop[number] if once else None, count)
            nbytes[number] = _add(nbytes[number], step_nbytes(plan, step, extents) if once else None, count)
    return flop, nbytes


def _add(total: int | None, one: int | None, count: int) -> int | None:
    return None if total is None or one is None else total + one * count


def _rate(amount: int | None, seconds: float) -> float | None:
    return None if not amount or not seconds else amount / seconds / 1e9


def _buffer(plan: Plan, index: int) -> str:
    buffer = plan.buffers[index]
    return f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]"


def unaccounted_s(found: Profile) -> float:
    """Seconds of all executions that are computing but in no step: calls into native code, waking threads."""
    return max(0.0, found.record.compute_s - float(found.record.seconds.sum()))
