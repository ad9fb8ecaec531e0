"""What a batch costs and whether it is right: rows run singly and together before, or as, callers bring theirs.

The cost of 1, 2, 4, ... rows decides how many should share an execution: where most of it is weights or calls, more
rows cost little; where it is arithmetic, batches only make every row wait for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from gpu_engine.ir.dtypes import FLOAT16, FLOAT64, STRING
from gpu_engine.plan.plan import Port
from gpu_engine.plan.signature import Family
from gpu_engine.runtime.arrays import Array
from gpu_engine.runtime.buckets import powers
from gpu_engine.runtime.device import Slot

Row = Sequence[Array]
"""One row of every input; an input that does not carry the batch is whole in each."""
Clock = Callable[[], float]
WORTH = 0.9
"""This part of the greatest rate is enough: fewer rows wait less for each other, and leave others to form a batch."""
CALL_S = 20e-6
"""What an execution costs beside the device, on its thread: taking a batch, waking up (`benchmarks.overhead`)."""
BUDGET_S = 0.15
ROUNDS = 5
TOLERANCE = {FLOAT16: 2e-2, FLOAT64: 1e-9}
FEW = 0.01
"""This share of all elements may differ: an argmax that is nearly a tie, a rounding to int8 that falls the other way;
rows that are mixed up differ nearly everywhere."""


@dataclass(frozen=True)
class Measured:
    """`costs_s` of one execution by rows."""

    costs_s: Mapping[int, float]

    @property
    def batch(self) -> int:
        """The fewest rows that come near enough to the greatest rate."""
        rates = {rows: rows / self._cost_s(rows) for rows in sorted(self.costs_s)}
        return next(rows for rows, rate in rates.items() if rate >= WORTH * max(rates.values()))

    def _cost_s(self, rows: int) -> float:
        return self.costs_s[rows] + CALL_S

    def __str__(self) -> str:
        costs = ", ".join(f"{rows}: {cost * 1e3:.3g} ms" for rows, cost in sorted(self.costs_s.items()))
        return f"measured {costs}"


def measure(
    slot: Slot, family: Family, rows: Sequence[Row], most: int, clock: Clock = perf_counter
) -> Mapping[int, float]:
    """Seconds of an execution by how many rows it has, up to `most`; `rows` are used again where there are fewer.

    `clock` tells what an execution costs: where it is the calling thread that computes, its CPU time is nothing that
    other programs of a busy machine could disturb.

    Stops early where time is up and larger batches have not been worth it so far. Raises what the device raises.
    """
    costs: dict[int, list[float]] = {}
    started = perf_counter()
    for size in powers(most):
        given = [rows[i % len(rows)] for i in range(size)]
        costs[size] = [_run(slot, family, given, clock)[1] for _ in range(2)]
        found = Measured({n: min(times) for n, times in costs.items()})
        if perf_counter() - started > BUDGET_S and size > 1 and found.batch < size:
            break
    rounds = 0
    while rounds < ROUNDS and perf_counter() - started < BUDGET_S:
        for size, times in costs.items():
            times.append(_run(slot, family, [rows[i % len(rows)] for i in range(size)], clock)[1])
        rounds += 1
    return {n: min(times) for n, times in costs.items()}


def check(slot: Slot, family: Family, rows: Sequence[Row], batched_outputs: Sequence[bool], clock: Clock) -> str:
    """Run `rows` singly and together: how the results differ, "" if they do not. Raises what the device raises."""
    singles = [_run(slot, family, [row], clock)[0] for row in rows]
    together, _ = _run(slot, family, rows, clock)
    return compare(singles, together, batched_outputs, [f"output {i}" for i in range(len(together))])


def took_s(slot: Slot, family: Family, row: Row, clock: Clock) -> float:
    """Seconds that an execution of one row takes, its binding included."""
    return _run(slot, family, [row], clock)[1]


def _run(slot: Slot, family: Family, rows: Sequence[Row], clock: Clock) -> tuple[list[Array], float]:
    """Outputs of one execution of these rows, and how long it took: as `execution` does it."""
    started = clock()
    for i, (target, block) in enumerate(zip(slot.stage(family.extents(len(rows))), family.blocks, strict=True)):
        if block and len(rows) > 1:
            np.concatenate([row[i] for row in rows], out=target)
        else:
            target[...] = rows[0][i]
    slot.launch()
    outputs = [output.copy() for output in slot.wait()]
    return outputs, clock() - started


def compare(
    singles: Sequence[Sequence[Array]], together: Sequence[Array], batched: Sequence[bool], names: Sequence[str]
) -> str:
    """How outputs of rows together differ from those of the rows alone; "" if they do not."""
    for i, (all_rows, carries, name) in enumerate(zip(together, batched, names, strict=True)):
        alone = np.concatenate([single[i] for single in singles]) if carries else singles[0][i]
        if alone.shape != all_rows.shape:
            return f"{name} has shape {list(all_rows.shape)} for rows together and {list(alone.shape)} for rows alone"
        wrong = _differing(alone, all_rows)
        if wrong > FEW * alone.size:
            return f"{name} differs in {wrong} of {alone.size} elements between rows together and rows alone"
    return ""


def _differing(a: Array, b: Array) -> int:
    """Elements further apart than floats of their type may be, or that are not equal."""
    if a.dtype == STRING or a.dtype.kind in "biu":
        return int(np.count_nonzero(a != b))
    bound = TOLERANCE.get(a.dtype, 1e-3)
    finite = a[np.isfinite(a)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return int(np.count_nonzero(~np.isclose(a, b, rtol=bound, atol=bound * scale, equal_nan=True)))


def random_rows(
    ports: Sequence[Port], shapes: Sequence[tuple[int, ...]], blocks: Sequence[int], count: int
) -> list[Row]:
    """Inputs of `shapes` by which a model may be tried: floats between 0 and 1, integers 0 and 1, empty strings.

    An input of which a row takes no block is the same in all rows, as it has to be for those that run together.
    """
    random = np.random.default_rng(0)

    def one(port: Port, shape: tuple[int, ...]) -> Array:
        if port.dtype == STRING:
            return np.full(shape, "", object)
        values = random.random(shape) if port.dtype.kind not in "biu" else random.integers(0, 2, shape)
        return values.astype(port.dtype)

    rows = [[one(port, shape) for port, shape in zip(ports, shapes, strict=True)] for _ in range(count)]
    return [[own if block else same for own, same, block in zip(row, rows[0], blocks, strict=True)] for row in rows]
