"""The decomposed forms that exporters write become engine operations, and compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from gpu_engine.frontend.operators import activation
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import BOOL, FLOAT16, FLOAT32, FLOAT64, INT64, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.passes.activations import canonical
from gpu_engine.passes.pipeline import optimize
from tests.reference import assert_same, graph_of, kinds, optimized, pointwise

N, S = dims.symbol("N"), dims.symbol("S")
GENERATOR = np.random.default_rng(0)
SCALE, BIAS = GENERATOR.standard_normal(8).astype("f4"), GENERATOR.standard_normal(8).astype("f4")


def mean(b: Builder, x: Value, axes: tuple[int, ...] = (-1,), keepdims: bool = True) -> Value:
    return b.emit(ops.Reduce("mean", tuple(axis % x.rank for axis in axes), keepdims), x)


def add(b: Builder, x: Value, y: Value) -> Value:
    return pointwise(b, lambda s, t: s + t, x, y)


def sub(b: Builder, x: Value, y: Value) -> Value:
    return pointwise(b, lambda s, t: s - t, x, y)


def mul(b: Builder, x: Value, y: Value) -> Value:
    return pointwise(b, lambda s, t: s * t, x, y)


def div(b: Builder, x: Value, y: Value) -> Value:
    return pointwise(b, lambda s, t: s / t, x, y)


def eps(b: Builder, x: Value, epsilon: float = 1e-5) -> Value:
    return pointwise(b, lambda s: s + epsilon, x)


def sqrt(b: Builder, x: Value) -> Value:
    return pointwise(b, expr.sqrt, x)


def deviation(b: Builder, x: Value) -> Value:
    return sub(b, x, mean(b, x))


def by_root(b: Builder, x: Value) -> Value:
    d = deviation(b, x)
    return div(b, d, sqrt(b, eps(b, mean(b, pointwise(b, lambda s: s**2, d)))))


def by_reciprocal(b: Builder, x: Value) -> Value:
    d, again = deviation(b, x), deviation(b, x)
    root = sqrt(b, eps(b, mean(b, mul(b, again, again))))
    return mul(b, pointwise(b, lambda s: 1 / s, root), d)


def by_power(b: Builder, x: Value) -> Value:
    d = deviation(b, x)
    return mul(b, d, pointwise(b, lambda s: s**-0.5, eps(b, mean(b, mul(b, d, d)))))


def by_squares(b: Builder, x: Value) -> Value:
    return div(
        b, deviation(b, x), sqrt(b, eps(b, b.emit(ops.Reduce("mean", (x.rank - 1,), True, square()), deviation(b, x))))
    )


def square() -> Expr:
    return expr.arg(0, FLOAT32) * expr.arg(0, FLOAT32)


def by_sums(b: Builder, x: Value) -> Value:
    """The form of jax2tf: sums without axes, times 1 / count, mean of squares less square of mean, Reshape, Expand."""
    axis, count = x.rank - 1, x.shape[-1]
    assert isinstance(count, int)

    def average(value: Value) -> Value:
        return pointwise(b, lambda s: s * (1 / count), b.emit(ops.Reduce("sum", (axis,), False), value))

    def restored(value: Value) -> Value:
        return b.emit(ops.Expand((*x.shape[:-1], 1)), b.emit(ops.Reshape((*x.shape[:-1], 1)), value))

    middle, squares = average(x), average(mul(b, x, x))
    spread = pointwise(b, lambda s: expr.maximum(0.0, s), sub(b, squares, mul(b, middle, middle)))
    root = pointwise(b, lambda s: 1 / s, sqrt(b, eps(b, restored(spread), 1e-6)))
    return mul(b, sub(b, x, restored(middle)), mul(b, root, b.constant(SCALE.reshape(1, 8))))


NORMS: list[Callable[[Builder, Value], Value]] = [by_root, by_reciprocal, by_power, by_squares, by_sums]


@pytest.mark.parametrize("form", NORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_layer_norm(form: Callable[[Builder, Value], Value], affine: bool) -> None:
    def build(b: Builder, x: Value) -> Value:
        result = form(b, x)
        if not affine:
            return result
        scaled = result if form is by_sums else mul(b, result, b.constant(SCALE))
        return add(b, b.constant(BIAS), scaled)

    graph = optimized(graph_of({"x": (N, S, 8)}, build), N=2, S=3)
    assert kinds(graph) == ["LayerNorm"]
    assert len(graph.nodes[0].inputs) == 1 + 2 * affine + (form is by_sums and not affine)


def test_layer_norm_over_two_axes() -> None:
    def build(b: Builder, x: Value) -> Value:
        d = sub(b, x, mean(b, x, (-2, -1)))
        return div(b, d, sqrt(b, eps(b, mean(b, mul(b, d, d), (-2, -1)))))

    graph = optimized(graph_of({"x": (N, 3, 8)}, build), N=2)
    assert [node.op for node in graph.nodes] == [ops.LayerNorm(1, float(np.float32(1e-5)))]


def test_rms_norm_and_what_follows() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        root = sqrt(b, eps(b, mean(b, mul(b, x, x))))
        return add(b, mul(b, b.constant(SCALE), mul(b, x, pointwise(b, lambda s: 1 / s, root))), y)

    graph = optimized(graph_of({"x": (N, 8), "y": (N, 8)}, build), N=3)
    assert kinds(graph) == ["LayerNorm", "Map"]
    assert graph.nodes[0].op == ops.LayerNorm(1, float(np.float32(1e-5)), centered=False)


def test_a_norm_over_a_leading_axis_is_left_alone() -> None:
    def build(b: Builder, x: Value) -> Value:
        d = sub(b, x, mean(b, x, (1,)))
        return div(b, d, sqrt(b, eps(b, mean(b, mul(b, d, d), (1,)))))

    assert "LayerNorm" not in kinds(optimized(graph_of({"x": (N, 8, 5)}, build), N=2))


@pytest.mark.parametrize("wrong", ["other mean", "other x", "not the count"])
def test_what_only_looks_like_a_norm_is_left_alone(wrong: str) -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        d = deviation(b, y if wrong == "other x" else x)
        e = sub(b, x, mean(b, y if wrong == "other mean" else x))
        spread = mean(b, mul(b, e, e))
        if wrong == "not the count":
            spread = pointwise(b, lambda s: s * (1 / 7), b.emit(ops.Reduce("sum", (1,), True), mul(b, e, e)))
        return div(b, d, sqrt(b, eps(b, spread)))

    assert "LayerNorm" not in kinds(optimized(graph_of({"x": (3, 8), "y": (3, 8)}, build)))


def test_a_scale_along_a_leading_axis_stays_outside() -> None:
    def build(b: Builder, x: Value, scale: Value) -> Value:
        return mul(b, by_root(b, x), scale)

    assert kinds(optimized(graph_of({"x": (4, 8), "scale": (4, 1)}, build))) == ["LayerNorm", "Map"]


def decomposed_softmax(b: Builder, x: Value, axis: int, keepdims: bool = True, log: bool = False) -> Value:
    def restored(value: Value) -> Value:
        if keepdims:
            return value
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        bounded = pointwise(b, lambda s: expr.maximum(-math.inf, s), value)
        return b.emit(ops.Expand(shape), b.emit(ops.Reshape(shape), bounded))

    shifted = sub(b, x, restored(b.emit(ops.Reduce("max", (axis,), keepdims), x)))
    exponential = pointwise(b, expr.exp, shifted)
    total = b.emit(ops.Reduce("sum", (axis,), keepdims), exponential)
    if log:
        return sub(b, shifted, pointwise(b, expr.log, total))
    return div(
        b, exponential, total if keepdims else b.emit(ops.Reshape((*x.shape[:axis], 1, *x.shape[axis + 1 :])), total)
    )


@pytest.mark.parametrize(
    ("axis", "keepdims", "log"), [(1, True, False), (0, True, False), (1, False, False), (1, True, True)]
)
def test_softmax(axis: int, keepdims: bool, log: bool) -> None:
    graph = graph_of({"x": (N, S)}, lambda b, x: decomposed_softmax(b, x, axis, keepdims, log))
    assert [node.op for node in optimized(graph, N=3, S=5).nodes] == [ops.Softmax(axis, log)]


def test_softmax_of_infinities_stays_the_same() -> None:
    graph = graph_of({"x": (N, S)}, lambda b, x: decomposed_softmax(b, x, 1))
    x = np.array([[np.inf, 0], [-np.inf, -np.inf], [np.nan, 1], [-np.inf, 3]], "f4")
    assert_same(graph, optimize(graph), {"x": x})


def test_softmax_needs_the_sum_of_its_own_exponentials() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        shifted = sub(b, x, b.emit(ops.Reduce("max", (1,), True), y))
        exponential = pointwise(b, expr.exp, shifted)
        return div(b, exponential, b.emit(ops.Reduce("sum", (1,), True), exponential))

    assert "Softmax" not in kinds(optimized(graph_of({"x": (3, 5), "y": (3, 5)}, build)))


def gelu_forms(x: Expr) -> list[Expr]:
    bell = expr.erf(x / 1.4142135381698608)
    return [
        x * 0.5 * (1 + bell), x * ((bell + 1) * 0.5), (x * (1 + bell)) * 0.5, 0.5 * x + 0.5 * (x * bell),
        x * (0.5 + 0.5 * expr.erf(0.70710677 * x)), (1 + bell) * x / 2,
    ]  # fmt: skip


def gelu_tanh_forms(x: Expr) -> list[Expr]:
    k = 0.7978845834732056
    return [
        0.5 * x * (1 + expr.tanh(k * (x + 0.044714998453855515 * (x * (x * x))))),
        x * (0.5 * (expr.tanh((x + x * x * x * 0.044715) * k) + 1)),
        x * (1 + expr.tanh(k * (x * (1 + 0.044715 * (x * x))))) * 0.5,
    ]


def silu_forms(x: Expr) -> list[Expr]:
    return [x * expr.sigmoid(x), expr.sigmoid(x) * x, x / (1 + expr.exp(-x)), x / (expr.exp(-1.0 * x) + 1)]


def hard_swish_forms(x: Expr) -> list[Expr]:
    return [
        x * expr.clip(x + 3, 0, 6) / 6, x * (expr.clip(3 + x, 0, 6) * 0.16666667), expr.clip(x / 6 + 0.5, 0, 1) * x,
        x * expr.minimum(6, expr.maximum(0, x + 3)) / 6, x * expr.maximum(expr.minimum(x + 3, 6), 0) / 6,
        x * expr.clip(0.16666670143604279 * x + 0.5, 0, 1),
    ]  # fmt: skip


DIRECT: dict[str, tuple[Callable[[Expr], list[Expr]], Callable[[Expr], Expr]]] = {
    "gelu": (gelu_forms, activation.gelu),
    "gelu_tanh": (gelu_tanh_forms, partial(activation.gelu, approximate="tanh")),
    "silu": (silu_forms, activation.swish),
    "hard_swish": (hard_swish_forms, activation.hard_swish),
}
INNER: dict[str, Callable[[Expr, Expr], Expr]] = {
    "x": lambda x, y: x,
    "x + y": lambda x, y: x + y,
    "x * y": lambda x, y: x * y,
}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_activations_are_one_expression(name: str, dtype: DType, inner: str) -> None:
    forms, direct = DIRECT[name]
    x, y = INNER[inner](expr.arg(0, dtype), expr.arg(1, dtype)), expr.arg(1, dtype)
    for form in forms(x):
        assert canonical(form) is direct(x), form
        assert canonical(form * 3 + y) is direct(x) * 3 + y, form
        assert canonical(direct(x)) is direct(x)


OTHERS: list[Callable[[Expr, Expr], Expr]] = [
    lambda x, y: x * expr.sigmoid(1.702 * x),
    lambda x, y: y * expr.sigmoid(x),
    lambda x, y: x * expr.clip(x + 3, 0, 5) / 5,
    lambda x, y: x * expr.clip(x + 3, 0, 6) / 5,
    lambda x, y: x * expr.clip(x + 3, 1, 6) / 6,
    lambda x, y: 0.5 * x * (1 + expr.erf(y * 0.70710677)),
    lambda x, y: 0.5 * x * (1 + expr.tanh(x)),
    lambda x, y: expr.maximum(x, 0),
]


@pytest.mark.parametrize("form", OTHERS)
def test_other_activations_stay_as_they_are(form: Callable[[Expr, Expr], Expr]) -> None:
    built = form(expr.arg(0, FLOAT32), expr.arg(1, FLOAT32))
    assert canonical(built) is built


def test_constants_of_doubles_must_be_exact() -> None:
    x = expr.arg(0, FLOAT64)
    rounded = 0.5 * x * (1 + expr.erf(x / 1.4142135381698608))
    assert canonical(rounded) is rounded
    assert canonical(x * 0.5 * (1 + expr.erf(x / math.sqrt(2)))) is activation.gelu(x)


def test_an_activation_of_many_nodes_joins_the_product() -> None:
    def build(b: Builder, x: Value) -> Value:
        v = add(b, b.emit(ops.MatMul(), x, b.constant(np.ones((8, 8), "f4"))), b.constant(BIAS))
        bell = pointwise(b, expr.erf, pointwise(b, lambda s: s / 1.4142135381698608, v))
        return pointwise(b, lambda s: s * 0.5, mul(b, v, pointwise(b, lambda s: s + 1, bell)))

    graph = optimized(graph_of({"x": (N, 8)}, build), N=2)
    (node,) = graph.nodes
    assert node.op == ops.MatMul(epilogue=activation.gelu(expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32)))


@pytest.mark.parametrize("places", [(0, 3), (3, 0)], ids=str)
def test_gathers_at_counted_coordinates_move_nothing(places: tuple[int, int]) -> None:
    """The mask of a vectorised export: x[batch, key] through GatherND, and a test that no index is negative."""

    def build(b: Builder, x: Value) -> Value:
        def coordinate(extent: dims.Dim, axis: int) -> Value:
            shape = tuple(extent if i == axis else 1 for i in range(4))
            counted = b.emit(ops.Reshape(shape), b.emit(ops.Iota(extent, INT64)))
            return b.emit(ops.Reshape((N, 1, 1, S, 1)), b.emit(ops.Expand((N, 1, 1, S)), counted))

        parts = (coordinate(N if place == 0 else S, place) for place in places)
        picked = b.emit(ops.GatherND(0), x, b.emit(ops.Concat(4), *parts))
        queries = b.emit(ops.Reshape((1, 1, S, 1)), b.emit(ops.Iota(S, INT64)))
        valid = pointwise(b, lambda i, m: (i >= 0) & m, queries, picked)
        return pointwise(b, lambda m: expr.where(m, expr.const(0.0, FLOAT32), -math.inf), valid)

    shape = (N, S) if places == (0, 3) else (S, N)
    graph = optimized(graph_of({"x": (BOOL, shape)}, build), N=3, S=4)
    assert [kind for kind in kinds(graph) if kind != "Transpose"] == ["Reshape", "Map", "Expand"]


def test_one_hot_products_are_gathers() -> None:
    table = GENERATOR.standard_normal((6, 3)).astype("f4")

    def build(b: Builder, ids: Value) -> Value:
        wide = b.emit(ops.Expand((N, 4, 1)), b.emit(ops.Reshape((N, 4, 1)), ids))
        hot = pointwise(b, expr.equal, wide, b.constant(np.arange(6).reshape(1, 1, 6)))
        return b.emit(ops.MatMul(), pointwise(b, lambda s: expr.cast(s, FLOAT32), hot), b.constant(table))

    graph = graph_of({"ids": (INT64, (N, 4))}, build)
    result = optimize(graph)
    assert kinds(result) == ["Map", "Gather"]
    assert_same(graph, result, {"ids": np.array([[0, 5, 6, -1], [2, 2, 99, 1]])})
