"""Pointwise fusion, map by map and in three small models whose optimised graphs are golden texts.

`python -m tests.test_fusion` writes the texts anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT32, INT64
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Value, verify
from gpu_engine.passes.fusion import fuse_pointwise
from gpu_engine.passes.operands import MAX_NODES, MAX_OPERANDS
from gpu_engine.passes.pipeline import optimize
from tests.reference import assert_same, graph_of, kinds, optimized, pointwise, random_inputs

GOLDEN = Path(__file__).parent / "golden"
N, S = dims.symbol("N"), dims.symbol("S")
GENERATOR = np.random.default_rng(1)


def weights(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype("f4")


def passed(transform: Callable[[Graph], Graph], graph: Graph, **extents: int) -> Graph:
    """The graph after one pass, once it is shown to compute what the graph does."""
    result = verify(transform(graph), transform.__name__)
    assert_same(graph, result, random_inputs(graph, **extents))
    return result


def relu(x: Expr) -> Expr:
    return expr.maximum(x, 0)


def sub_one(x: Expr) -> Expr:
    return x - 1


def conv(b: Builder, x: Value, w: Any, *, pads: int = 1, group: int = 1) -> Value:
    op = ops.Conv((1, 1), (pads, pads), (pads, pads), (1, 1), group)
    return b.emit(op, x, b.constant(w))


def normalized(b: Builder, x: Value, channels: int) -> Value:
    """BatchNormalization as it is written out."""
    scale, bias, middle, spread = (b.constant(weights(channels, 1, 1)) for _ in range(4))
    spread = pointwise(b, abs, spread)
    return pointwise(
        b, lambda s, m, v, g, c: (s - m) / expr.sqrt(v + 1e-5) * g + c, x, middle, spread, scale, bias
    )  # fmt: skip


def test_chains_become_one_map() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        value = pointwise(b, lambda s, t: expr.exp(s) * t, x, y)
        left, right = pointwise(b, expr.tanh, value), pointwise(b, expr.sin, value)
        return pointwise(b, lambda s, t: s - t, left, right)

    assert kinds(passed(fuse_pointwise, graph_of({"x": (N, S), "y": (S,)}, build), N=2, S=3)) == ["Map"]


def test_a_dear_map_with_two_users_is_stored() -> None:
    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        dear = pointwise(b, expr.exp, x)
        return b.emit(ops.Reduce("sum", (1,), True), dear), pointwise(b, sub_one, dear)

    assert kinds(passed(fuse_pointwise, graph_of({"x": (N, S)}, build), N=2, S=3)) == ["Map", "Reduce", "Map"]


def test_a_cheap_map_with_two_users_is_computed_twice() -> None:
    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        cheap = pointwise(b, relu, x)
        return b.emit(ops.Reduce("sum", (1,), True), cheap), pointwise(b, sub_one, cheap)

    assert kinds(passed(fuse_pointwise, graph_of({"x": (N, S)}, build), N=2, S=3)) == ["Reduce", "Map"]


def test_a_cheap_map_that_must_be_stored_anyway_is_computed_once() -> None:
    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        cheap = pointwise(b, relu, x)
        return cheap, pointwise(b, sub_one, cheap)

    assert kinds(passed(fuse_pointwise, graph_of({"x": (N, S)}, build), N=2, S=3)) == ["Map", "Map"]


@pytest.mark.parametrize(("function", "expected"), [(expr.exp, ["Map", "Map"]), (sub_one, ["Map"])])
def test_a_small_map_is_not_computed_over_more_elements(function: Callable[[Expr], Expr], expected: list[str]) -> None:
    def build(b: Builder, x: Value, gate: Value) -> Value:
        return pointwise(b, lambda s, t: s * t, x, pointwise(b, function, gate))

    graph = graph_of({"x": (N, 3, S), "gate": (N, 3, 1)}, build)
    assert kinds(passed(fuse_pointwise, graph, N=2, S=3)) == expected


def test_maps_around_a_reduction_join_it() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        total = b.emit(ops.Reduce("mean", (1,), True), pointwise(b, lambda s, t: expr.exp(s) * t, x, y))
        return pointwise(b, lambda s: expr.sqrt(abs(s)) + 1, total)

    (node,) = passed(fuse_pointwise, graph_of({"x": (N, S), "y": (N, 1)}, build), N=2, S=3).nodes
    assert isinstance(node.op, ops.Reduce) and node.op.before is not None and node.op.after is not None


def test_a_residual_block_is_its_convolutions() -> None:
    def build(b: Builder, x: Value) -> Value:
        first = pointwise(b, relu, normalized(b, conv(b, x, weights(4, 4, 3, 3)), 4))
        second = normalized(b, conv(b, first, weights(4, 4, 3, 3)), 4)
        return pointwise(b, relu, pointwise(b, lambda s, t: s + t, x, second))

    graph = optimized(graph_of({"x": (N, 4, S, S)}, build), N=2, S=5)
    assert kinds(graph) == ["Conv", "Conv"] and graph.inputs[0] in graph.nodes[1].inputs


def test_of_two_products_the_later_one_takes_the_sum() -> None:
    def build(b: Builder, x: Value) -> Value:
        first = b.emit(ops.MatMul(), x, b.constant(weights(4, 4)))
        second = b.emit(ops.MatMul(), x, b.constant(weights(4, 4)))
        return pointwise(b, lambda s, t: s - t, second, first)

    graph = passed(fuse_pointwise, graph_of({"x": (N, 4)}, build), N=2)
    assert kinds(graph) == ["MatMul", "MatMul"]
    assert graph.nodes[1].inputs[2] is graph.nodes[0].outputs[0]


def test_a_product_that_grows_by_broadcasting_takes_no_epilogue() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        return pointwise(b, lambda s, t: s + t, b.emit(ops.MatMul(), x, b.constant(weights(4, 4))), y)

    graph = graph_of({"x": (1, 4), "y": (N, 4)}, build)
    assert kinds(passed(fuse_pointwise, graph, N=3)) == ["MatMul", "Map"]


def test_a_product_with_another_user_takes_no_epilogue() -> None:
    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        value = b.emit(ops.MatMul(), x, b.constant(weights(4, 4)))
        return value, pointwise(b, expr.exp, value)

    assert kinds(passed(fuse_pointwise, graph_of({"x": (N, 4)}, build), N=3)) == ["MatMul", "Map"]


RESHAPES: dict[str, tuple[tuple[Dim, ...], tuple[int, ...]]] = {
    "unit axis": ((N, 6, S, 1), (1, 6, 1, 1)),
    "trailing axes": ((N * 6, S), ()),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_epilogues_from_behind_a_reshape(name: str) -> None:
    shape, bias = RESHAPES[name]

    def build(b: Builder, x: Value) -> Value:
        product = b.emit(ops.Conv((1,), (1,), (1,), (1,)), x, b.constant(weights(6, 4, 3)))
        value = b.emit(ops.Reshape(shape), product)
        return pointwise(b, lambda s, t: relu(s + t), value, b.constant(weights(*bias)))

    assert kinds(optimized(graph_of({"x": (N, 4, S)}, build), N=2, S=5)) == ["Conv", "Reshape"]


def test_maps_on_both_sides_of_a_reshape_are_one() -> None:
    def build(b: Builder, x: Value) -> Value:
        return pointwise(b, expr.tanh, b.emit(ops.Reshape((N, 2 * S)), pointwise(b, expr.exp, x)))

    assert kinds(optimized(graph_of({"x": (N, 2, S)}, build), N=2, S=5)) == ["Map", "Reshape"]


def test_integer_products_take_the_dequantising_map() -> None:
    def build(b: Builder, x: Value) -> Value:
        table = b.constant(GENERATOR.integers(-128, 128, (4, 3)).astype("i1"))
        product = b.emit(ops.MatMul(accumulate=INT32), x, table)
        return pointwise(b, lambda s, t: expr.cast(s, FLOAT32) * t, product, b.constant(weights(3)))

    (node,) = optimized(graph_of({"x": (INT8, (N, 4))}, build), N=2).nodes
    assert isinstance(node.op, ops.MatMul) and node.outputs[0].dtype == FLOAT32


def test_fused_kernels_stay_compilable() -> None:
    def build(b: Builder, *inputs: Value) -> Value:
        value = inputs[0]
        for i in range(120):
            value = pointwise(b, lambda s, t: expr.sin(s) * t, value, inputs[i % len(inputs)])
        return value

    graph = optimized(graph_of({f"x{i}": (N, 3) for i in range(12)}, build), N=2)
    assert 120 * 3 / MAX_NODES < len(graph.nodes) < 60
    for node in graph.nodes:
        assert isinstance(node.op, ops.Map)
        assert len(node.inputs) <= MAX_OPERANDS and len(expr.walk(node.op.expr)) <= MAX_NODES


def attention_layer(b: Builder, x: Value, mask: Value) -> Value:
    """One layer of a transformer encoder as exporters write it."""

    def linear(value: Value, wide: int) -> Value:
        inner = value.shape[-1]
        assert isinstance(inner, int)
        product = b.emit(ops.MatMul(), value, b.constant(weights(inner, wide)))
        return pointwise(b, lambda s, t: s + t, product, b.constant(weights(wide)))

    def heads(value: Value, perm: tuple[int, ...]) -> Value:
        return b.emit(ops.Transpose(perm), b.emit(ops.Reshape((N, S, 2, 4)), linear(value, 8)))

    q, k, v = (heads(x, perm) for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)))
    hidden = pointwise(b, lambda m: (1 - expr.cast(m, FLOAT32)) * -1e9, b.emit(ops.Reshape((N, 1, 1, S)), mask))
    scores = pointwise(b, lambda s, m: s / 2 + m, b.emit(ops.MatMul(), q, k), hidden)
    mixed = b.emit(ops.Transpose((0, 2, 1, 3)), b.emit(ops.MatMul(), b.emit(ops.Softmax(3), scores), v))
    x = pointwise(b, lambda s, t: s + t, x, linear(b.emit(ops.Reshape((N, S, 8)), mixed), 8))
    d = pointwise(b, lambda s, m: s - m, x, b.emit(ops.Reduce("mean", (2,), True), x))
    spread = b.emit(ops.Reduce("mean", (2,), True), pointwise(b, lambda s: s**2, d))
    x = pointwise(b, lambda s, v: s / expr.sqrt(v + 1e-5), d, spread)
    wide = linear(x, 16)
    bell = pointwise(b, lambda s: expr.erf(s / math.sqrt(2)), wide)
    wide = pointwise(b, lambda s, t: s * (t + 1) * 0.5, wide, bell)
    return pointwise(b, lambda s, t: s + t, linear(wide, 8), x)


def residual_network(b: Builder, x: Value) -> Value:
    stem = pointwise(b, relu, normalized(b, conv(b, x, weights(4, 3, 3, 3)), 4))
    body = normalized(b, conv(b, stem, weights(4, 4, 3, 3)), 4)
    joined = pointwise(b, lambda s, t: expr.maximum(s + t, 0), body, stem)
    pooled = b.emit(ops.Reshape((N, 4)), b.emit(ops.Reduce("mean", (2, 3), True), joined))
    logits = b.emit(ops.MatMul(), pooled, b.constant(weights(4, 5)))
    return b.emit(ops.Softmax(1), pointwise(b, lambda s, t: s + t, logits, b.constant(weights(5))))


def gated_block(b: Builder, x: Value) -> Value:
    """Squeeze and excitation with hard-swish, all written out."""
    value = conv(b, x, weights(4, 3, 1, 1), pads=0)
    three = pointwise(b, lambda s: expr.clip(s + 3, 0, 6), value)
    value = pointwise(b, lambda s, t: s * t / 6, value, three)
    squeezed = conv(b, b.emit(ops.Reduce("mean", (2, 3), True), value), weights(4, 4, 1, 1), pads=0)
    return pointwise(b, lambda s, t: s * t, value, pointwise(b, expr.sigmoid, squeezed))


MODELS: dict[str, tuple[dict[str, Any], Callable[..., Value]]] = {
    "attention_layer": ({"x": (N, S, 8), "mask": (INT64, (N, S))}, attention_layer),
    "residual_network": ({"x": (N, 3, S, S)}, residual_network),
    "gated_block": ({"x": (N, 3, S, S)}, gated_block),
}


@pytest.mark.parametrize("name", MODELS)
def test_golden_text(name: str) -> None:
    graph = optimized(graph_of(*MODELS[name]), N=2, S=4)
    assert str(graph) + "\n" == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for title, model in MODELS.items():
        (GOLDEN / f"{title}.txt").write_text(str(optimize(graph_of(*model))) + "\n")
