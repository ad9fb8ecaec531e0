"""1x1 convolutions of scaled images in one kernel of the CPU device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from numpy.typing import NDArray

from cpu_fallback.gated_conv import GatedConv, join_gates, lower_gated_conv
from cpu_fallback.native import Target, host
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, verify
from gpu_engine.ir.ops import Map
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.lower import Lowering
from tests.kernel_runner import guarded, guards_hold, run_native, targets
from tests.layer_runner import error, normal
from tests.reference import graph_of, pointwise

Array = NDArray[Any]
S, B, R = (expr.arg(i, FLOAT32) for i in range(3))
EPILOGUES = (None, S + B, expr.maximum(S + B + R, 0.0))
UNIT = LastConv((1, 1), (0, 0), (0, 0), (1, 1), 1, None, False)


@composite
def gated(draw: DrawFn) -> tuple[GatedConv, list[Array]]:
    """Any size; tiles that reach from one image into the next, or over several."""
    batch, depth, outputs = draw(st.integers(0, 5)), draw(st.integers(1, 70)), draw(st.integers(1, 45))
    extents = draw(st.integers(1, 23)), draw(st.integers(1, 23))
    root = draw(st.sampled_from(EPILOGUES))
    given = [normal(0, (batch, *extents, depth)), normal(1, (outputs, depth, 1, 1)), normal(2, (batch, 1, 1, depth))]
    extras = [normal(3, (1, 1, 1, outputs)), normal(4, (batch, *extents, outputs))]
    count = EPILOGUES.index(root)
    return GatedConv(LastConv((1, 1), (0, 0), (0, 0), (1, 1), 1, root, False)), [*given, *extras[:count]]


def run(op: GatedConv, arrays: list[Array], target: Target, threads: int) -> Array:
    """The result; fails if the kernel writes where it must not."""
    values = [Value(TensorType(FLOAT32, a.shape), a if i == 1 else None) for i, a in enumerate(arrays)]
    (kind,) = op.infer(*(value.type for value in values))
    lowering = Lowering(lambda *_: None)
    inputs = tuple(lowering.buffer(FLOAT32, array.shape) for array in arrays)
    out = lowering.buffer(FLOAT32, kind.shape)
    assert lower_gated_conv(lowering, op, Node(op, tuple(values), (Value(kind),), "test"), inputs, (out,), target)
    memory, guards = [], []
    for i, buffer in enumerate(lowering.buffers):
        array = buffer.constant
        if array is None:
            array, around = guarded(buffer.shape, buffer.dtype)
            guards.append(around)
        if i in inputs:
            array[...] = arrays[inputs.index(i)]
        memory.append(array)
    run_native(lowering.steps[0].kernel, memory, target, threads)
    assert all(map(guards_hold, guards)), "the kernel wrote outside its buffers"
    return memory[out]


def oracle(op: GatedConv, arrays: list[Array]) -> Array:
    x, w, gate, *extras = arrays
    with np.errstate(all="ignore"):
        (product,) = UNIT.evaluate(np, x.astype(np.float64) * gate, w.astype(np.float64))
    root = op.conv.epilogue
    return product if root is None else Map(root).evaluate(np, product.astype(np.float32), *extras)[0]


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes}")
@given(case=gated(), team=st.sampled_from([1, 2, 3, 5]))
@settings(max_examples=50, deadline=None)
def test_gates(target: Target, case: tuple[GatedConv, list[Array]], team: int) -> None:
    assert error(run(*case, target, team), oracle(*case)) < 3e-6


def test_gates_that_are_no_numbers() -> None:
    op = GatedConv(UNIT)
    arrays = [normal(0, (3, 9, 11, 20)), np.abs(normal(1, (17, 20, 1, 1))), normal(2, (3, 1, 1, 20))]
    arrays[2][0, 0, 0, 3], arrays[0][2, 8, 10, 19], arrays[0][1, 0, 0, 0] = np.inf, np.nan, -np.inf
    assert error(run(op, arrays, host(), 2), oracle(op, arrays)) < 3e-6


def graph(extent: dims.Dim, gate: tuple[dims.Dim, ...], *, swapped: bool = False) -> Graph:
    def build(b: Builder, x: Value, factor: Value) -> Value:
        operands = (factor, x) if swapped else (x, factor)
        return b.emit(UNIT, pointwise(b, lambda s, t: s * t, *operands), b.constant(normal(1, (24, 96, 1, 1))))

    return graph_of({"x": (2, extent, 28, 96), "gate": gate}, build)


@pytest.mark.parametrize("swapped", [False, True])
def test_which_products_become_gates(swapped: bool) -> None:
    def count(found: Graph) -> int:
        return sum(isinstance(node.op, GatedConv) for node in verify(join_gates(found, host()), "gates").nodes)

    height = dims.symbol("H")
    assert count(graph(28, (2, 1, 1, 96), swapped=swapped)) == 1
    assert count(graph(height, (2, 1, 1, 96), swapped=swapped)) == 1
    assert count(graph(28, (1, 1, 1, 96), swapped=swapped)) == 0, "one gate for all images"
    assert count(graph(28, (2, 28, 28, 96), swapped=swapped)) == 0
