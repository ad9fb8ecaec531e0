"""Integer matrix products of the CPU device against exact sums: pairs of int16, bytes by fours, split weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback import recurrent
from cpu_fallback.byte_pairs import LIMIT, QUAD, split, split_all
from cpu_fallback.byte_products import emit_bytes
from cpu_fallback.calls import Native
from cpu_fallback.integer_products import emit_pairs, emit_rows
from cpu_fallback.native import Target, host
from cpu_fallback.recurrent_products import BYTES, PAIRS
from cpu_fallback.tiles import has_byte_pairs, has_dots
from gpu_engine.ir import expr
from gpu_engine.ir.dims import symbol
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT16, INT32, UINT8
from gpu_engine.ir.ops import MatMul
from tests.cpu_execution import check_op
from tests.kernel_runner import targets
from tests.node_runner import run_node
from tests.recurrent_cases import Case, native_plan, run_recurrent

Array = NDArray[Any]
pytestmark = pytest.mark.skipif(not host().x86, reason="integer kernels are for x86")
BYTE_TARGETS = [target for target in targets() if has_byte_pairs(target) and not has_dots(target)]
by_target = pytest.mark.parametrize("target", BYTE_TARGETS, ids=lambda target: f"{target.vector_nbytes * 8} bits")
EXTENTS = st.one_of(st.integers(1, 33), st.sampled_from([47, 48, 64, 97, 130]))
SCALED = expr.cast(expr.arg(0, INT32), FLOAT32) * expr.arg(1, FLOAT32)
REQUANTIZED = expr.cast(
    expr.round_even(expr.minimum(expr.maximum(SCALED, -28.0), 227.0)), INT16, saturate=True
)  # fmt: skip


def centred(random: np.random.Generator, *shape: int) -> Array:
    found = random.integers(-255, 256, shape)
    return np.where(random.random(shape) < 0.1, random.choice([-255, 255], shape), found).astype(INT16)


def exact(a: Array, b: Array) -> Array:
    return np.matmul(a.astype(np.int64), b.astype(np.int64)).astype(np.int32)


def scales(random: np.random.Generator, columns: int) -> Array:
    return (2.0 ** -random.integers(8, 14, columns)).astype(FLOAT32)


@settings(max_examples=60, deadline=None)
@given(
    m=EXTENTS, k=EXTENTS, n=EXTENTS, batch=st.sampled_from(((), (2,), (3, 2))), constant=st.booleans(),
    transposed=st.booleans(), whole=st.booleans(), target=st.sampled_from(targets()), threads=st.sampled_from((1, 3)),
)  # fmt: skip
def test_any_product_of_pairs(
    m: int, k: int, n: int, batch: tuple[int, ...], constant: bool, transposed: bool, whole: bool, target: Target,
    threads: int,
) -> None:  # fmt: skip
    if not constant and (m <= 4 or n == 1):
        m, n = m + 5, n + 1
    random = np.random.default_rng(m * 64 + k)
    a, b, scale = centred(random, *batch, m, k), centred(random, *batch, k, n), scales(random, n)
    stored = np.ascontiguousarray(b.swapaxes(-1, -2)) if transposed else b
    op = MatMul(False, transposed, None if whole else REQUANTIZED, INT32)
    operands = [a, stored] if whole else [a, stored, scale]
    expected = exact(a, b) if whole else expr.evaluate(REQUANTIZED, [exact(a, b), scale])
    found = run_node(
        emit_pairs, op, operands, target, threads=threads, constants=[1] if constant else [], result=expected.dtype
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    m=EXTENTS, k=EXTENTS, n=EXTENTS, transposed=st.booleans(), whole=st.booleans(),
    target=st.sampled_from(targets()), threads=st.sampled_from((1, 3)),
)  # fmt: skip
def test_any_rows_with_a_matrix(
    m: int, k: int, n: int, transposed: bool, whole: bool, target: Target, threads: int
) -> None:  # fmt: skip
    m, k, n = m + 5, 2 * k, n + 1
    random = np.random.default_rng(m * 64 + k)
    a, b, scale = centred(random, 2, m, k), centred(random, k, n), scales(random, n)
    op = MatMul(False, transposed, None if whole else REQUANTIZED, INT32)
    operands = [a, np.ascontiguousarray(b.T) if transposed else b] + [scale] * (not whole)
    expected = exact(a, b) if whole else expr.evaluate(REQUANTIZED, [exact(a, b), scale])
    batch, rows = symbol("batch"), symbol("rows")
    found = run_node(
        emit_rows, op, operands, target, threads=threads, constants=[1], result=expected.dtype,
        shapes={0: (batch, rows, k)}, values={"batch": 2, "rows": m},
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 9), (4, 64, 5), (9, 300, 1), (3, 1, 1), (5, 0, 3)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_products_that_have_no_pairs(m: int, k: int, n: int, transposed: bool, symbolic: bool) -> None:
    """Few rows or one column of two operands that are not constant, and depths that only running tells."""
    random = np.random.default_rng(k)
    a, b = centred(random, 2, m, k), centred(random, 2, k, n)
    stored = np.ascontiguousarray(b.swapaxes(-1, -2)) if transposed else b
    depth = symbol("depth")
    shapes = [(2, m, depth), (2, n, depth) if transposed else (2, depth, n)] if symbolic else None
    check_op(MatMul(False, transposed, None, INT32), [a, stored], 0, shapes)


def weights_of(random: np.random.Generator, depth: int, columns: int, great: float) -> Array:
    """Mostly small, some as great as they come."""
    small = random.integers(-50, 51, (depth, columns))
    return np.where(random.random(small.shape) < great, random.choice([-128, -127, 127], small.shape), small).astype(
        INT8
    )


@pytest.mark.skipif(not BYTE_TARGETS, reason="bytes go to a dot instruction, or to pairs")
@settings(max_examples=60, deadline=None)
@given(
    m=EXTENTS, k=EXTENTS, n=EXTENTS, great=st.sampled_from((0.0, 0.001, 0.01)), transposed=st.booleans(),
    target=st.sampled_from(BYTE_TARGETS or [None]), threads=st.sampled_from((1, 3)),
)  # fmt: skip
def test_any_product_of_bytes(
    m: int, k: int, n: int, great: float, transposed: bool, target: Target, threads: int
) -> None:  # fmt: skip
    random = np.random.default_rng(m * 64 + k)
    a = random.choice(np.array([0, 1, 128, 254, 255], UINT8), (2, m, k))
    b = weights_of(random, k, n, great)
    if split(b)[1] and len(split(b)[1]) * 6 > k:
        b = np.clip(b, -64, 64)
    op = MatMul(False, transposed, None, INT32)
    operands = [a, np.ascontiguousarray(b.T) if transposed else b]
    found = run_node(emit_bytes, op, operands, target, threads=threads, constants=[1], result=INT32)
    np.testing.assert_array_equal(found, exact(a, b))


@settings(max_examples=200, deadline=None)
@given(
    depth=st.integers(1, 33),
    columns=st.integers(1, 9),
    great=st.sampled_from((0.0, 0.02, 0.3, 1.0)),
    seed=st.integers(0, 999),
)
def test_split_weights_are_the_same_and_saturate_nowhere(depth: int, columns: int, great: float, seed: int) -> None:
    w = weights_of(np.random.default_rng(seed), depth, columns, great)
    rows, numbers = split(w)
    whole = -(-depth // QUAD) * QUAD
    assert len(rows) == whole + len(numbers) and len(numbers) % QUAD == 0 and rows.dtype == INT8
    sums = rows[:whole].astype(int)
    for row, number in zip(rows[whole:], numbers, strict=True):
        sums[number] += row
    np.testing.assert_array_equal(sums[:depth], w)
    pairs = rows.astype(int)[::2] + rows.astype(int)[1::2]
    assert np.abs(pairs).max() <= LIMIT and not sums[depth:].any()


def test_split_of_several_matrices_has_the_room_of_the_greatest() -> None:
    calm, wild = np.ones((8, 3), INT8), np.full((8, 3), 127, INT8)
    rows, numbers = split_all(np.stack((calm, wild)))
    assert rows.shape == (2, 8 + numbers.shape[1], 3) and numbers.shape == (2, 8)
    assert not numbers[0].any() and not rows[0, 8:].any()


@by_target
@pytest.mark.parametrize("dtype", [INT8, UINT8])
@pytest.mark.parametrize("hidden", [1, 3, 8, 17, 33, 64])
def test_quantised_layers_that_multiply_bytes(
    hidden: int, dtype: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As those that multiply pairs of int16, bit for bit."""
    case = Case("lstm", 4, 3, hidden, 2, weights=dtype)
    arrays = case.arrays()
    middle = 128 if dtype == UINT8 else 0
    small = np.random.default_rng(hidden).integers(-60, 61, arrays[1].shape) + middle
    if hidden > 12:
        small[0, 0, :2] = middle + 120
    arrays[1] = small.astype(dtype)
    assert form_kinds(case, arrays, target) == {BYTES}
    found = run_recurrent(case.op(), arrays, target, 2)
    monkeypatch.setattr(recurrent, "has_byte_pairs", lambda _: False)
    assert form_kinds(case, arrays, target) == {PAIRS}
    for actual, wanted in zip(found, run_recurrent(case.op(), arrays, target, 2), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def form_kinds(case: Case, arrays: list[Array], target: Target) -> set[str]:
    kernels = [step.kernel for step in native_plan(case.op(), arrays, target).steps]
    return {kernel.kernel.record.form.kind for kernel in kernels if isinstance(kernel, Native)}
