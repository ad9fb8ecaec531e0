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


@dataclass(frozen=True)
class Traffic:
    """Bytes that the native steps of a segment read and write: those known now, and (step, place of a number)."""

    known: Ints
    steps: Ints
    places: Ints

    def nbytes(self, numbers: Ints) -> Ints:
        """Of every step."""
        found = self.known.copy()
        np.add.at(found, self.steps, numbers[self.places])
        return found


def traffic_of(steps: Iterable[Sequence[Dim]], numbers: Numbers) -> Traffic:
    """For the bytes of the buffers of every step."""
    known, symbolic = [], []
    for i, sizes in enumerate(steps):
        known.append(sum(size for size in sizes if isinstance(size, int)))
        symbolic += [(i, numbers.place(size)) for size in sizes if not isinstance(size, int)]
    columns = np.array(symbolic, np.int64).reshape(-1, 2)
    return Traffic(np.array(known, np.int64), columns[:, 0].copy(), columns[:, 1].copy())


def shares_of(nbytes: Ints) -> NDArray[np.uint8] | None:
    """Which steps of a run threads share, as bytes; None if one thread had better run it alone."""
    shared = nbytes >= LEAST_NBYTES
    return shared.astype(np.uint8) if shared.any() and nbytes[shared].sum() >= RUN_NBYTES else None
