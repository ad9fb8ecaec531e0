"""Runs native calls of the CPU device by hand, on any target that this machine can execute."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.calls import Native
from cpu_fallback.maps import map_call
from cpu_fallback.native import LIBRARY, Target, host
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.words import Address

Array = NDArray[Any]
GUARD = 64
POISON = 0xA5


def targets() -> list[Target]:
    """The host, and the narrower machines whose code the host runs too."""
    own = host()
    found = [own]
    if own.vector_nbytes > 32:
        found.append(Target("haswell", "", 32, masked=False, halves=True))
    if own.vector_nbytes > 16 and own.halves:
        found.append(dataclasses.replace(Target("haswell", "", 16, masked=False, halves=True)))
    return found


def run_native(
    call: Native, arrays: Sequence[Array], target: Target, threads: int = 1, values: Mapping[str, int] | None = None
) -> None:
    """Run every thread's share of the call in turn; buffer i of the call is arrays[i]."""
    address = LIBRARY.addresses([call.kernel], target)[call.kernel]
    values = values or {}

    def number(dim: Dim) -> int:
        return evaluator([dim], list(values))(*values.values())[0]

    words = [
        arrays[word.buffer].ctypes.data + number(word.offset) if isinstance(word, Address) else number(word)
        for word in call.words
    ]
    block = np.array(words, np.int64)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
    for thread in range(threads):
        function(block.ctypes.data, thread, threads)


def guarded(shape: Sequence[int], dtype: Any) -> tuple[Array, Array]:
    """(an array full of poison, all its memory with guard bytes around it)."""
    count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.full(count + 2 * GUARD, POISON, np.uint8)
    return np.ndarray(tuple(shape), dtype, memory, GUARD), memory


def guards_hold(memory: Array) -> bool:
    return bool((memory[:GUARD] == POISON).all() and (memory[-GUARD:] == POISON).all())


def run_map(root: Expr, operands: Sequence[Array], target: Target, threads: int = 1) -> Array:
    """The expression over broadcast operands through a native kernel; fails if it writes outside the result."""
    shape = np.broadcast_shapes(*(array.shape for array in operands))
    out, memory = guarded(shape, root.dtype)
    found = map_call(root, [(i, array.shape) for i, array in enumerate(operands)], len(operands), shape)
    assert found is not None, f"no native form of {root}"
    run_native(found[0], [*operands, out], target, threads)
    assert guards_hold(memory)
    return out
