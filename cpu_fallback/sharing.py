"""Which native steps the threads of a stream share, decided when a plan is bound: those with enough memory to touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir.dims import Dim
from gpu_engine.plan.binding import Numbers

Ints = NDArray[np.int64]
LEAST_NBYTES = 16 << 10
"""What a step reads and writes, for two threads to gain by sharing it."""
RUN_NBYTES = 256 << 10
"""What the shared steps of a run read and write together, for workers to be called."""
ENOUGH = 1 << 40


@dataclass(frozen=True)
class Traffic:
    """Bytes that the native steps of a segment read and write: those known now, up to ENOUGH, and (step, place of a
    number)."""

    known: Ints
    steps: Ints
    places: Ints

    def nbytes(self, numbers: Ints) -> Ints:
        """Of every step."""
        if not len(self.steps):
            return self.known
        return self.known + np.bincount(self.steps, numbers[self.places], len(self.known)).astype(np.int64)


def traffic_of(steps: Iterable[Sequence[Dim]], numbers: Numbers) -> Traffic:
    """For the bytes of the buffers of every step."""
    known, symbolic = [], []
    for i, sizes in enumerate(steps):
        known.append(min(ENOUGH, sum(size for size in sizes if isinstance(size, int))))
        symbolic += [(i, numbers.place(size)) for size in sizes if not isinstance(size, int)]
    columns = np.array(symbolic, np.int64).reshape(-1, 2)
    return Traffic(np.array(known, np.int64), columns[:, 0].copy(), columns[:, 1].copy())


def shares_of(nbytes: Ints, starts: Ints, counts: Ints) -> tuple[NDArray[np.uint8], list[bool]]:
    """Which steps threads share, as bytes, and which runs of steps are not better left to one thread."""
    shared = nbytes > LEAST_NBYTES
    sums = np.cumsum(np.concatenate([[0], nbytes * shared]))
    return shared.view(np.uint8), (sums[starts + counts] - sums[starts] > RUN_NBYTES).tolist()
