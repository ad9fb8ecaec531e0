"""Lowers one node by hand, for any target, and runs its native steps in poisoned memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cpu_fallback.calls import Native
from cpu_fallback.lowering import lower_node
from cpu_fallback.native import LIBRARY, Target
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.graph import Node, Op, TensorType, Value
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address
from tests.kernel_runner import GUARD, Array, guarded, guards_hold, run_native

Emit = Callable[[Lowering, Any, Node, tuple[int, ...], tuple[int, ...], Target], bool]


def run_node(
    emit: Emit,
    op: Op,
    operands: Sequence[Array],
    target: Target,
    *,
    threads: int = 1,
    at_once: bool = False,
    constants: Collection[int] = (),
    shapes: Mapping[int, tuple[Dim, ...]] | None = None,
    values: Mapping[str, int] | None = None,
    result: DType | None = None,
) -> Array:
    """The first result of `op`, lowered by `emit`; fails if a step writes outside its buffers.

    Operands named by `constants` are known when lowering; `shapes` gives symbolic shapes to others, `values` their
    symbols. All memory that steps write is full of NaN before. Threads take turns, or run `at_once`.
    """
    kinds = [TensorType(array.dtype, (shapes or {}).get(i, array.shape)) for i, array in enumerate(operands)]
    known = [array if i in constants else None for i, array in enumerate(operands)]
    inputs = tuple(map(Value, kinds, known))
    outputs = tuple(map(Value, op.infer(*kinds)))
    node = Node(op, inputs, outputs, "a node")
    lowering = Lowering(lower_node)
    numbers = tuple(map(lowering.number, inputs))
    out = lowering.number(outputs[0])
    assert emit(lowering, op, node, numbers, (out,), target), f"{op} of {kinds} has no native form"
    memories = []
    arrays = dict(zip(numbers, map(np.ascontiguousarray, operands), strict=True))
    for i, buffer in enumerate(lowering.buffers):
        if i not in arrays and buffer.constant is not None:
            arrays[i] = buffer.constant
        elif i not in arrays:
            extents = evaluator(list(buffer.shape), list(values or {}))(*(values or {}).values())
            arrays[i], memory = guarded(extents, buffer.dtype)
            memory[GUARD:-GUARD] = 0xFF
            memories.append(memory)
    before = [operand.copy() for operand in operands]
    for step in lowering.steps:
        assert isinstance(step.kernel, Native)
        run = run_together if at_once else run_native
        run(step.kernel, arrays, target, threads, values)  # type: ignore[operator]
    assert all(map(guards_hold, memories)), "a step wrote outside its buffers"
    for own, copy in zip(operands, before, strict=True):
        np.testing.assert_array_equal(own, copy)
    return arrays[out]


def run_together(
    call: Native, arrays: Mapping[int, Array], target: Target, threads: int, values: Mapping[str, int] | None
) -> None:
    """Run all threads' shares of the call at the same time."""
    address = LIBRARY.addresses([call.kernel], target)[call.kernel]
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
    numbers = evaluator([word for word in call.words if not isinstance(word, Address)], list(values or {}))
    found = iter(numbers(*(values or {}).values()))
    words = []
    for word in call.words:
        if isinstance(word, Address):
            (offset,) = evaluator([word.offset], list(values or {}))(*(values or {}).values())
            words.append(arrays[word.buffer].ctypes.data + offset)
        else:
            words.append(next(found))
    block = np.array(words, np.int64)
    started = threading.Barrier(threads)

    def share(thread: int) -> None:
        started.wait()
        function(block.ctypes.data, thread, threads)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
