"""How much is computed while compiling: as much as networks need, never so much that a few lines exhaust a machine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from gpu_engine.ir.dims import Dim, number
from gpu_engine.ir.dtypes import DType

LIMIT_NBYTES = 512 << 20
"""What one operation may make, and read of elements that only repeat others."""
SYMBOLIC_LIMIT_NBYTES = 16 << 20
"""The same where the elements are symbolic extents, which are Python objects."""
BUDGET_NBYTES = 1 << 30
"""What all operations may make together."""
VIEW_LIMIT_NBYTES = 4 << 30
"""How large a tensor may be that only repeats elements: it takes no memory until a kernel needs it whole."""


class FoldingBudget:
    """Says of one operation after the other whether its results are small enough to compute them now."""

    def __init__(self) -> None:
        self._left = BUDGET_NBYTES

    def allows(self, known: Iterable[NDArray[Any]], nbytes: int, *, as_view: bool, symbolic: bool) -> bool:
        """Whether results of `nbytes` may be made of the `known` arrays. Repeated elements count as what they stand
        for; with `as_view` the results share the memory of arrays that repeat nothing."""
        arrays = list(known)
        if as_view and not symbolic and not any(map(repeats, arrays)):
            return nbytes <= max([VIEW_LIMIT_NBYTES, *(array.nbytes for array in arrays)])
        read = sum(map(hidden_nbytes, arrays))
        if read + nbytes > (SYMBOLIC_LIMIT_NBYTES if symbolic else LIMIT_NBYTES) or nbytes > self._left:
            return False
        self._left -= nbytes
        return True


def repeats(array: NDArray[Any]) -> bool:
    """Whether the array is larger than the memory that it shows, and a copy may be needed to see it otherwise."""
    strides = [stride for stride, extent in zip(array.strides, array.shape, strict=True) if extent != 1]
    return 0 in strides and any(strides)


def tensors_nbytes(tensors: Iterable[tuple[DType, tuple[Dim, ...]]]) -> int:
    """What tensors of known extents take."""
    return sum(math.prod(map(number, shape)) * dtype.itemsize for dtype, shape in tensors)


def hidden_nbytes(array: NDArray[Any]) -> int:
    """What a copy of the array takes if it is larger than the memory that it shows, else 0."""
    return array.nbytes if 0 in array.strides and array.size > 1 else 0


def shrunk(array: NDArray[Any]) -> NDArray[Any]:
    """The array with every axis cut to one place along which it repeats the same elements."""
    index = tuple(
        slice(0, 1) if stride == 0 and extent > 1 else slice(None)
        for stride, extent in zip(array.strides, array.shape, strict=True)
    )
    return array[index]
