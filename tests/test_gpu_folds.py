"""Reductions, running totals, softmax and norms on the GPU beside their references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")

from gpu_engine.gpu.offline import Resources, compiled, problems, resources
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, UINT64, DType, is_float
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import ArgReduce, LayerNorm, LocalResponseNorm, Reduce, Softmax
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.running import accumulate
from tests.gpu_runner import graph_of, kernels, lowered, run_op

FLOATS = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
TOLERANCES = {2: 2e-2, 4: 4e-5, 8: 1e-11}
M, N = dims.symbol("m"), dims.symbol("n")
X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def random(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], special: int = 0) -> NDArray[Any]:
    """With so many elements that are NaN or infinite."""
    if dtype == BOOL:
        return rng.integers(0, 2, shape).astype(bool)
    if not is_float(dtype):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    x = rng.normal(size=shape)
    if special:
        x.flat[rng.integers(0, x.size, special)] = rng.choice([np.nan, np.inf, -np.inf], special)
    return x.astype(dtype)


def check(op: Any, arrays: list[NDArray[Any]], types: list[TensorType] | None = None, seed: int = 0) -> None:
    wide = [array.astype(np.float64) if is_float(array.dtype) else array for array in arrays]
    with np.errstate(all="ignore"):
        wanted = op.evaluate(np, *wide)[0]
    found = run_op(op, arrays, types, seed)[0]
    assert found.shape == wanted.shape
    if not is_float(found.dtype):
        np.testing.assert_array_equal(found, wanted)
        return
    tolerance = TOLERANCES[arrays[0].dtype.itemsize]
    np.testing.assert_allclose(found.astype(np.float64), wanted, tolerance, tolerance)


@pytest.mark.parametrize("dtype", [*FLOATS, INT8, INT32, UINT64, BOOL], ids=str)
@pytest.mark.parametrize("kind", ["sum", "mean", "prod", "min", "max"])
def test_reduce(rng: np.random.Generator, dtype: DType, kind: str) -> None:
    shapes = [
        ((3, 5), (1,)),
        ((2, 33, 4), (1,)),
        ((2, 3, 7), (0, 2)),
        ((4, 0), (1,)),
        ((0, 4), (1,)),
        ((2, 2100), (1,)),
    ]
    # the reference has no mean of more elements than the type can count
    for shape, axes in shapes[:-1] if (kind, dtype) == ("mean", INT8) else shapes:
        special = int(kind != "prod" and is_float(dtype) and 0 not in shape and rng.integers(2))
        check(Reduce(kind, axes, bool(rng.integers(2))), [random(rng, dtype, shape, special)])


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, INT8], ids=str)
@pytest.mark.parametrize("kind", ["sum", "min", "max"])
def test_few_results_of_many_elements_take_two_launches(rng: np.random.Generator, dtype: DType, kind: str) -> None:
    for shape, axes in [((40000,), (0,)), ((30000, 3), (0,))]:
        op = Reduce(kind, axes, False)
        assert len(kernels(lowered(graph_of(op, [TensorType(dtype, shape)])))) == 2
        x = random(rng, dtype, shape)
        check(op, [x * dtype.type(0.01) if is_float(dtype) else x], seed=int(rng.integers(9)))


def test_reduce_with_expressions(rng: np.random.Generator) -> None:
    a, b = random(rng, FLOAT32, (3, 4, 70)), random(rng, FLOAT32, (3, 1, 1))
    check(Reduce("mean", (1, 2), False, (X - Y) * (X - Y), expr.sqrt(X + 1)), [a, b])
    check(Reduce("max", (0,), False, expr.where(X < Y, 1.0, X)), [a, b])
    check(Reduce("sum", (0, 1), False, None, expr.cast(X, FLOAT64)), [random(rng, FLOAT32, (3, 30))])


def test_one_plan_reduces_any_extents(rng: np.random.Generator) -> None:
    for shape in [(1, 1), (3, 1030), (40, 33)]:
        for axes in [(0,), (1,), (0, 1)]:
            check(Reduce("mean", axes, True), [random(rng, FLOAT32, shape)], [TensorType(FLOAT32, (M, N))], seed=1)


@pytest.mark.parametrize("dtype", [*FLOATS, INT8, UINT64, BOOL], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_arg_reduce(rng: np.random.Generator, dtype: DType, last: bool) -> None:
    for shape, axis in [((3, 5), 1), ((2, 33, 4), 1), ((2, 1500), 1), ((0, 4), 1)]:
        for kind in ("min", "max"):
            x = random(rng, dtype, shape, int(is_float(dtype) and 0 not in shape and rng.integers(3)))
            x[:, ::2] = x[:, :1]
            op = ArgReduce(kind, axis, False, last)
            np.testing.assert_array_equal(run_op(op, [x])[0], op.evaluate(np, x)[0])


@pytest.mark.parametrize("last", [False, True])
def test_arg_reduce_in_two_launches(rng: np.random.Generator, last: bool) -> None:
    for dtype in (FLOAT32, INT8):
        x = random(rng, dtype, (2, 30001), 2 * is_float(dtype))
        op = ArgReduce("max", 1, True, last)
        np.testing.assert_array_equal(run_op(op, [x])[0], op.evaluate(np, x)[0])


def running(kind: TensorType, axis: int, form: str = "sum", exclusive: int = 0, reverse: int = 0) -> Array:
    attributes = (("axis", axis), ("kind", form), ("exclusive", exclusive), ("reverse", reverse))
    return Array(accumulate, (kind,), attributes)


def check_running(x: NDArray[Any], axis: int, kind: TensorType | None = None, **how: Any) -> None:
    op = running(TensorType(x.dtype, x.shape), axis, **how)
    wide = x.astype(np.float64) if is_float(x.dtype) else x
    wanted = accumulate(np, wide, **dict(op.attributes))
    (found,) = run_op(running(kind, axis, **how) if kind else op, [x], [kind] if kind else None, seed=3)
    assert found.dtype == x.dtype
    if is_float(x.dtype):
        tolerance = TOLERANCES[x.dtype.itemsize]
        np.testing.assert_allclose(found.astype(np.float64), wanted, tolerance, tolerance * np.sqrt(x.shape[axis]))
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", [*FLOATS, INT8, INT32, UINT64], ids=str)
@pytest.mark.parametrize("form", ["sum", "prod"])
def test_running_totals(rng: np.random.Generator, dtype: DType, form: str) -> None:
    for shape, axis in [
        ((5,), 0),
        ((3, 33), 1),
        ((40, 2, 3), 0),
        ((2, 7, 5), 1),
        ((2, 1), 1),
        ((0, 4), 1),
        ((4, 0), 1),
    ]:
        how = {"form": form, "exclusive": int(rng.integers(2)), "reverse": int(rng.integers(2))}
        check_running(
            random(rng, dtype, shape, int(is_float(dtype) and 0 not in shape and rng.integers(2))), axis, **how
        )


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_long_running_totals(rng: np.random.Generator, exclusive: int, reverse: int) -> None:
    """Blocks with a carry, then programs that share an axis, which takes two launches."""
    for dtype, shape, axis, launches in (
        (FLOAT32, (2, 5000), 1, 1), (INT32, (300, 3), 0, 1), (FLOAT32, (20001,), 0, 2), (FLOAT16, (9001, 2), 0, 2),
    ):  # fmt: skip
        x = random(rng, dtype, shape)
        kind = TensorType(dtype, shape)
        how = {"exclusive": exclusive, "reverse": reverse}
        assert len(kernels(lowered(graph_of(running(kind, axis, **how), [kind])))) == launches
        check_running(x * dtype.type(0.1) if is_float(dtype) else x, axis, **how)
    check_running(rng.choice([1, -1, 2, 0.5], 20001).astype(np.float64), 0, form="prod", exclusive=exclusive)


def test_one_plan_adds_up_any_extents(rng: np.random.Generator) -> None:
    for shape in [(1, 1), (3, 1030), (0, 5), (40, 33)]:
        for axis, exclusive, reverse in [(0, 0, 1), (1, 1, 0)]:
            x = random(rng, FLOAT32, shape)
            check_running(x, axis, TensorType(FLOAT32, (M, N)), exclusive=exclusive, reverse=reverse)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_softmax(rng: np.random.Generator, dtype: DType, log: bool) -> None:
    for shape, axis in [((3, 5), 1), ((2, 33, 4), 1), ((1, 1), 0), ((2, 20000), 1), ((2100, 3), 0)]:
        check(Softmax(axis, log), [random(rng, dtype, shape, int(rng.integers(2)))])


def test_softmax_of_rows_without_a_finite_element() -> None:
    x = np.full((3, 20000), -np.inf, np.float32)
    x[1, 5], x[2] = 1, np.nan
    check(Softmax(1), [x])
    check(Softmax(1), [x[:, :100].copy()])


def test_one_plan_takes_rows_of_any_length(rng: np.random.Generator) -> None:
    for shape in [(1, 1), (3, 1025), (5, 33)]:
        x, kind = random(rng, FLOAT32, shape), TensorType(FLOAT32, (M, N))
        check(Softmax(1), [x], [kind])
        check(Softmax(0), [x], [kind])
        check(LayerNorm(1, 1e-5), [x], [kind], seed=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("centered", [True, False])
def test_layer_norm(rng: np.random.Generator, dtype: DType, centered: bool) -> None:
    for shape, axis in [((3, 5), 1), ((2, 7, 4), 1), ((5, 1), 1), ((2, 17000), 1)]:
        x, tail = random(rng, dtype, shape), shape[axis:]
        affine = [random(rng, dtype, tail), random(rng, dtype, (1,) * len(tail))]
        check(LayerNorm(axis, 1e-5, centered), [x, *affine[: rng.integers(3)]])
    channels = [random(rng, dtype, (3, 1, 1)) for _ in range(2)]
    check(LayerNorm(2, 1e-5, centered), [random(rng, dtype, (2, 3, 8, 5)), *channels])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_local_response_norm(rng: np.random.Generator, dtype: DType) -> None:
    for size in (1, 2, 5, 40):
        check(LocalResponseNorm(1, size, 1e-1, 0.75, 1.0), [random(rng, dtype, (2, 7, 5))])


def machine_code(op: Any, *kinds: TensorType) -> Resources:
    kernel = kernels(lowered(graph_of(op, kinds)))[0]
    binary = compiled(kernel, 90)
    used = resources(binary)
    assert problems(kernel, binary, used, 90) == []
    return used


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_rows_are_loaded_16_bytes_at_a_time(dtype: DType) -> None:
    rows, weight = TensorType(dtype, (M, N, 768)), TensorType(dtype, (768,))
    for used in (
        machine_code(LayerNorm(2, 1e-5), rows, weight, weight),
        machine_code(Softmax(1), TensorType(dtype, (4096, 1000))),
        machine_code(Reduce("sum", (0, 1), False), TensorType(dtype, (8192, 4096))),
        machine_code(running(TensorType(dtype, (4096, 4096)), 1), TensorType(dtype, (4096, 4096))),
        machine_code(running(TensorType(dtype, (4096, 4096)), 0, reverse=1), TensorType(dtype, (4096, 4096))),
    ):
        assert used.load_bits == 128
        assert used.registers <= 64
