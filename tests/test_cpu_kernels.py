"""Pointwise kernels: what native code computes is what `Expr.evaluate` says, on every target that runs here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.calls import Native
from cpu_fallback.maps import MapKernel, map_call
from cpu_fallback.native import LIBRARY, Target, host
from gpu_engine.errors import InputError
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
    compute_dtype,
    is_float,
    limits,
)
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Map
from tests.cpu_execution import DEVICE as CPU
from tests.cpu_execution import check_op, is_native, lowered, op_graph, run_slot
from tests.kernel_runner import guarded, guards_hold, run_map, run_native, targets

Array = NDArray[Any]
FLOATS = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
INTEGERS = (INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64)
by_target = pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes * 8} bits")
X = expr.arg(0, FLOAT32)


def samples(dtype: DType, count: int, seed: int = 0) -> Array:
    """Ordinary and extreme elements, shuffled."""
    generator = np.random.default_rng(seed)
    if dtype == BOOL:
        return generator.random(count) < 0.5
    if is_float(dtype):
        scale = generator.choice([1, 10, 1e3], count)
        array = (generator.standard_normal(count) * scale).astype(dtype)
        extremes: list[Any] = [0, -0.0, np.nan, np.inf, -np.inf, 1, -1, 0.5, 2.5, -2.5]
    else:
        low, high = (int(bound) for bound in limits(dtype))
        array = generator.integers(low, high, count, dtype, endpoint=True)
        array = np.where(generator.random(count) < 0.4, generator.integers(0, 4, count).astype(dtype), array)
        extremes = [0, 1, 2, low, high, low + 1, high - 1, low, low, low]
    array[: len(extremes)] = [dtype.type(value) for value in extremes[:count]]
    generator.shuffle(array)
    return array


def assert_equal(actual: Array, expected: Array, tolerance: float = 0.0) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if not is_float(actual.dtype):
        np.testing.assert_array_equal(actual, expected)
        return
    np.testing.assert_allclose(
        actual.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance and 1e-37
    )  # fmt: skip


BINARY = ("add", "sub", "mul", "div", "mod", "fmod", "min", "max", "lt", "le", "eq")
FLOAT_UNARY = (
    "neg",
    "abs",
    "sign",
    "floor",
    "ceil",
    "round",
    "sqrt",
    "isnan",
    "exp",
    "log",
    "tanh",
    "erf",
    "sin",
    "cos",
)
INTEGER_UNARY = ("neg", "abs", "sign", "not")
TOLERANCE = {FLOAT32: 5e-7, FLOAT64: 1e-14, FLOAT16: 1e-3, BFLOAT16: 8e-3}


def targets_and(dtypes: Sequence[DType], few: Sequence[DType]) -> list[Any]:
    """The host with all dtypes, every other target with a few."""
    own, *others = targets()
    pairs = [(own, dtype) for dtype in dtypes] + [(target, dtype) for target in others for dtype in few]
    return [pytest.param(dtype, target, id=f"{dtype} {target.vector_nbytes * 8} bits") for target, dtype in pairs]


@pytest.mark.parametrize(("dtype", "target"), targets_and((*FLOATS, *INTEGERS), (FLOAT32, FLOAT16, INT16, UINT64)))
def test_every_operation(dtype: DType, target: Target) -> None:
    x, y, count = expr.arg(0, dtype), expr.arg(1, dtype), 83
    a, b = samples(dtype, count, 1), samples(dtype, count, 2)
    cases = {op: expr.apply(op, x, y) for op in BINARY}
    cases |= {op: expr.apply(op, x) for op in (FLOAT_UNARY if is_float(dtype) else INTEGER_UNARY)}
    if not is_float(dtype):
        cases |= {op: expr.apply(op, x, y) for op in ("and", "or", "xor")}
    cases["where"] = expr.where(x < y, x, y)
    for name, root in cases.items():
        exact = name not in FLOAT_UNARY[8:] and dtype not in (FLOAT16, BFLOAT16)
        tolerance = 0.0 if exact or not is_float(dtype) else TOLERANCE[dtype]
        actual = run_map(root, [a, b], target)
        assert_equal(actual, expr.evaluate(root, [a, b]), tolerance)


@by_target
@pytest.mark.parametrize("dtype", (UINT8, UINT16, UINT32, UINT64), ids=str)
def test_shifts_lose_all_bits_beyond_the_width(dtype: DType, target: Target) -> None:
    a, b = samples(dtype, 70), (np.arange(70) % 70).astype(dtype)
    for op in ("shl", "shr"):
        root = expr.apply(op, expr.arg(0, dtype), expr.arg(1, dtype))
        assert_equal(run_map(root, [a, b], target), expr.evaluate(root, [a, b]))
    assert (
        run_map(expr.shift_left(expr.arg(0, UINT8), expr.arg(1, UINT8)), [np.uint8([255]), np.uint8([8])], target) == 0
    ).all()


@by_target
def test_integer_division_never_traps(target: Target) -> None:
    for dtype in INTEGERS:
        low = limits(dtype)[0]
        a, b = np.array([7, low, low, 0, 1], dtype), np.array([0, 0, -1 if dtype.kind == "i" else 0, 0, 2], dtype)
        quotient = run_map(expr.arg(0, dtype) / expr.arg(1, dtype), [a, b], target)
        assert quotient.tolist() == [0, 0, low if dtype.kind == "i" else 0, 0, 0]


@pytest.mark.parametrize(("source", "target"), targets_and((*FLOATS, *INTEGERS, BOOL), (FLOAT32, INT64)))
def test_every_cast(source: DType, target: Target) -> None:
    a = samples(source, 83)
    for to in (*FLOATS, *INTEGERS, BOOL):
        for saturate in (False, True):
            root = expr.cast(expr.arg(0, source), to, saturate=saturate)
            if map_call(root, [(0, (83,))], 1, (83,)) is not None:
                assert_equal(run_map(root, [a], target), expr.evaluate(root, [a]))
            else:
                assert saturate or (source, to) == (FLOAT64, FLOAT16), f"no native cast from {source} to {to}"


@by_target
def test_logic(target: Target) -> None:
    a, b = samples(BOOL, 83, 1), samples(BOOL, 83, 2)
    x, y = expr.arg(0, BOOL), expr.arg(1, BOOL)
    for root in (x & y, x | y, x ^ y, ~x, expr.equal(x, y), expr.minimum(x, y), expr.maximum(x, y)):
        assert_equal(run_map(root, [a, b], target), expr.evaluate(root, [a, b]))


@by_target
def test_every_tail(target: Target) -> None:
    roots = (X * 3 - 1, expr.cast(expr.cast(X, INT8), FLOAT32), expr.cast(X, BOOL), expr.exp(expr.cast(X, FLOAT64)))
    for count, root in itertools.product(range(34), roots):
        x = np.linspace(-3, 3, count, dtype=np.float32)
        assert_equal(run_map(root, [x], target), expr.evaluate(root, [x]), 1e-6)


@by_target
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_work(threads: int, target: Target) -> None:
    generator = np.random.default_rng(threads)
    for shapes in (((100,),), ((3, 50), (3, 1)), ((2, 3, 5), (3, 1)), ((1,),), ((4, 0), (4, 1))):
        operands = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
        root = X if len(operands) == 1 else X - expr.arg(1, FLOAT32)
        assert_equal(run_map(root, operands, target, threads), expr.evaluate(root, operands))


@by_target
def test_broadcasting_in_any_axis(target: Target) -> None:
    generator = np.random.default_rng(0)
    root = X * 2 + expr.arg(1, FLOAT32) - expr.arg(2, FLOAT32)
    full = (2, 3, 4, 5)
    for seen in itertools.product((False, True), repeat=4):
        partly = tuple(extent if here else 1 for extent, here in zip(full, seen, strict=True))
        for other in ((), (5,), (4, 1), (1, 1, 1, 1)):
            operands = [generator.standard_normal(shape).astype(np.float32) for shape in (full, partly, other)]
            assert_equal(run_map(root, operands, target), expr.evaluate(root, operands))
    for empty in ((0,), (3, 0), (0, 3), (2, 0, 3)):
        operands = [np.zeros(empty, np.float32), np.zeros((1,) * len(empty), np.float32), np.ones((), np.float32)]
        assert run_map(root, operands, target).shape == empty


def test_extents_that_turn_out_to_be_one() -> None:
    """Unequal symbols broadcast: which operand has the 1 is known only when they are bound."""
    a, b, c = (dims.symbol(name) for name in "abc")
    root = X - expr.arg(1, FLOAT32)
    shapes = ((a, 4, c), (b, 4, 1))
    graph = op_graph(Map(root), [np.zeros((1, 1, 1), np.float32)] * 2, shapes)
    plan = lowered(graph)
    assert is_native(plan)
    (stream,) = CPU.open(plan, 1, 1, 1)
    generator = np.random.default_rng(0)
    for left, right in (((3, 4, 5), (1, 4, 1)), ((1, 4, 2), (7, 4, 1)), ((3, 4, 1), (3, 4, 1)), ((1, 4, 6), (1, 4, 1))):
        operands = [generator.standard_normal(shape).astype(np.float32) for shape in (left, right)]
        (actual,) = run_slot(stream.slots[0], plan, operands)
        assert_equal(actual, operands[0] - operands[1])
    with pytest.raises(InputError, match=r"Test 'node'.*(2|3).*(2|3)"):
        run_slot(stream.slots[0], plan, [np.zeros((2, 4, 5), np.float32), np.zeros((3, 4, 1), np.float32)])
    stream.close()


def test_the_inner_axis_may_turn_out_to_be_one() -> None:
    n, m = dims.symbol("n"), dims.symbol("m")
    for left, right in (((2, 5), (2, 1)), ((2, 1), (2, 40)), ((2, 3), (2, 3)), ((2, 1), (2, 1))):
        operands = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in (left, right)]
        check_op(Map(X * expr.arg(1, FLOAT32)), operands, shapes=((2, n), (2, m)))


def test_literals_do_not_make_kernels() -> None:
    calls = [
        map_call(X * scale + shift, [(0, (dims.symbol("n"),))], 1, (dims.symbol("n"),))
        for scale, shift in ((0.3, 0.7), (0.2, 9.1))
    ]
    kernels = [call[0].kernel for call in calls if call is not None]
    assert len(kernels) == 2 and kernels[0] == kernels[1]
    assert run_map(X * 0.3 + 0.7, [np.float32([2])], host()) == np.float32(2) * np.float32(0.3) + np.float32(0.7)


def test_a_new_shape_is_the_same_kernel() -> None:
    n = dims.symbol("n")
    found = [map_call(X + 1, [(0, shape)], 1, shape) for shape in ((n, 3), (7,), (2 * n, 5, n))]
    assert len({call[0].kernel for call in found if call is not None}) == 1


def test_equal_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = __import__("cpu_fallback.native", fromlist=["compile_module"]).compile_module

    def counting(text: str, target: Target) -> Any:
        compiled.append(text)
        return original(text, target)

    monkeypatch.setattr("cpu_fallback.native.compile_module", counting)
    root = expr.exp(X * 0.123) - expr.tanh(X) * 5.25
    for _ in range(3):
        run_map(root, [np.ones(3, np.float32)], host())
    assert len(compiled) == 1


def test_unsupported_types_run_as_arrays() -> None:
    complex64 = np.dtype(np.complex64)
    x = (np.arange(6) + 1j).astype(complex64)
    check_op(Map(expr.arg(0, complex64) * expr.arg(1, complex64)), [x, x], native=False)
    e4m3 = np.dtype(__import__("ml_dtypes").float8_e4m3fn)
    check_op(Map(expr.cast(expr.arg(0, FLOAT32), e4m3)), [np.linspace(-5, 5, 9, dtype=np.float32)], native=False)
    check_op(
        Map(expr.apply("pow", expr.arg(0, INT32), expr.arg(1, INT32))),
        [np.int32([2, 3]), np.int32([5, 2])],
        native=False,
    )


def test_nan_is_neither_less_nor_lost() -> None:
    x = np.array([np.nan, 1, np.nan, 2], np.float32)
    y = np.array([1, np.nan, np.nan, 3], np.float32)
    for target in targets():
        for function in (expr.minimum, expr.maximum):
            assert np.isnan(run_map(function(X, expr.arg(1, FLOAT32)), [x, y], target)).tolist() == [
                True,
                True,
                True,
                False,
            ]
            assert np.isnan(run_map(function(X, 0.0), [x], target)).tolist() == [True, False, True, False]


def _expressions(leaves: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    unary = st.sampled_from(
        [expr.exp, expr.tanh, expr.sqrt, expr.erf, expr.sin, abs, expr.floor, expr.sigmoid, expr.sign]
    )
    binary = st.sampled_from(["add", "sub", "mul", "div", "min", "max"])

    def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.one_of(
            st.builds(lambda f, x: f(x), unary, inner),
            st.builds(expr.apply, binary, inner, inner),
            st.builds(lambda a, b, yes, no: expr.where(a < b, yes, no), inner, inner, inner, inner),
            st.builds(
                lambda x, dtype: expr.cast(expr.cast(x, dtype), FLOAT32),
                inner,
                st.sampled_from([FLOAT64, FLOAT16, BOOL]),
            ),
        )

    return st.recursive(leaves, grown, max_leaves=7)


LEAVES = st.one_of(
    st.integers(0, 2).map(partial(lambda dtype, i: expr.arg(i, dtype), FLOAT32)),
    st.floats(-9, 9, width=32).map(lambda value: expr.const(value, FLOAT32)),
)


def wide(root: Expr) -> Expr:
    """The same in float64, but for roundings that the expression asks for."""
    built: dict[Expr, Expr] = {}
    for node in expr.walk(root):
        if node.op == "arg":
            built[node] = expr.cast(expr.arg(node.value, FLOAT32), FLOAT64)
        elif node.op == "const":
            built[node] = expr.const(float(node.value), FLOAT64) if is_float(node.dtype) else node
        elif node.op == "cast" and node.dtype == BOOL:
            built[node] = expr.cast(built[node.args[0]], BOOL)
        elif node.op == "cast":
            built[node] = expr.cast(built[node.args[0]], FLOAT64)
        else:
            built[node] = expr.apply(node.op, *(built[child] for child in node.args))
    return built[root]


@settings(max_examples=60)
@given(_expressions(LEAVES), st.integers(0, 2**32 - 1), st.sampled_from(range(len(targets()))))
def test_random_expressions(root: Expr, seed: int, which: int) -> None:
    """Native float32 lies as near to float64 as NumPy's float32 does, within the functions' bounds."""
    if root.dtype != FLOAT32:
        root = expr.cast(root, FLOAT32)
    generator = np.random.default_rng(seed)
    operands = [generator.standard_normal(37).astype(np.float32) for _ in range(3)]
    actual = run_map(root, operands, targets()[which])
    plain = expr.evaluate(root, operands)
    with np.errstate(all="ignore"):
        exact = expr.evaluate(wide(root), operands)
        noise = np.abs(plain.astype(np.float64) - exact)
        error = np.abs(actual.astype(np.float64) - exact)
        scale = np.maximum(np.abs(exact), 1)
        near = (error <= 8 * noise + 2e-5 * scale) | (actual == plain) | (np.isnan(actual) & np.isnan(plain))
    stable = noise <= 1e-4 * scale
    assert near[stable].all(), (root, actual[stable & ~near], plain[stable & ~near])


@settings(max_examples=40)
@given(st.data())
def test_random_integer_expressions(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(INTEGERS))
    leaves = st.integers(0, 1).map(lambda i: expr.arg(i, dtype))
    ops = st.sampled_from(["add", "sub", "mul", "div", "mod", "fmod", "min", "max", "and", "or", "xor"])
    root = data.draw(st.recursive(leaves, lambda inner: st.builds(expr.apply, ops, inner, inner), max_leaves=6))
    operands = [samples(dtype, 41, seed) for seed in (1, 2)]
    target = data.draw(st.sampled_from(targets()))
    assert_equal(run_map(root, operands, target), expr.evaluate(root, operands))


def test_results_in_place() -> None:
    """A map may write over the operand that it reads element for element."""
    for target in targets():
        memory, whole = guarded((3, 21), FLOAT32)
        memory[...] = np.arange(63).reshape(3, 21)
        other = np.float32([[1], [2], [3]])
        found = map_call(X * expr.arg(1, FLOAT32), [(0, (3, 21)), (1, (3, 1))], 0, (3, 21))
        assert found is not None and found[1] == (0,)
        run_native(found[0], [memory, other], target)
        np.testing.assert_array_equal(memory, np.arange(63).reshape(3, 21) * other)
        assert guards_hold(whole)


def test_kernels_say_what_they_are() -> None:
    found = map_call(expr.sigmoid(X), [(0, (4,))], 1, (4,))
    assert found is not None and isinstance(found[0], Native)
    kernel = found[0].kernel
    assert isinstance(kernel, MapKernel) and "exp" in kernel.text
    assert LIBRARY.addresses([kernel], host())[kernel] != 0
    assert compute_dtype(FLOAT16) == FLOAT32
