"""Softmax and LayerNorm of rows: every tail, special values, how exact they are."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_fallback.native import Target
from cpu_fallback.rows import lower_layer_norm, lower_softmax
from gpu_engine.ir.graph import Node, Op
from gpu_engine.ir.ops import LayerNorm, Softmax
from gpu_engine.plan.lower import Lowering
from tests.kernel_runner import targets
from tests.node_runner import run_node
from tests.test_vector_math import ulps

Array = NDArray[Any]
TARGETS = [pytest.param(target, id=f"{target.vector_nbytes * 8}") for target in targets()]
EXTENTS = (*range(1, 34), 63, 64, 65, 127, 128, 197, 200, 1000)
Buffers = tuple[int, ...]


def emit(lowering: Lowering, op: Any, node: Node, inputs: Buffers, outputs: Buffers, _: Target) -> bool:
    lower = lower_softmax if isinstance(op, Softmax) else lower_layer_norm
    return lower(lowering, op, node, inputs, outputs)


def run(op: Op, target: Target, *operands: Array) -> Array:
    return run_node(emit, op, operands, target)


def rows(extent: int, count: int = 3) -> Array:
    return np.random.default_rng(extent).standard_normal((count, extent), dtype=np.float32) * 3


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_tail(target: Target) -> None:
    for extent in EXTENTS:
        x, exact = rows(extent), rows(extent).astype(np.float64)
        np.testing.assert_allclose(run(Softmax(1), target, x), softmax(exact), rtol=2e-6, atol=1e-30)
        np.testing.assert_allclose(run(Softmax(1, log=True), target, x), np.log(softmax(exact)), rtol=0, atol=3e-6)
        scale, bias = rows(extent, 2)
        centered = exact - exact.mean(axis=1, keepdims=True)
        for part, operands in ((centered, (x, scale, bias)), (exact, (x, scale))):
            normal = part / np.sqrt((part**2).mean(axis=1, keepdims=True) + 1e-5)
            truth = normal * scale + (bias if len(operands) > 2 else 0)
            got = run(LayerNorm(1, 1e-5, centered=part is centered), target, *operands)
            np.testing.assert_allclose(got, truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda dtype: dtype.__name__)
def test_other_floats(dtype: Any) -> None:
    eps = float(ml_dtypes.finfo(dtype).eps)
    for extent in (1, 7, 33, 130):
        x = rows(extent).astype(dtype)
        exact = x.astype(np.float64)
        got = run(Softmax(1), targets()[0], x)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float64), softmax(exact), rtol=8 * eps, atol=1e-7)
        truth = (exact - exact.mean(axis=1, keepdims=True)) / np.sqrt(exact.var(axis=1, keepdims=True) + 1e-3)
        found = run(LayerNorm(1, 1e-3), targets()[0], x).astype(np.float64)
        np.testing.assert_allclose(found, truth, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("target", TARGETS)
def test_powers_below_one_are_exact_to_a_few_places(target: Target) -> None:
    """Two ulp, and as much more as rounding log2(e) shifts the logarithm: 0.22 ulp for a power of two."""
    x = np.linspace(-80, 0, 100_001, dtype=np.float32)
    got = run(Softmax(1), target, np.stack([np.zeros_like(x), x], axis=1))
    exact = softmax(np.stack([np.zeros_like(x), x], axis=1).astype(np.float64))
    wrong = ulps(got[:, 1], exact[:, 1])
    assert (wrong <= 4 + 0.3 * np.abs(x) / math.log(2)).all(), f"off by {wrong.max()}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("extent", [5, 40])
def test_special_values(target: Target, extent: int) -> None:
    x = rows(extent, 6)
    x[0, 1], x[1, -1], x[2, 0], x[3], x[4, :3] = np.nan, np.inf, -np.inf, -np.inf, (-1e38, 3e38, -3.4e38)
    with np.errstate(all="ignore"):
        truth = softmax(x.astype(np.float64))
    got = run(Softmax(1), target, x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(truth))
    np.testing.assert_allclose(got, truth, rtol=2e-6, atol=1e-30)
    assert (got[2, 0], got[4, 0]) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_large_mean_costs_no_more_than_the_rounding_of_the_row(target: Target) -> None:
    x = (rows(1000) + 1000).astype(np.float32)
    exact = x.astype(np.float64)
    truth = (exact - exact.mean(axis=1, keepdims=True)) / np.sqrt(exact.var(axis=1, keepdims=True) + 1e-5)
    assert np.abs(run(LayerNorm(1, 1e-5), target, x) - truth).max() < 3e-5
