"""LocalResponseNorm against sums written out, on every layout and target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.native import Target
from cpu_fallback.response_norms import response_norm_call
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, FLOAT64, DType
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import LocalResponseNorm
from tests.cpu_execution import check_op
from tests.kernel_runner import guarded, guards_hold, run_native, targets
from tests.test_cpu_layouts import check, conv

Array = NDArray[Any]
N, H, W = (dims.symbol(name) for name in "NHW")


def expected(op: LocalResponseNorm, x: Array) -> Array:
    """By the specification's formula, in float64, one channel at a time."""
    moved = np.moveaxis(x.astype(np.float64), op.axis, 0)
    result = np.empty_like(moved)
    for c in range(len(moved)):
        low, high = c - (op.size - 1) // 2, c + -(-(op.size - 1) // 2)
        total = (moved[max(low, 0) : high + 1] ** 2).sum(0)
        result[c] = moved[c] / (op.bias + op.alpha / op.size * total) ** op.beta
    return np.moveaxis(result, 0, op.axis)


def numbers(*shape: int, dtype: DType = FLOAT32) -> Array:
    return (4 * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, FLOAT16])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_the_reference(size: int, dtype: DType) -> None:
    op, x = LocalResponseNorm(1, size, 0.3, 0.75, 1.5), numbers(2, 7, 5, dtype=dtype)
    (found,) = op.evaluate(np, x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected(op, x), rtol={FLOAT32: 1e-5, FLOAT64: 1e-13}.get(dtype, 2e-3))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(targets()),
    st.tuples(st.integers(0, 3), st.integers(0, 40), st.one_of(st.just(1), st.integers(0, 33))),
    st.integers(1, 20),
    st.sampled_from([0.5, 0.75, 1.0, 0.6, 2.0]),
    st.integers(1, 3),
)
def test_the_kernel(target: Target, shape: tuple[int, int, int], size: int, beta: float, threads: int) -> None:
    op, x = LocalResponseNorm(1, size, 0.7, beta, 2.0), numbers(*shape)
    out, memory = guarded(shape, np.float32)
    run_native(response_norm_call(op, 0, 1, shape), [x, out], target, threads)
    assert guards_hold(memory)
    np.testing.assert_allclose(out, expected(op, x), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("axis", [1, 2])
def test_through_the_device(axis: int) -> None:
    x = numbers(2, 9, 11)
    op = LocalResponseNorm(axis, 5, 1e-2, 0.75, 1.0)
    check_op(op, [x], 1e-6)
    check_op(op, [x], 1e-6, [(N, 9, 11)])
    check_op(LocalResponseNorm(1, 40, 1e-2, 0.75, 1.0), [x], 1e-6, native=False)
    check_op(op, [x.astype(np.float64)], 1e-12, native=False)
    check_op(op, [numbers(0, 9, 11)])


def test_what_is_no_number_stays_in_its_window() -> None:
    x = numbers(1, 12, 9)
    x[0, 3, 2], x[0, 8, 4], x[0, 9, 7] = np.nan, np.inf, -np.inf
    for axis in (1, 2):
        check_op(LocalResponseNorm(axis, 3, 1.0, 0.75, 1.0), [x], 1e-6)


def test_between_convolutions_channels_stay_last() -> None:
    def build(b: Builder, x: Value) -> Value:
        return conv(b, b.emit(LocalResponseNorm(1, 5, 0.1, 0.75, 1.0), conv(b, x, 24)), 9)

    after = check(build, 2)
    assert any(isinstance(node.op, LocalResponseNorm) and node.op.axis == 3 for node in after.nodes)
