"""Pointwise kernels for the GPU: what every operation, conversion and way of walking operands gives, and their code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")

from gpu_engine.gpu.maps import Walked, emit_walk
from gpu_engine.gpu.offline import Resources, compiled, problems, resources
from gpu_engine.gpu.program import with_program
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DType,
    is_float,
)
from gpu_engine.ir.graph import Node, TensorType
from gpu_engine.ir.ops import Map
from gpu_engine.plan.lower import NOT_BATCHED, Lowering, lower_graph
from tests.gpu_runner import execute, graph_of, kernels, lowered, run_op

Array = NDArray[Any]
FLOATS = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
INTEGERS = (INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64)
EVERY = (*FLOATS, *INTEGERS, BOOL)
ROUNDED = ("neg", "abs", "sign", "floor", "ceil", "sqrt", "isnan", "not")
UNARY = (
    *ROUNDED, "round", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh",
    "acosh", "atanh", "erf",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "mod", "fmod", "pow", "min", "max", "lt", "le", "eq", "and", "or", "xor", "shl", "shr",
)  # fmt: skip
TOLERANCE = {FLOAT32: 2e-5, FLOAT64: 1e-12, FLOAT16: 2e-3, BFLOAT16: 1e-2}
N, S, H, W = map(dims.symbol, "NSHW")

names = [str(dtype) for dtype in EVERY]


def numbers(dtype: DType, seed: int, shape: Sequence[int] = (257,)) -> Array:
    """Random elements, the special ones of the type among them."""
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == BOOL:
        return generator.integers(0, 2, shape).astype(bool)
    if is_float(dtype):
        special = np.array([0, -0.0, np.nan, np.inf, -np.inf, 1, -1, 1e30, 2.5, -0.5])
        with np.errstate(over="ignore"):
            x, special = (generator.normal(size=count) * 3).astype(dtype), special.astype(dtype)
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        x = generator.integers(low, high, count, dtype=dtype, endpoint=True)
        special = np.array([0, 1, high, low, 2, 3, 7], dtype)
    x[: len(special)] = special[:count]
    generator.shuffle(x)
    return x.reshape(shape)


def assert_same(found: Array, wanted: Array) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if not is_float(wanted.dtype):
        np.testing.assert_array_equal(found, wanted)
        return
    rtol = TOLERANCE[wanted.dtype]
    np.testing.assert_allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=rtol, atol=1e-6)


def check(op: Map, arrays: Sequence[Array], types: Sequence[TensorType] | None = None, seed: int = 0) -> None:
    with np.errstate(all="ignore"):
        (wanted,) = op.evaluate(np, *arrays)
    assert_same(run_op(op, arrays, types, seed)[0], wanted)


def applied(name: str, dtype: DType) -> Map | None:
    """None where the operation has no meaning for the type, or rightly no kernel."""
    if not is_float(dtype) and name in ("pow", "round", "sqrt", "floor", "ceil", "isnan", *UNARY[len(ROUNDED) :]):
        return None
    if is_float(dtype) and name in ("and", "or", "xor", "not", "shl", "shr"):
        return None
    if dtype == BOOL and name not in ("and", "or", "xor", "not", "eq", "min", "max", "lt", "le"):
        return None  # no ONNX operator computes with truth values
    return Map(expr.apply(name, *(expr.arg(i, dtype) for i in range(1 if name in UNARY else 2))))


@pytest.mark.parametrize("dtype", EVERY, ids=names)
@pytest.mark.parametrize("name", UNARY + BINARY)
def test_any_operation(name: str, dtype: DType) -> None:
    op = applied(name, dtype)
    if op is not None:
        check(op, [numbers(dtype, seed) for seed in range(1 if name in UNARY else 2)])


@pytest.mark.parametrize("target", EVERY, ids=names)
@pytest.mark.parametrize("source", EVERY, ids=names)
def test_any_conversion(source: DType, target: DType) -> None:
    if source == target:
        return
    for saturate in (False, True):
        if saturate and target == BOOL:
            continue  # nothing saturates to a truth value
        check(Map(expr.cast(expr.arg(0, source), target, saturate=saturate)), [numbers(source, 3)])


def test_three_way() -> None:
    condition, x, y = expr.arg(0, BOOL), expr.arg(1, FLOAT16), expr.arg(2, FLOAT16)
    arrays = [numbers(BOOL, 0), numbers(FLOAT16, 1), numbers(FLOAT16, 2)]
    check(Map(expr.where(condition, x * y, x)), arrays)


def added(dtype: DType = FLOAT32) -> Map:
    return Map(expr.arg(0, dtype) + expr.arg(1, dtype))


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((), ()), ((1,), (1,)), ((0,), (0,)), ((3, 0, 5), (5,)), ((7,), ()), ((33,), (33,)), ((1500,), (1,)),
        ((3, 768), (768,)), ((2, 5, 10), (10,)), ((2, 3, 7, 7), (3, 1, 1)), ((2, 3, 8, 8), (3, 1, 1)),
        ((4, 1, 6), (5, 1)), ((130, 1), (1, 70)), ((2, 3, 4, 5, 6), (3, 1, 5, 1)), ((1, 2049), (3, 1)),
        ((5, 48), (5, 1)), ((1, 1, 12), (9, 1, 1)),
    ],
)  # fmt: skip
def test_any_broadcast(one: tuple[int, ...], other: tuple[int, ...], seed: int) -> None:
    check(added(), [numbers(FLOAT32, 0, one), numbers(FLOAT32, 1, other)], seed=seed)
    check(added(INT8), [numbers(INT8, 0, other), numbers(INT8, 1, one)], seed=seed)


@pytest.mark.parametrize(
    ("kinds", "bindings"),
    [
        (((N, 5), (N, 5)), [((n, 5), (n, 5)) for n in (1, 3, 205, 410)]),
        (((N, 768), (768,)), [((n, 768), (768,)) for n in (1, 5)]),
        (((N, S), (1, S)), [((4, 33), (1, 33)), ((1, 1), (1, 1)), ((70, 129), (1, 129))]),
        (((N, S), (H, S)), [((4, 9), (1, 9)), ((4, 9), (4, 9)), ((1, 9), (4, 9))]),
        (((N, 3, H, W), (3, 1, 1)), [((2, 3, 5, 7), (3, 1, 1)), ((1, 3, 16, 16), (3, 1, 1))]),
        (((N, 12, S, S), (N, 1, 1, S)), [((2, 12, 9, 9), (2, 1, 1, 9)), ((1, 12, 1, 1), (1, 1, 1, 1))]),
        (((N, 7), (N, 1)), [((n, 7), (n, 1)) for n in (1, 150)]),
    ],
)
def test_symbolic_extents(kinds: Any, bindings: Any) -> None:
    """One plan, several shapes, extents of 1 among them."""
    op = added()
    shape_of = [TensorType(FLOAT32, shape) for shape in kinds]
    plan = lowered(graph_of(op, shape_of))
    for seed, shapes in enumerate(bindings):
        arrays = [numbers(FLOAT32, i + seed, shape) for i, shape in enumerate(shapes)]
        assert_same(execute(plan, arrays, seed)[0], op.evaluate(np, *arrays)[0])


def test_an_operand_that_is_used_twice_and_one_that_is_not() -> None:
    x, y = expr.arg(0, FLOAT32), expr.arg(2, FLOAT32)
    arrays = [numbers(FLOAT32, i, (3, 40)) for i in range(3)]
    check(Map(expr.exp(x) * x + y), arrays)


def test_takes_over_an_operand() -> None:
    (step,) = lowered(graph_of(added(), [TensorType(FLOAT32, (N, 8)), TensorType(FLOAT32, (8,))])).steps
    assert step.in_place == (0,)


@pytest.mark.parametrize("shape", [(70, 33), (3, 130), (64, 64), (1, 5), (40, 2)])
@pytest.mark.parametrize("dtype", (FLOAT32, INT8, FLOAT64), ids=str)
def test_transposed_operand(shape: tuple[int, int], dtype: DType) -> None:
    """Two walks of different order through one tile."""
    x, y = numbers(dtype, 0, shape[::-1]), numbers(dtype, 1, shape)

    def lower(lowering: Lowering, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        turned, straight = Walked(inputs[0], (1, shape[0])), Walked(inputs[1], (shape[1], 1))
        out = Walked(outputs[0], (shape[1], 1))
        emit_walk(lowering, "both", added(dtype).expr, [turned, straight], out, shape)

    graph = graph_of(added(dtype), [TensorType(dtype, shape)] * 2)
    plan = with_program(lower_graph(graph, NOT_BATCHED, lower))
    with np.errstate(all="ignore"):
        assert_same(execute(plan, [x.reshape(shape), y])[0], x.T + y)


def test_nan_goes_through_min_and_max() -> None:
    x = np.array([np.nan, 1, np.nan, -2], np.float32)
    y = np.array([1, np.nan, np.nan, 3], np.float32)
    for name in ("min", "max"):
        (found,) = run_op(Map(expr.apply(name, expr.arg(0, FLOAT32), expr.arg(1, FLOAT32))), [x, y])
        assert np.isnan(found[:3]).all() and found[3] == (-2 if name == "min" else 3)


def machine_code(op: Any, *kinds: TensorType) -> Resources:
    """The one kernel of an operation, compiled for sm_90 without anything to complain about."""
    (kernel,) = kernels(lowered(graph_of(op, kinds)))
    binary = compiled(kernel, 90)
    used = resources(binary)
    assert problems(kernel, binary, used, 90) == []
    return used


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((N, 768), (N, 768)), ((64, 768), (64, 768)), ((N, S), (N, S)), ((N, 5), (N, 5)), ((N, 768), (768,)),
        ((N, S, 768), (N, S, 1)), ((N, 64, 56, 56), (64, 1, 1)), ((N, 64, 7, 7), (64, 1, 1)), ((N, 10), (10,)),
    ],
)  # fmt: skip
def test_loads_of_16_bytes(one: Any, other: Any) -> None:
    used = machine_code(added(), TensorType(FLOAT32, one), TensorType(FLOAT32, other))
    assert used.load_bits == 128
    assert any(text.startswith("STG.E") and text.endswith("128") for text in used.instructions)
    assert used.registers <= 64


@pytest.mark.parametrize("dtype", (FLOAT16, INT8), ids=str)
def test_narrow_loads_of_16_bytes(dtype: DType) -> None:
    assert machine_code(added(dtype), TensorType(dtype, (N, S)), TensorType(dtype, (N, S))).load_bits == 128
