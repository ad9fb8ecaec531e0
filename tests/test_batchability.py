"""Batching is proven where every row stays apart, and refused by the node that mixes rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT32, INT64
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value
from gpu_engine.ir.ops.array import Array
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Batching
from tests.reference import assert_batches, graph_of, pointwise
from tests.test_fusion import MODELS

N, M, S = dims.symbol("N"), dims.symbol("M"), dims.symbol("S")
GENERATOR = np.random.default_rng(2)
Build = Callable[..., Value | tuple[Value, ...]]


def weights(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype("f4")


def add(b: Builder, x: Value, y: Value) -> Value:
    return pointwise(b, lambda s, t: s + t, x, y)


def total(b: Builder, x: Value, *axes: int, keepdims: bool = False) -> Value:
    return b.emit(ops.Reduce("sum", axes, keepdims), x)


def reshape(b: Builder, x: Value, *shape: Dim) -> Value:
    return b.emit(ops.Reshape(shape), x)


def transpose(b: Builder, x: Value, *perm: int) -> Value:
    return b.emit(ops.Transpose(perm), x)


def lstm(b: Builder, x: Value, *states: Value, quantised: bool = False) -> Value:
    """The outputs [N, S, 4] of an LSTM over x [N, S, 4], time first inside."""
    table = b.constant(weights(1, 16, 4) if not quantised else weights(1, 16, 4).astype("i1"))
    inputs = b.emit(ops.MatMul(), transpose(b, x, 1, 0, 2), b.constant(weights(4, 16)))
    extra = [b.constant(np.ones(1, "f4")), b.constant(np.zeros(1, "i1"))] if quantised else list(states)
    present = ("scale", "zero") if quantised else ("initial_h", "initial_c")[: len(states)]
    cell = (expr.sigmoid(expr.arg(0, FLOAT32)), expr.tanh(expr.arg(0, FLOAT32)), expr.tanh(expr.arg(0, FLOAT32)))
    sequence, *_ = b.emit_all(ops.Recurrent("lstm", (False,), (cell,), present), inputs, table, *extra)
    return reshape(b, transpose(b, sequence, 2, 0, 1, 3), N, S, 4)


X, Y = {"x": (N, S, 4)}, {"x": (N, S, 4), "y": (N, S, 4)}
IDS = {"ids": (INT64, (N, S))}
IMAGE = {"x": (N, 3, 6, S)}
SAME = ops.Conv((1, 1), (1, 1), (1, 1), (1, 1))
POOL = ops.Pool("average", (2, 2), (2, 2), (0, 0), (0, 0), (1, 1))
TWICE = ops.Resize((N, 3, 12, 2 * S), (None, None, 2.0, 2.0), "nearest", "asymmetric", "floor")

PROVEN: dict[str, tuple[dict[str, Any], Build]] = {
    "map of two inputs": (Y, add),
    "a constant for all rows": (X, lambda b, x: add(b, x, b.constant(weights(4)))),
    "an input for all rows": ({"x": (N, 4), "bias": (S, 4)[1:]}, add),
    "reduction of other axes": (X, lambda b, x: total(b, x, 1, 2)),
    "softmax and norm of other axes": (X, lambda b, x: b.emit(ops.LayerNorm(2, 1e-5), b.emit(ops.Softmax(1), x))),
    "index of the greatest": (X, lambda b, x: b.emit(ops.ArgReduce("max", 2, False, False), x)),
    "rows times weights": (X, lambda b, x: b.emit(ops.MatMul(), x, b.constant(weights(4, 5)))),
    "flat rows times weights": (
        X,
        lambda b, x: b.emit(ops.MatMul(), reshape(b, x, N * S, 4), b.constant(weights(4, 5))),
    ),
    "batched product": (Y, lambda b, x, y: b.emit(ops.MatMul(transpose_b=True), x, y)),
    "weights times columns": (
        {"x": (N, 4)},
        lambda b, x: transpose(b, b.emit(ops.MatMul(), b.constant(weights(5, 4)), transpose(b, x, 1, 0)), 1, 0),
    ),
    "product with an epilogue": (
        Y,
        lambda b, x, y: b.emit(
            ops.MatMul(epilogue=expr.arg(0, FLOAT32) * expr.arg(1, FLOAT32)), x, b.constant(weights(4, 4)), y
        ),
    ),
    "heads of attention": (
        Y,
        lambda b, x, y: b.emit(
            ops.Attention(0.5), *(transpose(b, reshape(b, v, N, S, 2, 2), 0, 2, 1, 3) for v in (x, y, x))
        ),
    ),
    "queries of attention": (
        {"x": (N, 4)},
        lambda b, x: b.emit(ops.Attention(0.5), x, b.constant(weights(3, 4)), b.constant(weights(3, 2))),
    ),
    "convolution, pool and resize": (
        IMAGE,
        lambda b, x: b.emit(TWICE, b.emit(SAME, x, b.constant(weights(3, 3, 3, 3)))),
    ),
    "pool": (IMAGE, lambda b, x: b.emit(POOL, x)),
    "embedding": (IDS, lambda b, ids: b.emit(ops.Gather(0), b.constant(weights(9, 4)), ids)),
    "one position of each row": (X, lambda b, x: b.emit(ops.Gather(2), x, b.constant(np.array([3, 0])))),
    "elements of each row": (
        {"x": (N, 9), "ids": (INT64, (N, 2))},
        lambda b, x, ids: b.emit(ops.GatherElements(1), x, ids),
    ),
    "slices, pads and joins of other axes": (
        X,
        lambda b, x: b.emit(
            ops.Concat(2),
            b.emit(ops.Slice((0, 0, 1), (1, 1, 2), (N, S, 2)), x),
            b.emit(ops.Pad((0, 0, 1), (0, 0, 0)), x),
        ),
    ),
    "a token before every row": (
        X,
        lambda b, x: b.emit(ops.Concat(1), b.emit(ops.Expand((N, 1, 4)), b.constant(weights(1, 1, 4))), x),
    ),
    "rows elsewhere and back": (
        X,
        lambda b, x: transpose(b, b.emit(ops.Softmax(0), transpose(b, x, 2, 1, 0)), 2, 1, 0),
    ),
    "three parts on the leading axis": (
        {"x": (N, S, 6)},
        lambda b, x: b.emit(
            ops.Gather(0), transpose(b, reshape(b, x, N, S, 3, 2), 2, 0, 1, 3), b.constant(np.array(1))
        ),
    ),
    "several rows of the result for one": (X, lambda b, x: reshape(b, x, N * S, 4)),
    "blocks without an axis for a while": ({"x": (N, 6)}, lambda b, x: reshape(b, reshape(b, x, 2, 3 * N), 2 * N, 3)),
    "recurrence over another axis": (X, lstm),
    "recurrence from given zeros": (
        X,
        lambda b, x: lstm(
            b, x, *(b.emit(ops.Expand((1, N, 4)), b.constant(np.zeros((1, 1, 4), "f4"))) for _ in range(2))
        ),
    ),
    "an unknown operation that no row enters": (
        {"x": (N, 4)},
        lambda b, x: add(b, x, b.emit(Array(sorted_array, (TensorType(FLOAT32, (4,)),)), b.constant(weights(4)))),
    ),
}


def sorted_array(xp: Any, x: Any) -> Any:
    return xp.sort(x)


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str) -> None:
    shapes, build = PROVEN[name]
    graph = graph_of(shapes, build)
    for form in (graph, optimize(graph)):
        batching = prove(form)
        batched = tuple(bool(value.shape) and value.shape[0] == N for value in graph.inputs)
        assert batching == Batching("N", batched, (True,) * len(graph.outputs))
        assert_batches(form, 3, S=4)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    assert_batches(optimize(graph_of(*MODELS[name])), 3, S=4)


UNKNOWN = Array(sorted_array, (TensorType(FLOAT32, (N, S, 4)),))
RANDOM = Array(sorted_array, (TensorType(FLOAT32, (4,)),), deterministic=False)
NODE = "Test 'node' "
REFUSED: dict[str, tuple[dict[str, Any], Build, str]] = {
    "mean over the batch": (
        X,
        lambda b, x: add(b, x, total(b, x, 0, keepdims=True)),
        "folds the rows of the batch into one",
    ),
    "greatest row": (
        X,
        lambda b, x: b.emit(ops.ArgReduce("max", 0, True, False), x),
        "folds the rows of the batch into one",
    ),
    "softmax over the batch": (X, lambda b, x: b.emit(ops.Softmax(0), x), "normalises over the rows of the batch"),
    "norm over everything": (
        X,
        lambda b, x: b.emit(ops.LayerNorm(0, 1e-5), x),
        "normalises over the rows of the batch",
    ),
    "product over the batch": (
        Y,
        lambda b, x, y: b.emit(ops.MatMul(), transpose(b, x, 2, 1, 0), transpose(b, y, 1, 0, 2)),
        "sums over the rows of the batch",
    ),
    "sum over the batch": (
        {"x": (N, 4), "y": (N, 4)},
        lambda b, x, y: b.emit(ops.MatMul(transpose_a=True), x, y),
        "sums over the rows of the batch",
    ),
    "every row with every row": (
        {"x": (N, 4)},
        lambda b, x: total(b, b.emit(ops.MatMul(transpose_b=True), x, x), 1, keepdims=True),
        "multiplies every row of the batch with every other",
    ),
    "attention between rows": (
        {"x": (N, 4)},
        lambda b, x: b.emit(ops.Attention(1.0), x, x, x),
        "attends to other rows of the batch",
    ),
    "causal attention along the batch": (
        {"x": (N, 4)},
        lambda b, x: b.emit(ops.Attention(1.0, causal=True), x, b.constant(weights(3, 4)), b.constant(weights(3, 4))),
        "attends to other rows of the batch",
    ),
    "joined to itself": (X, lambda b, x: b.emit(ops.Concat(0), x, x), "joins tensors along the rows of the batch"),
    "the first row": (
        X,
        lambda b, x: add(b, x, b.emit(ops.Slice((0, 0, 0), (1, 1, 1), (1, S, 4)), x)),
        "takes some rows of the batch only",
    ),
    "backwards": (
        X,
        lambda b, x: b.emit(ops.Slice((N - 1, 0, 0), (-1, 1, 1), (N, S, 4)), x),
        "starts at a place that depends on the batch 'N'",
    ),
    "the last position by count": (
        {"x": (N, 9)},
        lambda b, x: b.emit(ops.Slice((0, N), (1, 1), (N, 1)), x),
        "starts at a place that depends on the batch 'N'",
    ),
    "a row more": (X, lambda b, x: b.emit(ops.Pad((1, 0, 0), (0, 0, 0)), x), "pads the axis of the batch"),
    "rows by index": (
        X,
        lambda b, x: b.emit(ops.Gather(0), x, b.constant(np.array([0, 0]))),
        "gathers across the rows of the batch",
    ),
    "rows by rows": (
        {"x": (N, 9), "ids": (INT64, (N,))},
        lambda b, x, ids: b.emit(ops.Gather(1), x, ids),
        "gathers across the rows of the batch",
    ),
    "neighbours": (
        {"x": (N, 3)},
        lambda b, x: b.emit(
            ops.Conv((1,), (1,), (1,), (1,)), reshape(b, transpose(b, x, 1, 0), 1, 3, N), b.constant(weights(3, 3, 3))
        ),
        "convolves over the rows of the batch",
    ),
    "filters from the batch": (
        {"x": (N, 3, 1)},
        lambda b, x: b.emit(ops.Conv((1,), (0,), (0,), (1,)), b.constant(weights(1, 3, 5)), x),
        "convolves with weights that depend on the batch",
    ),
    "resized rows": (
        X,
        lambda b, x: b.emit(ops.Resize((2 * N, S, 4), (2.0, None, None), "nearest", "asymmetric", "floor"), x),
        "resizes the axis of the batch",
    ),
    "different axes": (
        {"x": (N, 3), "y": (N, 3)},
        lambda b, x, y: add(b, reshape(b, x, N, 1, 3), reshape(b, y, 1, N, 3)),
        "combines operands whose rows of the batch lie along different axes",
    ),
    "counting rows": (
        {"x": (N,)},
        lambda b, x: add(b, x, pointwise(b, lambda s: expr.cast(s, FLOAT32), b.emit(ops.Iota(N, INT64)))),
        "makes a tensor of the batch 'N' itself, not of its rows",
    ),
    "dividing by the count": (
        X,
        lambda b, x: pointwise(b, lambda s, n: s / expr.cast(n, FLOAT32), x, b.shape_constant((N,), INT32)),
        "makes a tensor of the batch 'N' itself, not of its rows",
    ),
    "a square of the batch": (
        {"x": (N, 1, 4)},
        lambda b, x: b.emit(ops.Expand((N, N, 4)), x),
        "makes float32[N, N, 4], whose extents depend on the batch 'N' beside its rows",
    ),
    "mixed and parted again": (
        {"x": (N, 4)},
        lambda b, x: reshape(b, transpose(b, x, 1, 0), N, 4),
        "merges the rows of the batch with what lies before them",
    ),
    "work on rows without an axis": (
        {"x": (N, 6)},
        lambda b, x: reshape(b, pointwise(b, expr.tanh, reshape(b, x, 2, 3 * N)), N, 6),
        "finds no axis of its operand along which the rows of the batch lie",
    ),
    "other rows than the batch": (
        {"x": (N, 4), "y": (M, 4)},
        add,
        "combines N with broadcast(M, N) elements along the axis of the batch",
    ),
    "recurrence over the batch": (
        X,
        lambda b, x: b.emit_all(
            ops.Recurrent("rnn", (False,), ((expr.tanh(expr.arg(0, FLOAT32)),),)), x, b.constant(weights(1, 4, 4))
        )[0],
        "runs along the rows of the batch",
    ),
    "quantised recurrence": (
        X,
        lambda b, x: lstm(b, x, quantised=True),
        "quantises its state over all rows of the batch",
    ),
    "an unknown operation": (
        X,
        lambda b, x: b.emit(UNKNOWN, x),
        "is not known to keep the rows of the batch apart (Array)",
    ),
    "noise": (
        {"x": (N, 4)},
        lambda b, x: add(b, x, b.emit(RANDOM, b.constant(weights(4)))),
        "is random or runs a body of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    shapes, build, reason = REFUSED[name]
    graph = graph_of(shapes, build)
    assert prove(graph) == Batching(None, (False,) * len(graph.inputs), (False,) * len(graph.outputs), NODE + reason)


PORTS: dict[str, tuple[dict[str, Any], Build, str]] = {
    "fixed": ({"x": (1, 4)}, lambda b, x: pointwise(b, expr.tanh, x), "axis 0 of input 'x' has the fixed extent 1"),
    "no axis": ({"x": ()}, lambda b, x: pointwise(b, expr.tanh, x), "no input has an axis"),
    "a sum": ({"x": (N + 1, 4)}, lambda b, x: x, "axis 0 of input 'x' is not a symbol of its own: N + 1"),
    "state": (
        {"x": (N, 4), "state": (2, N, 4)},
        lambda b, x, state: (x, state),
        "input 'state' has the batch extent 'N' in axis 1: N",
    ),
    "output in another axis": (
        X,
        lambda b, x: transpose(b, x, 1, 0, 2),
        "output 'y' has the rows of the batch along axis 1, not axis 0",
    ),
    "output without": (X, lambda b, x: (x, b.constant(weights(3))), "output 'y1' does not depend on the batch"),
}


@pytest.mark.parametrize("name", PORTS)
def test_ports_that_cannot_carry_the_batch(name: str) -> None:
    shapes, build, reason = PORTS[name]
    assert prove(graph_of(shapes, build)).refused == reason


def test_outputs_without_the_batch_are_shared_if_that_is_allowed() -> None:
    shapes, build, _ = PORTS["output without"]
    assert prove(graph_of(shapes, build), shares_outputs=True) == Batching("N", (True,), (True, False))
    alone = graph_of(X, lambda b, x: b.constant(weights(3)))
    assert prove(alone, shares_outputs=True).refused == "output 'y' does not depend on the batch"
    for name, (shapes, build, reason) in REFUSED.items():
        assert prove(graph_of(shapes, build), shares_outputs=True).refused == NODE + reason, name


def test_the_first_symbol_that_is_proven_counts() -> None:
    def build(b: Builder, queries: Value, documents: Value) -> Value:
        return b.emit(ops.MatMul(transpose_b=True), documents, queries)

    graph = graph_of({"queries": (N, 4), "documents": (M, 4)}, build)
    assert prove(graph) == Batching("M", (False, True), (True,))


def test_reasons_name_the_node() -> None:
    def build(b: Builder, x: Value) -> Value:
        b.source = "Softmax '/head/softmax' (opset 17)"
        value = b.emit(ops.Softmax(0), x)
        b.source = "Relu '/head/relu' (opset 17)"
        return pointwise(b, lambda s: expr.maximum(s, 0), value)

    graph: Graph = graph_of(X, build)
    assert prove(graph).refused == "Softmax '/head/softmax' (opset 17) normalises over the rows of the batch"
    assert prove(graph) == prove(graph)
