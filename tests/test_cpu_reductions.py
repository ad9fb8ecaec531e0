"""Native reductions, softmax and layer normalisation against their references."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_fallback.native import Target
from cpu_fallback.reductions import reduce_call
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT32,
    INT64,
    UINT8,
    UINT64,
    DType,
    is_float,
)
from gpu_engine.ir.ops import LayerNorm, Reduce, Softmax
from tests.cpu_execution import check_op, lowered, op_graph, run_graph
from tests.kernel_runner import guarded, guards_hold, run_native, targets
from tests.reference import graph_of

Array = NDArray[Any]
X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
KINDS = ("sum", "mean", "prod", "min", "max")
by_target = pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes * 8} bits")
LOOSE = {FLOAT16: 2e-3, BFLOAT16: 2e-2, FLOAT32: 2e-6, FLOAT64: 1e-12}


def normal(*shape: int, dtype: DType = FLOAT32, seed: int = 0) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * 2, FLOAT32).astype(dtype)


def run_reduce(op: Reduce, operands: list[Array], target: Target, threads: int = 1) -> Array:
    """The native kernel on a target, inside guard bytes."""
    graph = op_graph(op, operands)
    (node,) = graph.nodes
    shape = tuple(int(extent) for extent in node.outputs[0].shape)  # type: ignore[arg-type]
    out, memory = guarded(shape, node.outputs[0].dtype)
    call = reduce_call(op, [(i, array.shape) for i, array in enumerate(operands)], len(operands), node)
    assert call is not None
    run_native(call, [*operands, out], target, threads)
    assert guards_hold(memory)
    return out


def compare(op: Reduce, operands: list[Array], target: Target, threads: int = 1, tolerance: float = 2e-6) -> None:
    actual = run_reduce(op, operands, target, threads)
    with np.errstate(all="ignore"):
        (expected,) = op.evaluate(np, *operands)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if is_float(actual.dtype):
        np.testing.assert_allclose(actual.astype(float), expected.astype(float), rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(actual, expected)


@by_target
def test_every_set_of_axes(target: Target) -> None:
    for shape in ((2, 3, 4, 5), (3, 1, 33), (17, 300), (7,), (), (4, 0, 3)):
        for count in range(len(shape) + 1):
            for axes in itertools.combinations(range(len(shape)), count):
                for kind in ("sum", "max"):
                    compare(Reduce(kind, axes, bool(count % 2)), [normal(*shape)], target)


@by_target
@pytest.mark.parametrize("kind", KINDS)
def test_every_tail(kind: str, target: Target) -> None:
    for count, threads in itertools.product((0, 1, 2, 7, 15, 16, 17, 33), (1, 3)):
        compare(Reduce(kind, (1,), False), [normal(3, count)], target, threads)
        compare(Reduce(kind, (0,), False), [normal(3, count)], target, threads)


@pytest.mark.parametrize("dtype", (FLOAT64, FLOAT16, BFLOAT16, INT8, INT32, INT64, UINT8, UINT64), ids=str)
def test_every_element_type(dtype: DType) -> None:
    x = normal(4, 5, 37, dtype=FLOAT32).astype(dtype) if dtype.kind != "u" else np.abs(normal(4, 5, 37)).astype(dtype)
    for kind in KINDS if is_float(dtype) else ("sum", "prod", "min", "max"):
        for axes in ((1,), (2,), (0, 2)):
            compare(Reduce(kind, axes, True), [x], targets()[0], tolerance=LOOSE.get(dtype, 0))


def test_what_has_no_kernel_runs_as_arrays() -> None:
    check_op(Reduce("mean", (0,), False), [np.arange(12).reshape(3, 4)], native=False)
    check_op(Reduce("min", (0,), False), [np.array([[True, False], [True, True]], BOOL)], native=False)
    check_op(Reduce("sum", (0,), False), [np.arange(6).reshape(3, 2).astype(np.complex64)], native=False)


@by_target
def test_expressions_before_and_after(target: Target) -> None:
    variance = Reduce("mean", (2,), True, (X - Y) * (X - Y), expr.sqrt(X + 1e-5))
    compare(variance, [normal(4, 5, 37), normal(5, 1, seed=1)], target)
    for axes in ((0,), (1,), (0, 1), (1, 2)):
        compare(dataclasses.replace(variance, axes=axes), [normal(4, 5, 37), normal(5, 1, seed=1)], target)
    counted = Reduce("sum", (1,), False, expr.cast(X > 0, INT32), expr.cast(expr.arg(0, INT32), FLOAT32) * 0.5)
    compare(counted, [normal(5, 70)], target)


@by_target
def test_nan_and_infinity_come_through(target: Target) -> None:
    x = normal(6, 40)
    x[1, 3], x[2, 17], x[3, 0], x[4, 39], x[5, 5:7] = np.nan, np.inf, -np.inf, np.nan, (np.inf, -np.inf)
    for kind, axes in itertools.product(KINDS, ((0,), (1,), (0, 1))):
        compare(Reduce(kind, axes, False), [x], target)
    assert np.isnan(run_reduce(Reduce("max", (1,), False), [x], target)).tolist() == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_sums_are_as_near_as_numpy() -> None:
    x = np.random.default_rng(1).uniform(0, 1, 1 << 20).astype(np.float32)
    exact = x.astype(np.float64).sum()
    for axes, shape in (((0,), (1 << 20,)), ((0,), (1 << 18, 4)), ((1,), (4, 1 << 18))):
        part = x.reshape(shape)
        found = run_reduce(Reduce("sum", axes, False), [part], targets()[0]).astype(np.float64).sum()
        plain = part.sum(axis=axes).astype(np.float64).sum()
        assert abs(found - exact) <= abs(plain - exact) + 1e-7 * exact


def test_extents_that_binding_tells() -> None:
    n, m = dims.symbol("n"), dims.symbol("m")
    for kind in KINDS:
        for axes in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
            check_op(Reduce(kind, axes, False), [normal(2, 3, 19)], 2e-6, shapes=((n, 3, m),))
            check_op(Reduce(kind, axes, True), [normal(1, 3, 1)], 2e-6, shapes=((n, 3, m),))
    check_op(
        Reduce("sum", (1,), False, X * Y), [normal(2, 19), normal(1, 19)], 2e-6, shapes=((n, m), (dims.symbol("k"), m))
    )


@pytest.mark.parametrize("dtype", (FLOAT32, FLOAT64, FLOAT16, BFLOAT16), ids=str)
def test_softmax_rows(dtype: DType) -> None:
    n = dims.symbol("n")
    for log in (False, True):
        for count in (0, 1, 5, 16, 33, 1000):
            x = normal(2, 3, count, dtype=dtype) * dtype.type(4)
            check_op(Softmax(2, log), [x], 10 * LOOSE[dtype], shapes=((2, 3, n),))
    check_op(Softmax(1), [normal(3, 7, 1, dtype=dtype)], LOOSE[dtype])


def test_softmax_of_infinities() -> None:
    x = np.float32([[0, np.inf, 1], [-np.inf, 0, 1], [-np.inf, -np.inf, -np.inf], [np.nan, 1, 2], [3e38, -3e38, 0]])
    check_op(Softmax(1), [x])
    check_op(Softmax(1, log=True), [x])
    check_op(Softmax(0), [x], native=False)


@pytest.mark.parametrize("dtype", (FLOAT32, FLOAT64, FLOAT16, BFLOAT16), ids=str)
def test_layer_norm_rows(dtype: DType) -> None:
    n = dims.symbol("n")
    tolerance = 10 * LOOSE[dtype]
    for count in (1, 5, 33, 384):
        x, scale, bias = (normal(*shape, dtype=dtype) for shape in ((3, 2, count), (count,), (count,)))
        for centered in (True, False):
            op = LayerNorm(2, 1e-5, centered)
            check_op(op, [x, scale, bias], tolerance, shapes=((3, n, count), (count,), (count,)))
    for operands in ([x], [x, scale], [x, scale[:1].reshape(()), bias.reshape(1, -1)]):
        check_op(LayerNorm(2, 1e-5), operands, tolerance)


def test_layer_norm_over_several_axes() -> None:
    x = normal(3, 4, 5)
    check_op(LayerNorm(1, 1e-5), [x, normal(4, 5), normal(4, 5)], 1e-5)
    check_op(LayerNorm(1, 1e-5), [x, normal(5), normal(4, 1)], 1e-5, native=False)
    check_op(LayerNorm(1, 1e-5), [normal(0, 4)], 1e-5)


def test_row_kernels_may_overwrite_their_operand() -> None:
    """A chain whose tensors all die at once runs in one place and still gives the chain's result."""
    x = normal(4, 100)
    first = Softmax(1).evaluate(np, x)[0]
    expected = LayerNorm(1, 1e-5).evaluate(np, first)[0]
    graph = graph_of(
        {"x": (4, 100)}, lambda b, v: b.emit(LayerNorm(1, 1e-5), b.emit(Softmax(1), b.emit(Softmax(1, True), v)))
    )
    (actual,) = run_graph(graph, {"x": np.log(first)}).values()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    arena = lowered(graph).program.segments[0].arena
    assert arena.layout.regions.tolist() == [0, 0]
