"""Random graphs compute the same when optimised, and in batches where batching is proven."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Value
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from tests.reference import assert_batches, assert_same, graph_of, pointwise, random_inputs

N = dims.symbol("N")
GENERATOR = np.random.default_rng(1)


def weights(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype("f4")


def relu(x: Expr) -> Expr:
    return expr.maximum(x, 0)


def sub_one(x: Expr) -> Expr:
    return x - 1


EXTENTS: tuple[Dim, ...] = (N, 2, 3, 4, 1)


@st.composite
def random_graphs(draw: st.DrawFn, batched: bool = False) -> Graph:
    """Some ten operations over float32 tensors with a symbolic extent, which comes first if `batched`."""
    extents = draw(st.permutations(EXTENTS))
    extents.sort(key=lambda extent: batched and extent is not N)
    shape = tuple(extents[: draw(st.integers(2, 4))])

    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        values = [x]
        for _ in range(draw(st.integers(2, 11))):
            values.append(random_step(draw, b, draw(st.sampled_from(values[-3:])), values))
        return (*draw(st.lists(st.sampled_from(values), min_size=1, max_size=2)), values[-1])

    return graph_of({"x": shape}, build)


def random_step(draw: st.DrawFn, b: Builder, x: Value, values: list[Value]) -> Value:
    axes = range(x.rank)
    match draw(st.sampled_from(("unary", "binary", "constant", "reduce", "transpose", "reshape", "product", "other"))):
        case "binary":
            partners = [value for value in values if value.shape == x.shape]
            function = draw(st.sampled_from(BINARY))
            return pointwise(b, function, x, draw(st.sampled_from(partners)))
        case "constant":
            extents = [extent if isinstance(extent, int) and draw(st.booleans()) else 1 for extent in x.shape]
            cut = draw(st.integers(0, x.rank))
            return pointwise(b, draw(st.sampled_from(BINARY)), x, b.constant(weights(*extents[cut:])))
        case "reduce" if x.rank > 1:
            folded = tuple(sorted(draw(st.sets(st.sampled_from(axes), min_size=1, max_size=x.rank - 1))))
            op = ops.Reduce(draw(st.sampled_from(("sum", "mean", "max"))), folded, draw(st.booleans()))
            return b.emit(op, x)
        case "transpose":
            return b.emit(ops.Transpose(tuple(draw(st.permutations(axes)))), x)
        case "reshape":
            return b.emit(ops.Reshape(random_shape(draw, x.shape)), x)
        case "product" if x.rank > 1:
            return random_product(draw, b, x)
        case "other" if x.rank:
            axis = draw(st.sampled_from(axes))
            whole = b.emit(draw(st.sampled_from((ops.Softmax(axis), ops.LayerNorm(axis, 1e-3)))), x)
            extent = x.shape[axis]
            if isinstance(extent, int) and draw(st.booleans()):
                return b.emit(ops.Gather(axis), whole, b.constant(np.array(extent - 1)))
            return whole
    return pointwise(b, draw(st.sampled_from(UNARY)), x)


UNARY: list[Callable[[Expr], Expr]] = [
    expr.tanh, expr.sigmoid, relu, abs, sub_one, lambda s: s * 0.5, lambda s: 0.5 * s * (1 + expr.erf(s / math.sqrt(2)))
]  # fmt: skip
BINARY: list[Callable[[Expr, Expr], Expr]] = [
    lambda s, t: s + t, lambda s, t: s - t, lambda s, t: expr.tanh(s) * expr.tanh(t), expr.maximum,
    lambda s, t: expr.where(s < t, s, t + 1),
]  # fmt: skip


def random_shape(draw: st.DrawFn, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape with two neighbours merged, or an axis of extent 1 put in or taken out."""
    if len(shape) > 1 and draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 2))
        return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    if 1 in shape and draw(st.booleans()):
        axis = shape.index(1)
        return shape[:axis] + shape[axis + 1 :]
    axis = draw(st.integers(0, len(shape)))
    return (*shape[:axis], 1, *shape[axis:]) if len(shape) < 5 else shape


def random_product(draw: st.DrawFn, b: Builder, x: Value) -> Value:
    """x times constant weights, or times its own transpose."""
    inner = x.shape[-1]
    if isinstance(inner, int) and draw(st.booleans()):
        return b.emit(ops.MatMul(), x, b.constant(weights(inner, 3) / inner))
    order = (*range(x.rank - 2), x.rank - 1, x.rank - 2)
    return pointwise(b, expr.tanh, b.emit(ops.MatMul(), x, b.emit(ops.Transpose(order), x)))


@settings(max_examples=150)
@given(random_graphs(), st.integers(1, 3))
def test_random_graphs_stay_the_same(graph: Graph, extent: int) -> None:
    result = optimize(graph)
    assert_same(graph, result, random_inputs(graph, N=extent), rtol=2e-3, atol=2e-4)


@settings(max_examples=150)
@given(random_graphs(batched=True))
def test_proven_batches_equal_their_rows(graph: Graph) -> None:
    for form in (graph, optimize(graph)):
        if not prove(form).refused:
            assert_batches(form, 3, rtol=2e-3, atol=2e-4)
