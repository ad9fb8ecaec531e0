"""The builder folds, rewrite replaces, verify objects."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_engine.errors import GpuEngineError, InvalidModel
from gpu_engine.ir import dims, expr, folding, ops
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.graph import Builder, Graph, Node, ShapeTensor, TensorType, Value, rewrite, verify
from gpu_engine.ir.parameters import resolve

N = dims.symbol("N")


def relu(dtype: np.dtype = FLOAT32) -> ops.Map:
    return ops.Map(expr.maximum(expr.arg(0, dtype), 0))


def chain(count: int) -> Graph:
    builder, x = Builder(), Value(TensorType(FLOAT32, (N, 4)), name="x")
    value = x
    for _ in range(count):
        value = builder.emit(relu(), value)
    return Graph((x,), (value,), tuple(builder.nodes), ("x",), ("y",))


def test_known_operands_fold() -> None:
    builder = Builder()
    folded = builder.emit(relu(), builder.constant(np.float32([-1, 2])))
    np.testing.assert_array_equal(folded.known, [0, 2])
    assert not builder.nodes


def test_shape_arithmetic_folds_on_symbols() -> None:
    builder = Builder()
    shape = builder.shape_constant((N, 3, 8 * N))
    head = builder.emit(ops.Gather(0), shape, builder.constant(np.array([0])))
    twice = builder.emit(ops.Map(expr.arg(0, INT64) * 2), head)
    joined = builder.emit(ops.Concat(0), twice, builder.constant(np.array([5])))
    assert list(joined.known) == [2 * N, 5] and not builder.nodes


def test_arithmetic_that_cancels_the_symbols_becomes_constant() -> None:
    builder = Builder()
    a, b = builder.shape_constant((8 * N,)), builder.shape_constant((N,))
    quotient = builder.emit(ops.Map(expr.arg(0, INT64) / expr.arg(1, INT64)), a, b)
    assert quotient.constant is not None and quotient.constant.tolist() == [8]


def test_symbolic_contents_that_a_kernel_needs_become_a_tensor() -> None:
    builder = Builder()
    x = Value(TensorType(INT64, (2,)))
    builder.emit(ops.Map(expr.arg(0, INT64) + expr.arg(1, INT64)), x, builder.shape_constant((N, 2)))
    assert [type(node.op) for node in builder.nodes] == [ShapeTensor, ops.Map]
    assert resolve(builder.nodes[0].op, {N: 7}).values == (7, 2)  # type: ignore[attr-defined]


def test_undecided_comparisons_do_not_fold() -> None:
    builder = Builder()
    less = builder.emit(ops.Map(expr.arg(0, INT64) < 5), builder.shape_constant((N,)))
    assert less.known is None
    known = builder.emit(ops.Map(expr.arg(0, INT64) < 1), builder.shape_constant((N,)))
    assert known.known is not None and known.known.tolist() == [False]


def test_a_huge_result_is_left_to_the_run() -> None:
    builder = Builder()
    huge = builder.emit(ops.Expand((1 << 20, 1 << 20)), builder.constant(np.float32([1]).reshape(1, 1)))
    assert huge.known is None and [node.op for node in builder.nodes] == [ops.Expand((1 << 20, 1 << 20))]


def test_rewrite_replaces_and_drops_what_is_unused() -> None:
    def drop_second(node: Node, builder: Builder) -> tuple[Value, ...] | None:
        inner = builder.producer(node.inputs[0])
        return inner.outputs if inner is not None and inner.op == node.op else None

    graph = verify(rewrite(chain(5), drop_second), "test")
    assert len(graph.nodes) == 1 and graph.outputs == graph.nodes[0].outputs


def test_verify_names_the_stage_and_the_node() -> None:
    graph = chain(1)
    node = graph.nodes[0]
    wrong = Value(TensorType(FLOAT32, (N, 5)))
    broken = Graph(graph.inputs, (wrong,), (Node(node.op, node.inputs, (wrong,), "Relu 'r'"),), ("x",), ("y",))
    with pytest.raises(GpuEngineError, match=r"fusion: Relu 'r': Map makes float32\[N, 4\], declared float32\[N, 5\]"):
        verify(broken, "fusion")


def test_contradicting_types_name_the_source() -> None:
    builder = Builder()
    builder.source = "Add 'a' (opset 17)"
    with pytest.raises(InvalidModel, match="Add 'a'"):
        builder.emit(
            ops.Map(expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32)), *(Value(TensorType(FLOAT32, (n,))) for n in (2, 3))
        )


def test_repeated_elements_are_known_without_taking_memory() -> None:
    builder = Builder()
    huge = builder.emit(ops.Expand((1 << 15, 1 << 14)), builder.constant(np.float32([[1]])))
    assert huge.constant is not None and not any(huge.constant.strides) and not builder.nodes
    turned = builder.emit(ops.Transpose((1, 0)), huge)
    assert turned.constant is not None and turned.shape == (1 << 14, 1 << 15)


def test_sums_over_repeated_elements_are_left_to_the_run() -> None:
    builder = Builder()
    huge = builder.emit(ops.Expand((1 << 15, 1 << 14)), builder.constant(np.float32([[1]])))
    assert builder.emit(ops.Reduce("sum", (0, 1), False), huge).known is None


def test_a_reshape_that_would_copy_repeated_elements_is_left_to_the_run() -> None:
    builder = Builder()
    column = builder.constant(np.arange(1 << 15, dtype=np.float32)[:, None])
    wide = builder.emit(ops.Expand((1 << 15, 1 << 14)), column)
    assert wide.known is not None
    assert builder.emit(ops.Reshape((1 << 29,)), wide).known is None


def test_what_folding_makes_is_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "BUDGET_NBYTES", 1 << 20)
    builder, count = Builder(), 0
    part = builder.emit(ops.Expand((1 << 8, 1 << 8)), builder.constant(np.float32([[1]])))
    while builder.emit(ops.Map(expr.exp(expr.arg(0, FLOAT32))), part).known is not None:
        count += 1
    assert count == 4
