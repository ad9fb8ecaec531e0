"""Memory of large results that their callers have let go, used again.

Where a system has to find and clear pages for it, fresh memory costs more than all that is written there.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_NBYTES = 1 << 20
"""Less is left to the allocator, which keeps it."""
SPARES = 2
GRAINS = 4
"""Significant bits of the size of a block: there are few sizes, each of which becomes a type of ctypes."""


class Rooms:
    """Hands out arrays and keeps the memory of the last that died. May be called from any thread."""

    def __init__(self) -> None:
        self._spares: deque[NDArray[np.uint8]] = deque(maxlen=SPARES)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with arbitrary contents; of Python objects, one of Nones."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < LEAST_NBYTES or dtype.hasobject:
            return np.empty(tuple(shape), dtype)
        block = self._spare(nbytes)
        holder = (ctypes.c_char * block.nbytes).from_buffer(block.data)
        weakref.finalize(holder, self._spares.append, block).atexit = False
        return np.ndarray(tuple(shape), dtype, holder)  # type: ignore[arg-type]

    def close(self) -> None:
        """Keep nothing any more."""
        self._spares.clear()
        self._spares = deque(maxlen=0)

    def _spare(self, nbytes: int) -> NDArray[np.uint8]:
        """A block that is large enough, and not twice as large as it must be."""
        for _ in range(SPARES):
            try:
                block = self._spares.popleft()
            except IndexError:
                break
            if nbytes <= block.nbytes <= 2 * nbytes:
                return block
        grain = 1 << (nbytes.bit_length() - GRAINS)
        return np.empty(-(-nbytes // grain) * grain, np.uint8)
