"""Graphs of narrow floats computed in float32: the same results, fewer roundings, nothing but native steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_fallback.calls import Native
from cpu_fallback.device import CpuDevice
from cpu_fallback.wide_floats import NARROW, retyped, widen_floats
from gpu_engine.ir import expr
from gpu_engine.ir.dims import symbol
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT32, DType
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value, verify
from gpu_engine.ir.interpreter import run_graph
from gpu_engine.ir.ops import Concat, Conv, Gather, Map, MatMul, Reshape, Softmax, Transpose
from gpu_engine.passes.batchability import prove

Array = NDArray[Any]
DTYPES = [pytest.param(dtype, id=str(dtype)) for dtype in NARROW]


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def graph_of(builder: Builder, inputs: tuple[Value, ...], *outputs: Value) -> Graph:
    names = tuple(f"x{i}" for i in range(len(inputs)))
    return Graph(inputs, outputs, tuple(builder.nodes), names, tuple(f"y{i}" for i in range(len(outputs))))


def network(dtype: DType, batch: Any) -> Graph:
    """A convolution, a product with a bias, and a softmax."""
    builder, x = Builder(), Value(TensorType(dtype, (batch, 3, 9, 10)))
    weights = builder.constant((numbers(0, 8, 3, 3, 3) / 5).astype(dtype))
    image = builder.emit(Conv((1, 1), (1, 1), (1, 1), (1, 1), 1), x, weights)
    image = builder.emit(Map(expr.maximum(expr.arg(0, dtype), 0.0)), image)
    rows = builder.emit(Reshape((batch, 8, 90)), image)
    bias = builder.constant(numbers(1, 33).astype(dtype))
    product = MatMul(epilogue=expr.arg(0, dtype) + expr.arg(1, dtype))
    factor = builder.constant((numbers(2, 8, 33) / 3).astype(dtype))
    result = builder.emit(product, builder.emit(Transpose((0, 2, 1)), rows), factor, bias)
    return graph_of(builder, (x,), builder.emit(Softmax(2), result), image)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_stored_is_narrow(dtype: DType) -> None:
    graph = network(dtype, 2)
    found = verify(widen_floats(graph), "widened")
    assert [value.type for value in found.outputs] == [value.type for value in graph.outputs]
    casts = [node for node in found.nodes if any(value.dtype in NARROW for value in (*node.inputs, *node.outputs))]
    assert [type(node.op) for node in casts] == [Map] * 3, "one input and two outputs are converted"
    x = numbers(3, 2, 3, 9, 10).astype(dtype)
    exact = run_graph(np, widen_floats(network(FLOAT32, 2)), [x.astype(np.float32)])
    for got, plain, truth in zip(run_graph(np, found, [x]), run_graph(np, graph, [x]), exact, strict=True):
        assert got.dtype == dtype
        errors = [np.abs(y.astype(np.float64) - truth).max() for y in (got, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_is_native(dtype: DType) -> None:
    graph = network(dtype, symbol("batch"))
    plan = CpuDevice().lower(graph, prove(graph))
    assert all(isinstance(step.kernel, Native) for step in plan.steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_in_expressions_still_round(dtype: DType) -> None:
    x, y = expr.arg(0, FLOAT32), expr.arg(1, dtype)
    root = expr.cast(x * 3, dtype) + y
    operands = numbers(4, 1000), numbers(5, 1000).astype(dtype)
    truth = (operands[0] * np.float32(3)).astype(dtype).astype(np.float32) + operands[1].astype(np.float32)
    np.testing.assert_array_equal(expr.evaluate(retyped(root, frozenset({1})), operands), truth)
    wide = operands[0], operands[1].astype(np.float32)
    np.testing.assert_array_equal(expr.evaluate(retyped(root, frozenset()), wide), truth)


def test_conditions_and_integers_keep_their_types() -> None:
    x = expr.arg(0, FLOAT16)
    root = expr.where(x < 0.5, expr.cast(x * 4, INT32), 7)
    values = numbers(6, 100).astype(np.float16)
    found = retyped(root, frozenset({0}))
    assert found.dtype == INT32
    np.testing.assert_array_equal(expr.evaluate(found, [values]), expr.evaluate(root, [values]))


def test_graphs_without_products_stay_as_they_are() -> None:
    builder, x = Builder(), Value(TensorType(FLOAT16, (2, 3)))
    graph = graph_of(builder, (x,), builder.emit(Map(expr.exp(expr.arg(0, FLOAT16))), x))
    assert widen_floats(graph) is graph
    wide = network(FLOAT32, 2)
    assert widen_floats(wide) is wide


def test_tables_stay_narrow() -> None:
    """What only moves is not converted for itself."""
    builder, places = Builder(), Value(TensorType(np.dtype(np.int64), (5,)))
    table = builder.constant(numbers(7, 100, 16).astype(np.float16))
    rows = builder.emit(
        Concat(0), builder.emit(Gather(0), table, places), builder.constant(np.ones((1, 16), np.float16))
    )
    graph = graph_of(builder, (places,), builder.emit(MatMul(transpose_b=True), rows, rows))
    found = verify(widen_floats(graph), "widened")
    kinds = {type(node.op): node.inputs[0].dtype for node in found.nodes}
    assert kinds[Gather] == kinds[Concat] == FLOAT16 and kinds[MatMul] == FLOAT32
    (got,), (plain,) = (run_graph(np, each, [np.arange(5)]) for each in (found, graph))
    np.testing.assert_allclose(got.astype(np.float32), plain.astype(np.float32), rtol=2e-3, atol=1e-3)


def test_an_overflow_shows_where_it_is_stored() -> None:
    builder, x = Builder(), Value(TensorType(FLOAT16, (1, 1)))
    product = builder.emit(MatMul(), x, builder.constant(np.full((1, 1), 300, np.float16)))
    graph = graph_of(builder, (x,), product, builder.emit(Map(expr.arg(0, FLOAT16) / 300), product))
    stored, later = run_graph(np, widen_floats(graph), [np.full((1, 1), 300, np.float16)])
    assert np.isinf(stored).all() and later == 300


def test_bfloat16_is_widened_too() -> None:
    found = widen_floats(network(BFLOAT16, 2))
    assert all(node.inputs[0].dtype == FLOAT32 for node in found.nodes if isinstance(node.op, (Conv, MatMul)))
