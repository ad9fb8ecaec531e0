"""The two kinds of step that the CPU runs: a native kernel with argument words, or a function over arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.native import Kernel
from gpu_engine.ir.graph import Op
from gpu_engine.plan.words import Word

Array = NDArray[Any]


@dataclass(frozen=True)
class Native:
    """A kernel and its argument block of 8-byte words."""

    kernel: Kernel
    words: tuple[Word, ...]


ArrayFunction = Callable[[Any, Sequence[Array], Sequence[Array], Sequence[Array]], object]
"""function(op, inputs, outputs, scratch): writes every element of `outputs`; `op` has ints for all its extents. Of a
step that binds extents it gets no outputs and gives them."""


@dataclass(frozen=True)
class ArrayCall:
    """A function over NumPy views of the step's buffers; `op` is a dataclass, whose extents binding resolves."""

    function: ArrayFunction
    op: Any


def address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def evaluate_into(op: Op, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
    """The reference of an operation, copied into place; raises ValueError if a shape is not the declared one."""
    for out, result in zip(outputs, op.evaluate(np, *inputs), strict=True):
        copy_exactly(out, result)


def copy_exactly(out: Array, result: Array) -> None:
    """`result` into `out` of the same shape."""
    if result.shape != out.shape:
        raise ValueError(f"a result of shape {list(result.shape)} where {list(out.shape)} was declared")
    if out.dtype == object and out.ndim == 0:
        out[()] = result[()]
    else:
        np.copyto(out, result, casting="unsafe")
