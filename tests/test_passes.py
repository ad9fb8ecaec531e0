"""Every pass but fusion and recognition, on the smallest graph that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import GpuEngineError
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import BOOL, FLOAT16, FLOAT32, INT8, INT32, INT64, UINT8
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value, verify
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.control import If
from gpu_engine.passes import pipeline
from gpu_engine.passes.casts import without_needless_casts
from gpu_engine.passes.cse import eliminate_common
from gpu_engine.passes.padding import absorb_padding
from gpu_engine.passes.pipeline import optimize
from gpu_engine.passes.scales import fold_scales
from gpu_engine.passes.simplify import simplify
from gpu_engine.passes.transposes import clean_transposes
from tests.reference import assert_same, graph_of, kinds, optimized, pointwise, random_inputs, run_graph

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


IDENTITIES: dict[str, tuple[Any, Callable[[Builder, Value], Value]]] = {
    "reshape": ((N, 4), lambda b, x: b.emit(ops.Reshape((N, 4)), x)),
    "reshape and back": ((N, 4), lambda b, x: b.emit(ops.Reshape((N, 4)), b.emit(ops.Reshape((4 * N,)), x))),
    "transpose": ((N, 4), lambda b, x: b.emit(ops.Transpose((0, 1)), x)),
    "transpose and back": (
        (N, 4, S),
        lambda b, x: b.emit(ops.Transpose((1, 2, 0)), b.emit(ops.Transpose((2, 0, 1)), x)),
    ),
    "expand": ((N, 4), lambda b, x: b.emit(ops.Expand((N, 4)), x)),
    "concat of one": ((N, 4), lambda b, x: b.emit(ops.Concat(1), x)),
    "concat with nothing": ((N, 4), lambda b, x: b.emit(ops.Concat(1), x, b.constant(np.zeros((2, 0), "f4")))),
    "slice of everything": ((N, 4), lambda b, x: b.emit(ops.Slice((0, 0), (1, 1), (N, 4)), x)),
    "pad of nothing": ((N, 4), lambda b, x: b.emit(ops.Pad((0, 0), (0, 0)), x)),
    "reduction of one": ((N, 1), lambda b, x: b.emit(ops.Reduce("mean", (1,), True), x)),
    "times one": ((N, 4), lambda b, x: pointwise(b, lambda s, t: s * t, x, b.constant(np.ones((1, 1), "f4")))),
    "cast there and back": (
        (FLOAT16, (N, 4)),
        lambda b, x: pointwise(b, lambda s: expr.cast(expr.cast(s, FLOAT32), FLOAT16), x),
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_vanish(name: str) -> None:
    shape, build = IDENTITIES[name]
    graph = optimized(graph_of({"x": shape}, build), N=2, S=3)
    assert graph.outputs == graph.inputs and not graph.nodes


def test_moving_extents_of_one_is_a_reshape() -> None:
    graph = graph_of({"x": (N, 1, 4, 1)}, lambda b, x: b.emit(ops.Transpose((1, 0, 3, 2)), x))
    assert kinds(passed(simplify, graph, N=3)) == ["Reshape"]


def test_gathering_one_index_is_a_slice() -> None:
    graph = graph_of({"x": (N, 5)}, lambda b, x: b.emit(ops.Gather(1), x, b.constant(np.array(-2))))
    assert kinds(passed(simplify, graph, N=3)) == ["Slice", "Reshape"]


def test_gathering_a_bad_index_stays_an_error_at_run_time() -> None:
    graph = graph_of({"x": (N, 5)}, lambda b, x: b.emit(ops.Gather(1), x, b.constant(np.array(5))))
    assert kinds(simplify(graph)) == ["Gather"]


def test_maps_read_before_the_expand() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        wide = b.emit(ops.Expand((N, S, 4)), x)
        return pointwise(b, lambda s, t: s + t, pointwise(b, relu, wide), y)

    graph = passed(simplify, graph_of({"x": (N, 1, 4), "y": (N, S, 4)}, build), N=2, S=3)
    assert [(type(node.op).__name__, node.outputs[0].shape) for node in graph.nodes] == [
        ("Map", (N, 1, 4)),
        ("Map", (N, S, 4)),
    ]


def test_products_broadcast_by_themselves() -> None:
    def build(b: Builder, x: Value, y: Value) -> Value:
        return b.emit(ops.MatMul(), b.emit(ops.Expand((N, 4, 5)), x), y)

    graph = passed(simplify, graph_of({"x": (1, 4, 5), "y": (N, 5, 3)}, build), N=3)
    assert kinds(graph) == ["MatMul"]
    needed = graph_of({"n": (N,), "x": (1, 4, 5), "y": (5, 3)}, lambda b, n, x, y: build(b, x, y))
    assert kinds(passed(simplify, needed, N=3)) == ["Expand", "MatMul"]


CASTS: list[tuple[Callable[[Expr], Expr], int]] = [
    (lambda x: expr.cast(expr.cast(x, INT64), INT32), 0),
    (lambda x: expr.cast(expr.cast(x, INT64), FLOAT32), 1),
    (lambda x: expr.cast(expr.cast(x, INT8), INT32), 2),
    (lambda x: expr.cast(expr.cast(x, FLOAT16), INT32), 2),
    (lambda x: expr.cast(expr.cast(x, BOOL), INT32), 2),
]


@pytest.mark.parametrize("index", range(len(CASTS)))
def test_only_exact_detours_of_casts_go(index: int) -> None:
    build, left = CASTS[index]
    root = without_needless_casts(build(expr.arg(0, INT32)))
    assert sum(node.op == "cast" for node in expr.walk(root)) == left


def test_a_cast_to_half_and_back_still_rounds() -> None:
    def build(b: Builder, x: Value) -> Value:
        half = pointwise(b, lambda s: expr.cast(s * 3, FLOAT16), x)
        return pointwise(b, lambda s: expr.cast(s, FLOAT32) + 1, half)

    graph = graph_of({"x": (N,)}, build)
    result = optimize(graph)
    assert kinds(result) == ["Map"]
    x = np.float32([1.0001, 2.7182818, 3000.0])
    np.testing.assert_array_equal(run_graph(result, {"x": x})["y"], (x * 3).astype("f2").astype("f4") + 1)


def test_quantisation_keeps_its_saturation() -> None:
    def build(b: Builder, x: Value) -> Value:
        stored = pointwise(b, lambda s: expr.cast(expr.round_even(s / 0.1) + 128, UINT8, saturate=True), x)
        return pointwise(b, lambda s: (expr.cast(s, FLOAT32) - 128) * 0.1, stored)

    graph = optimized(graph_of({"x": (N, 64)}, lambda b, x: build(b, pointwise(b, lambda s: s * 50, x))), N=4)
    assert kinds(graph) == ["Map"]


def test_equal_nodes_are_one() -> None:
    def build(b: Builder, x: Value) -> Value:
        halves = [b.emit(ops.Reduce("sum", (1,), True), pointwise(b, lambda s: s * 0.5, x)) for _ in range(2)]
        rows = [b.emit(ops.Gather(0), value, b.constant(np.array([0, 1]))) for value in halves]
        return b.emit(ops.Concat(1), *rows)

    graph = passed(eliminate_common, graph_of({"x": (3, 4)}, build))
    assert kinds(graph) == ["Map", "Reduce", "Gather", "Concat"]


def test_random_nodes_are_never_one() -> None:
    op = Array(random_array, (TensorType(FLOAT32, (3,)),), deterministic=False)
    graph = graph_of({"x": (3,)}, lambda b, x: b.emit(ops.Concat(0), b.emit(op, x), b.emit(op, x)))
    assert kinds(eliminate_common(graph)) == ["Array", "Array", "Concat"]


def random_array(xp: Any, x: Any) -> Any:
    return np.random.default_rng().random(x.shape)


def normalized(b: Builder, x: Value, channels: int) -> Value:
    """BatchNormalization as it is written out."""
    scale, bias, middle, spread = (b.constant(weights(channels, 1, 1)) for _ in range(4))
    spread = pointwise(b, abs, spread)
    return pointwise(
        b, lambda s, m, v, g, c: (s - m) / expr.sqrt(v + 1e-5) * g + c, x, middle, spread, scale, bias
    )  # fmt: skip


@pytest.mark.parametrize("product", ["conv", "grouped", "transposed", "grouped transposed"])
@pytest.mark.parametrize("biased", [False, True])
def test_batch_normalisation_goes_into_the_weights(product: str, biased: bool) -> None:
    def build(b: Builder, x: Value) -> Value:
        group = 2 if "grouped" in product else 1
        if "transposed" in product:
            op = ops.ConvTranspose((2, 2), (0, 0), (0, 0), (1, 1), (0, 0), group)
            value = b.emit(op, x, b.constant(weights(4, 6 // group, 2, 2)))
        else:
            value = conv(b, x, weights(6, 4 // group, 3, 3), group=group)
        if biased:
            value = pointwise(b, lambda s, c: s + c, value, b.constant(weights(1, 6, 1, 1)))
        return pointwise(b, relu, normalized(b, value, 6))

    graph = graph_of({"x": (N, 4, 5, S)}, build)
    assert len(passed(fold_scales, graph, N=2, S=5).nodes) == 3
    (node,) = optimized(graph, N=2, S=5).nodes
    assert len(expr.walk(node.op.epilogue)) == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("transpose_b", [False, True])
def test_scales_go_into_the_weights_of_a_matrix_product(transpose_b: bool) -> None:
    def build(b: Builder, x: Value) -> Value:
        value = b.emit(
            ops.MatMul(transpose_b=transpose_b), x, b.constant(weights(*((6, 4) if transpose_b else (4, 6))))
        )
        return pointwise(b, lambda s, t: s * 0.125 / t, value, b.constant(weights(6) + 3))

    (node,) = passed(fold_scales, graph_of({"x": (N, S, 4)}, build), N=2, S=3).nodes
    assert node.op == ops.MatMul(transpose_b=transpose_b)


KEPT: dict[str, Callable[[Builder, Value, Value], Value]] = {
    "a scale that is not constant": lambda b, v, x: pointwise(b, lambda s, t: s * t, v, x),
    "a scale along another axis": lambda b, v, x: pointwise(b, lambda s, t: s * t, v, b.constant(weights(4, 1))),
    "not affine": lambda b, v, x: pointwise(b, lambda s: s * s + s, v),
    "a bias alone": lambda b, v, x: pointwise(b, lambda s: s + 2, v),
    "an infinite scale": lambda b, v, x: pointwise(b, lambda s, t: s * t, v, b.constant(np.float32([np.inf] * 4))),
    "a difference of itself": lambda b, v, x: pointwise(b, lambda s: (s - s) * 2, v),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_maps_stay_behind_the_product(name: str) -> None:
    def build(b: Builder, x: Value) -> Value:
        return KEPT[name](b, b.emit(ops.MatMul(), x, b.constant(weights(4, 4))), x)

    assert kinds(passed(fold_scales, graph_of({"x": (4, 4)}, build))) == ["MatMul", "Map"]


def test_shared_weights_stay_shared() -> None:
    def build(b: Builder, x: Value) -> Value:
        table = b.constant(weights(4, 4))
        return pointwise(b, lambda s: s * 2, b.emit(ops.MatMul(), b.emit(ops.MatMul(), x, table), table))

    assert kinds(passed(fold_scales, graph_of({"x": (N, 4)}, build), N=2)) == ["MatMul", "MatMul", "Map"]


def test_a_product_with_two_users_keeps_its_weights() -> None:
    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        value = b.emit(ops.MatMul(), x, b.constant(weights(4, 4)))
        return pointwise(b, lambda s: s * 2, value), value

    assert kinds(passed(fold_scales, graph_of({"x": (N, 4)}, build), N=2)) == ["MatMul", "Map"]


def test_transposes_sink_and_cancel() -> None:
    def build(b: Builder, x: Value) -> Value:
        there = b.emit(ops.Transpose((0, 3, 1, 2)), x)
        scaled = pointwise(b, lambda s, t: s * t, there, b.constant(weights(4, 1, 1)))
        return b.emit(ops.Transpose((0, 2, 3, 1)), pointwise(b, relu, scaled))

    graph = optimized(graph_of({"x": (N, 5, S, 4)}, build), N=2, S=3)
    assert kinds(graph) == ["Map"]


@pytest.mark.parametrize(
    ("perm", "expected"), [((0, 1, 3, 2), ["MatMul"]), ((0, 2, 3, 1), ["Transpose", "MatMul"])], ids=str
)
def test_products_read_transposed_operands(perm: tuple[int, ...], expected: list[str]) -> None:
    shape = tuple((N, 2, 5, 4)[perm.index(axis)] if perm == (0, 1, 3, 2) else (N, 5, 2, 4)[axis] for axis in range(4))

    def build(b: Builder, x: Value, y: Value) -> Value:
        return b.emit(ops.MatMul(), x, b.emit(ops.Transpose(perm), y))

    x = (N, 2, 3, 5 if perm == (0, 1, 3, 2) else 4)
    y = (N, 2, 6, 5) if perm == (0, 1, 3, 2) else shape
    graph = passed(clean_transposes, graph_of({"x": x, "y": y}, build), N=2)
    assert kinds(graph) == expected
    assert graph.nodes[-1].op == ops.MatMul(transpose_b=True)


def test_slices_come_before_transposes() -> None:
    """Queries, keys and values cut from one projection: what is thrown away is never moved."""

    def build(b: Builder, x: Value) -> tuple[Value, ...]:
        parted = b.emit(ops.Transpose((2, 0, 3, 1, 4)), b.emit(ops.Reshape((N, S, 3, 2, 4)), x))
        return tuple(b.emit(ops.Gather(0), parted, b.constant(np.array(i))) for i in range(3))

    graph = optimized(graph_of({"x": (N, S, 24)}, build), N=2, S=3)
    assert kinds(graph) == ["Reshape"] + ["Slice", "Reshape", "Transpose"] * 3
    assert {node.op.perm for node in graph.nodes if isinstance(node.op, ops.Transpose)} == {(0, 2, 1, 3)}


def test_a_transpose_of_merged_axes_drops_extents_of_one() -> None:
    """Keys of one head of three, transposed as exporters of attention do: heads and batch merged around it."""

    def build(b: Builder, x: Value) -> Value:
        parted = b.emit(ops.Transpose((2, 0, 3, 1, 4)), x)
        merged = b.emit(ops.Reshape((3 * N, S, 4)), parted)
        return b.emit(ops.Reshape((N, 3, 4, S)), b.emit(ops.Transpose((0, 2, 1)), merged))

    graph = optimized(graph_of({"x": (N, S, 1, 3, 4)}, build), N=2, S=5)
    assert kinds(graph) == ["Reshape", "Transpose"]
    assert graph.nodes[-1].op == ops.Transpose((0, 2, 3, 1))


def test_zero_padding_joins_the_convolution() -> None:
    def build(b: Builder, x: Value) -> Value:
        return conv(b, b.emit(ops.Pad((0, 0, 0, 1), (0, 0, 2, 1)), x), weights(2, 3, 3, 3), pads=1)

    (node,) = passed(absorb_padding, graph_of({"x": (N, 3, 5, S)}, build), N=2, S=5).nodes
    assert isinstance(node.op, ops.Conv) and (node.op.before, node.op.after) == ((1, 2), (3, 2))


def test_other_padding_stays() -> None:
    def build(b: Builder, x: Value) -> Value:
        return conv(b, b.emit(ops.Pad((0, 0, 1, 1), (0, 0, 1, 1), "reflect"), x), weights(2, 3, 3, 3))

    assert kinds(passed(absorb_padding, graph_of({"x": (N, 3, 5, S)}, build), N=2, S=5)) == ["Pad", "Conv"]


def test_bodies_of_control_flow_are_optimised() -> None:
    def body(function: Callable[[Expr], Expr]) -> Graph:
        return graph_of({"x": (N, 4)}, lambda b, x: pointwise(b, function, pointwise(b, expr.exp, x)))

    op = If(body(expr.sin), body(expr.cos), (TensorType(FLOAT32, (N, 4)),), ("N",), (N,))
    graph = graph_of({"c": (BOOL, ()), "x": (N, 4)}, lambda b, c, x: b.emit(op, c, x))
    (node,) = optimized(graph, N=2).nodes
    assert isinstance(node.op, If) and len(node.op.then_branch.nodes) == len(node.op.else_branch.nodes) == 1


def test_a_pass_that_breaks_the_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def shorten(graph: Graph) -> Graph:
        return Graph(graph.inputs, graph.outputs, graph.nodes[1:], graph.input_names, graph.output_names)

    monkeypatch.setattr(pipeline, "PIPELINE", (("shorten", shorten),))
    graph = graph_of({"x": (N, 4)}, lambda b, x: pointwise(b, expr.exp, x))
    with pytest.raises(GpuEngineError, match="shorten: an output of the graph is made by no node"):
        optimize(graph)


def test_long_chains_take_linear_time() -> None:
    def layers(count: int) -> Graph:
        def build(b: Builder, x: Value) -> Value:
            for _ in range(count):
                value = pointwise(b, lambda s, t: s + t, b.emit(ops.MatMul(), x, table), b.constant(weights(8)))
                value = b.emit(ops.Transpose((0, 2, 1)), b.emit(ops.Transpose((0, 2, 1)), value))
                x = pointwise(b, lambda s, t: expr.tanh(s) + t, value, x)
            return x

        table = Builder().constant(weights(8, 8))
        return graph_of({"x": (N, S, 8)}, build)

    def seconds(graph: Graph) -> float:
        start = time.process_time()
        optimize(graph)
        return time.process_time() - start

    short, long = layers(25), layers(150)
    assert len(optimize(long).nodes) == 150
    assert min(seconds(long) for _ in range(2)) < 15 * max(seconds(short), 0.02)
