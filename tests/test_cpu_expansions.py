"""1x1 convolutions with the depthwise ones behind them in one kernel of the CPU device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from numpy.typing import NDArray

from cpu_fallback.caches import caches
from cpu_fallback.expanded_depthwise import ExpandedDepthwise, join_expansions, lower_expanded_depthwise
from cpu_fallback.native import Target, host
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, verify
from gpu_engine.ir.ops import Map
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.lower import Lowering
from tests.kernel_runner import guarded, guards_hold, run_native, targets
from tests.layer_runner import error, normal
from tests.reference import graph_of

Array = NDArray[Any]
S, B = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
EPILOGUES: tuple[Callable[[], Expr], ...] = (
    lambda: S + B,
    lambda: expr.clip(S + B, 0.0, 6.0),
    lambda: (S + B) * expr.sigmoid(S + B),
    lambda: (S + B) * expr.clip((S + B) * (1 / 6) + 0.5, 0, 1),
)


def value_of(array: Array, *, known: bool = False) -> Value:
    return Value(TensorType(FLOAT32, array.shape), array if known else None)


@composite
def pairs(draw: DrawFn) -> tuple[ExpandedDepthwise, list[Array]]:
    """Any size, stride, dilation and pads that differ or crop; batches, and images that are as small as can be."""

    def two(values: st.SearchStrategy[int]) -> tuple[int, int]:
        return draw(values), draw(values)

    kernel, strides = two(st.sampled_from([1, 2, 3, 3, 5, 5, 7])), two(st.integers(1, 3))
    dilations, before, after = two(st.sampled_from([1, 1, 2])), two(st.integers(-1, 3)), two(st.integers(-1, 3))
    reach = tuple((k - 1) * d + 1 - b - a for k, d, b, a in zip(kernel, dilations, before, after, strict=True))
    extents = tuple(max(1, least) + draw(st.integers(0, 33)) for least in reach)
    depth, channels, batch = draw(st.integers(1, 21)), draw(st.integers(1, 45)), draw(st.integers(0, 3))
    roots = [draw(st.sampled_from([None, *EPILOGUES])) for _ in range(2)]
    first, second = (None if root is None else root() for root in roots)
    op = ExpandedDepthwise(
        LastConv((1, 1), (0, 0), (0, 0), (1, 1), 1, first, False),
        LastConv(strides, before, after, dilations, channels, second, False),
        0 if first is None else 1,
    )
    weights = [normal(1, (channels, depth, 1, 1)), normal(2, (channels, 1, *kernel))]
    biases = [normal(3 + i, (1, 1, 1, channels)) for i, root in enumerate(roots) if root is not None]
    return op, [normal(0, (batch, *extents, depth)), *weights, *biases]


def run(op: ExpandedDepthwise, arrays: list[Array], target: Target, threads: int) -> Array:
    """The result; fails if the kernel writes where it must not."""
    values = [value_of(array, known=i in (1, 2)) for i, array in enumerate(arrays)]
    (kind,) = op.infer(*(value.type for value in values))
    node = Node(op, tuple(values), (Value(kind),), "test")
    lowering = Lowering(lambda *_: None)
    inputs = tuple(lowering.buffer(FLOAT32, array.shape) for array in arrays)
    out = lowering.buffer(FLOAT32, kind.shape)
    assert lower_expanded_depthwise(lowering, op, node, inputs, (out,), target)
    memory, guards = [], []
    for i, buffer in enumerate(lowering.buffers):
        array = buffer.constant
        if array is None:
            array, around = guarded(buffer.shape, buffer.dtype)  # type: ignore[arg-type]
            guards.append(around)
        if i in inputs:
            array[...] = arrays[inputs.index(i)]
        memory.append(array)
    run_native(lowering.steps[0].kernel, memory, target, threads)
    assert all(map(guards_hold, guards)), "the kernel wrote outside its buffers"
    return memory[out]


def oracle(op: ExpandedDepthwise, arrays: list[Array]) -> Array:
    """Sums in float64; epilogues in float32."""
    x, w, taps, *biases = arrays
    for conv, weights, count in ((op.first, w, op.operands), (op.second, taps, len(biases) - op.operands)):
        own, biases = biases[:count], biases[count:]
        with np.errstate(all="ignore"):
            plain = LastConv(
                conv.strides, conv.before, conv.after, conv.dilations, conv.group, None, False
            )  # fmt: skip
            (x,) = plain.evaluate(np, x.astype(np.float64), weights.astype(np.float64))
            x = x if conv.epilogue is None else Map(conv.epilogue).evaluate(np, x.astype(np.float32), *own)[0]
    return x


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes}")
@given(pair=pairs(), team=st.sampled_from([1, 2, 3, 5]))
@settings(max_examples=60, deadline=None)
def test_pairs(target: Target, pair: tuple[ExpandedDepthwise, list[Array]], team: int) -> None:
    assert error(run(*pair, target, team), oracle(*pair)) < 6e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_values_that_are_no_numbers(kernel: int, stride: int) -> None:
    """Infinities and NaN reach what windows over them reach, and nothing that other rows of the ring held."""
    pads = (kernel // 2,) * 2
    op = ExpandedDepthwise(
        LastConv((1, 1), (0, 0), (0, 0), (1, 1), 1, None, False),
        LastConv((stride,) * 2, pads, pads, (1, 1), 20, None, False), 0,
    )  # fmt: skip
    x = normal(0, (2, 19, 14, 9))
    x[0, 3, 4, 2], x[0, 18, 13, 0], x[1, 0, 0, 5] = np.nan, np.inf, -np.inf
    arrays = [x, np.abs(normal(1, (20, 9, 1, 1))), normal(2, (20, 1, kernel, kernel))]
    assert error(run(op, arrays, host(), 2), oracle(op, arrays)) < 6e-6


def pair_graph(height: dims.Dim, depth: int = 16, stride: int = 1, *, shared: bool = False) -> Graph:
    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        w, taps = b.constant(normal(1, (96, depth, 1, 1))), b.constant(normal(2, (96, 1, 3, 3)))
        bias = b.constant(normal(3, (1, 1, 1, 96)))
        root = expr.maximum(S + B, 0.0)
        made = b.emit(LastConv((1, 1), (0, 0), (0, 0), (1, 1), 1, root, False), x, w, bias)
        result = b.emit(LastConv((stride,) * 2, (1, 1), (1, 1), (1, 1), 96, root, False), made, taps, bias)
        return (result, made) if shared else (result,)

    return graph_of({"x": (1, height, 112, depth)}, build)


def joined(graph: Graph) -> bool:
    found = verify(join_expansions(graph, host()), "joined")
    return any(isinstance(node.op, ExpandedDepthwise) for node in found.nodes)


def test_large_tensors_between_them_join_a_pair() -> None:
    assert joined(pair_graph(112)) and joined(pair_graph(dims.symbol("H"), stride=2))
    assert not joined(pair_graph(112, shared=True)), "something else reads the tensor"
    assert not joined(pair_graph(4)), "the second cache keeps the tensor"
    assert not joined(pair_graph(112, 4 * caches().l2 // 96)), "weights are too large"
