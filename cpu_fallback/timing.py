"""Timed plans: a clock behind every step, and slots that tell what each step took.

Clocks are ordinary rows of the table, so that the walk, teams of threads and jumps are those of the plan itself; a plan
without them runs the same code as ever. A clock takes 20 to 50 ns, which the step before it is charged with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpu_fallback.calls import Array, Native
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.jumps import Jump
from cpu_fallback.loops import THREAD, Words
from cpu_fallback.native import Target
from cpu_fallback.program import prepared
from cpu_fallback.stream import CpuSlot, CpuStream
from gpu_engine.errors import DeviceError
from gpu_engine.ir.dtypes import INT64
from gpu_engine.plan.plan import Buffer, Plan, Step
from gpu_engine.plan.words import Address
from gpu_engine.runtime.device import StepTimes

MOST_SPANS = 4096
"""Steps of a run whose start and end are kept beyond the first of each; totals are kept of all."""
COUNT, LAST, BEGAN, TOTALS = 0, 8, 16, 24
"""Bytes into the journal: clocks read, when the last one was, when the run began; then {nanoseconds, runs} of every
step, then {step, nanoseconds} of every clock."""


@dataclass(frozen=True)
class BeginKernel:
    """A run begins. Words: the journal, and how many bytes of it are cleared."""

    clock: int

    def write(self, code: Code, target: Target) -> None:
        def begin() -> list[Reg]:
            words = Words(code)
            journal, nbytes = words.take("ptr"), words.take()
            code.call("void", "llvm.memset.p0.i64", journal, Reg("0", "i8"), nbytes, Reg("false", "i1"))
            now = _now(code, self.clock)
            code.store(now, code.at(journal, i64(LAST)), 8)
            code.store(now, code.at(journal, i64(BEGAN)), 8)
            return []

        code.either(code.compare("icmp eq", THREAD, i64(0)), begin, lambda: [])


@dataclass(frozen=True)
class ClockKernel:
    """A step ended. Words: the journal, its number, where its total and the spans stand, and how many spans fit."""

    clock: int

    def write(self, code: Code, target: Target) -> None:
        code.either(code.compare("icmp eq", THREAD, i64(0)), lambda: self._note(code), lambda: [])

    def _note(self, code: Code) -> list[Reg]:
        words = Words(code)
        journal = words.take("ptr")
        number, total, spans, fit = words.numbers(4)
        now = _now(code, self.clock)
        last = code.at(journal, i64(LAST))
        _add(code, code.at(journal, total), code.binary("sub", now, code.load("i64", last, 8)))
        _add(code, code.at(journal, code.binary("add", total, i64(8))), i64(1))
        code.store(now, last, 8)
        count = code.load("i64", journal, 8)
        code.store(code.binary("add", count, i64(1)), journal, 8)

        def keep() -> list[Reg]:
            place = code.at(code.at(journal, spans), code.binary("mul", count, i64(16)))
            code.store(number, place, 8)
            code.store(now, code.at(place, i64(8)), 8)
            return []

        return code.either(code.compare("icmp slt", count, fit), keep, lambda: [])


def _now(code: Code, clock: int) -> Reg:
    """Nanoseconds of the system's clock of this number.
    https://man7.org/linux/man-pages/man3/clock_gettime.3.html"""
    found = code.alloca("[2 x i64]", zero=False)
    code.call("i32", "clock_gettime", Reg(str(clock), "i32"), found)
    seconds = code.load("i64", found, 8)
    return code.binary(
        "add", code.binary("mul", seconds, i64(1_000_000_000)), code.load("i64", code.at(found, i64(8)), 8)
    )


def _add(code: Code, place: Reg, value: Reg) -> None:
    code.store(code.binary("add", code.load("i64", place, 8), value), place, 8)


def timed(plan: Plan) -> Plan:
    """The plan with a clock behind every step, and the journal as one more output; DeviceError where the system has no
    such clock."""
    if not hasattr(time, "clock_gettime"):
        raise DeviceError("steps cannot be timed on this system: it has no clock_gettime")
    clock, count = time.CLOCK_MONOTONIC, len(plan.steps)
    spans = TOTALS + 16 * count
    fit = count + MOST_SPANS
    journal = len(plan.buffers)
    begin = Native(BeginKernel(clock), (Address(journal), spans))
    steps = [Step(begin, (), (), "the begin of the run", scratch=(journal,))]
    for number, step in enumerate(plan.steps):
        words = (Address(journal), number, TOTALS + 16 * number, spans, fit)
        steps += [_farther(step), Step(Native(ClockKernel(clock), words), (), (), step.source, scratch=(journal,))]
    buffers = (*plan.buffers, Buffer(INT64, ((spans + 16 * fit) // 8,)))
    return prepared(replace(plan, steps=tuple(steps), buffers=buffers, outputs=(*plan.outputs, journal)))


def _farther(step: Step) -> Step:
    """A jump over twice as many rows: each has a clock behind it."""
    if isinstance(step.kernel, Native) and isinstance(step.kernel.kernel, Jump):
        byte, when, nbytes = step.kernel.words
        return replace(step, kernel=Native(step.kernel.kernel, (byte, when, 2 * nbytes)))  # type: ignore[operator]
    return step


class TimedSlot:
    """A slot of a timed plan, whose journal is no output. See `runtime.device.Slot`."""

    def __init__(self, slot: CpuSlot, steps: int) -> None:
        self._slot, self._steps = slot, steps
        self._journal: Array | None = None

    def stage(self, extents: tuple[int, ...]) -> Sequence[Array]:
        return self._slot.stage(extents)

    def launch(self) -> None:
        self._journal = None
        self._slot.launch()

    def wait(self) -> Sequence[Array]:
        *outputs, self._journal = self._slot.wait()
        return outputs

    def step_times(self) -> StepTimes | None:
        """See `runtime.device.Slot`."""
        return None if self._journal is None else read_journal(self._journal, self._steps)


def read_journal(journal: Array, steps: int) -> StepTimes:
    """What a journal of so many steps says."""
    shift_s = time.monotonic() - time.clock_gettime(time.CLOCK_MONOTONIC)
    shift_s = 0.0 if abs(shift_s) < 1e-3 else shift_s
    words = journal.view(np.int64)
    totals = words[TOTALS // 8 : TOTALS // 8 + 2 * steps].reshape(-1, 2)
    spans = words[TOTALS // 8 + 2 * steps :].reshape(-1, 2)[: int(words[COUNT])]
    bounds_s = np.concatenate([words[BEGAN // 8 : BEGAN // 8 + 1], spans[:, 1]]) * 1e-9 + shift_s
    return StepTimes(
        np.multiply(totals[:, 0], 1e-9, dtype=np.float64), totals[:, 1].copy(), spans[:, 0].copy(), bounds_s
    )


class TimedStream:
    """A stream of a timed plan. See `runtime.device.Stream`."""

    def __init__(self, stream: CpuStream, steps: int) -> None:
        self._stream, self.threads = stream, stream.threads
        self.slots = [TimedSlot(slot, steps) for slot in stream.slots]

    def enter(self) -> None:
        self._stream.enter()

    def close(self) -> None:
        self.slots = []
        self._stream.close()
