"""Moving elements on the CPU device: transposes, slices, joins, padding, gathers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_engine.errors import ExecutionError
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, INT8, INT64, STRING, DType
from gpu_engine.ir.ops import Concat, Expand, Gather, GatherElements, Iota, Pad, Slice, Transpose
from tests.cpu_execution import check_op, lowered, op_graph, run_graph
from tests.reference import graph_of

Array = NDArray[Any]
N, M = dims.symbol("N"), dims.symbol("M")


def elements(dtype: DType, *shape: int) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * 9).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", (FLOAT32, INT8, BOOL, FLOAT16, BFLOAT16, INT64), ids=str)
def test_every_width_moves(dtype: DType) -> None:
    x = elements(dtype, 3, 4, 5, 6)
    for perm in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (0, 2, 3, 1)):
        check_op(Transpose(perm), [x])
    check_op(Concat(1), [x, x[:, :1].copy(), x])
    check_op(Slice((1, 0, 4, 5), (1, 2, -2, -1), (2, 2, 3, 6)), [x])
    check_op(Expand((2, 3, 4, 5, 6)), [x[:, :1].copy()])
    check_op(Pad((1, 0, 2, 0), (0, 3, 1, 4)), [x])


def test_transposes() -> None:
    x = elements(FLOAT32, 3, 4, 5, 6)
    for perm in itertools.permutations(range(4)):
        check_op(Transpose(perm), [x])
        check_op(Transpose(perm), [x], shapes=((N, 4, M, 6),))
    for shape in ((1, 5), (5, 1), (0, 5), (33, 65)):
        check_op(Transpose((1, 0)), [elements(FLOAT32, *shape)])


def test_joins() -> None:
    x = elements(FLOAT32, 3, 4, 5)
    for axis in range(3):
        check_op(Concat(axis), [x, x, x])
        check_op(Concat(axis), [x, x[:, :, :0].copy()] if axis == 2 else [x])
    check_op(Concat(2), [x[..., :1].copy(), x[..., :1].copy()])
    check_op(Concat(1), [x, x[:, :2].copy()], shapes=((N, M, 5), (N, 2, 5)))


def test_slices() -> None:
    x = elements(FLOAT32, 6, 7)
    check_op(Slice((0, 1), (1, 3), (6, 2)), [x])
    check_op(Slice((5, 6), (-1, -2), (6, 4)), [x])
    check_op(Slice((2, 0), (1, 1), (0, 7)), [x])
    check_op(Slice((1, 0), (1, 1), (4, 7)), [x], shapes=((N, M),))
    symbolic, fixed = Slice((1, M - 3), (2, 1), (2, 3)), Slice((1, 4), (2, 1), (2, 3))
    check_op(symbolic, [x], shapes=((N, M),), reference=fixed)
    backwards, plain = Slice((0, M - 1), (1, -1), (6, M)), Slice((0, 6), (1, -1), (6, 7))
    check_op(backwards, [x], shapes=((6, M),), reference=plain)
    check_op(
        Slice((N - 1, 0), (-1, 1), (N, M)),
        [x],
        shapes=((N, M),),
        native=False,
        reference=Slice((5, 0), (-1, 1), (6, 7)),
    )


def test_expansion_and_padding() -> None:
    check_op(Expand((7,)), [elements(FLOAT32, 1)])
    check_op(Expand((2, 2)), [elements(FLOAT32)])
    x = elements(FLOAT32, 3, 4, 5)
    check_op(Pad((1, 0, 2), (0, 2, 1)), [x, np.float32([7])])
    check_op(Pad((1, 0, 2), (0, 2, 1)), [x], shapes=((N, 4, M),))
    check_op(Pad((-1, 1, 2), (0, -2, 1)), [x], native=False)
    check_op(Pad((0, 0, 2), (0, 0, 1)), [x[:, :0].copy()])
    for mode in ("reflect", "edge", "wrap"):
        check_op(Pad((1, 0, 2), (0, 2, 1), mode), [x], native=False)


def test_gathers() -> None:
    x = elements(FLOAT32, 4, 5)
    for axis in (0, 1):
        check_op(Gather(axis), [x, np.array([[0, -1], [3, 2]])], native=False)
        check_op(Gather(axis), [x, np.array(-2)], native=False)
        check_op(Gather(axis), [x, np.zeros((0, 3), np.int64)], native=False)
    check_op(GatherElements(1), [x, np.array([[0, -1], [3, 2]])], native=False)


@pytest.mark.parametrize("index", [4, -5, 2**40])
def test_an_index_outside_is_an_error_with_a_name(index: int) -> None:
    graph = op_graph(Gather(0), [elements(FLOAT32, 4, 5), np.array([index])])
    with pytest.raises(ExecutionError, match=r"Test 'node': Gather of float32\[4, 5\], int64\[1\]"):
        run_graph(graph, {"x0": elements(FLOAT32, 4, 5), "x1": np.array([index])})


def test_strings_move_as_objects() -> None:
    words = np.array([["a", "bc"], ["", "ÿ"]], object)
    graph = graph_of({"x": (STRING, (N, 2))}, lambda b, x: b.emit(Concat(0), b.emit(Transpose((1, 0)), x), x))
    (found,) = run_graph(graph, {"x": words}).values()
    assert found.tolist() == [["a", ""], ["bc", "ÿ"], ["a", "bc"], ["", "ÿ"]]


def test_values_without_operands() -> None:
    graph = graph_of(
        {"x": (N,)}, lambda b, x: (b.emit(Iota(N + 1, INT64)), b.materialize(b.shape_constant([N, 2 * N])))
    )
    found = run_graph(graph, {"x": np.zeros(3, np.float32)})
    assert [array.tolist() for array in found.values()] == [[0, 1, 2, 3], [3, 6]]
    assert len(lowered(graph).steps) == 2
