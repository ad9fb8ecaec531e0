"""Native attention against the reference in float64: masks, causal rows, NaN, any number of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.fused_attention import emit_attention
from cpu_fallback.native import Target
from gpu_engine.ir.dims import Dim, symbol
from gpu_engine.ir.ops import Attention
from tests.kernel_runner import targets
from tests.node_runner import run_node

Array = NDArray[Any]
TARGETS = [pytest.param(target, id=f"{target.vector_nbytes * 8}") for target in targets()]
EXTENTS = st.one_of(st.integers(0, 33), st.sampled_from([47, 48, 49, 64, 100, 130]))
KEYS = st.one_of(EXTENTS, st.just(600))
LEADS = st.sampled_from([((), (), ()), ((2, 3),) * 3, ((2, 3), (2, 1), (1, 3)), ((4,), (), (1,)), ((0,), (0,), (0,))])


def floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def exact(op: Attention, operands: list[Array]) -> Array:
    wide = [array if array.dtype == bool else array.astype(np.float64) for array in operands]
    with np.errstate(all="ignore"):
        (result,) = op.evaluate(np, *wide)
    return np.asarray(result)


def assert_same(got: Array, truth: Array, tolerance: float = 1e-5) -> None:
    assert got.shape == truth.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(truth))
    np.testing.assert_allclose(got.astype(np.float64), truth, rtol=0, atol=tolerance)


def mask_of(kind: str, random: np.random.Generator, lead: tuple[int, ...], s: int, t: int) -> Array:
    if kind == "whole":
        return random.random((*lead, s, t)) < 0.7
    if kind == "added":
        return np.where(random.random((s, t)) < 0.3, -np.inf, random.standard_normal((s, t))).astype(np.float32)
    return np.where(random.random((*lead, 1, t)) < 0.3, -20, 0).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(
    target=st.sampled_from(targets()), leads=LEADS, s=EXTENTS, t=KEYS, d=EXTENTS, e=EXTENTS, threads=st.integers(1, 3),
    mask=st.sampled_from(["", "whole", "added", "row"]), causal=st.booleans(), zero_nan=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_shapes_and_masks(
    target: Target, leads: Any, s: int, t: int, d: int, e: int, threads: int, mask: str, causal: bool, zero_nan: bool,
    seed: int,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    operands = [floats(random, *lead, *tail) for lead, tail in zip(leads, ((s, d), (t, d), (t, e)), strict=True)]
    if mask:
        operands.append(mask_of(mask, random, leads[0], s, t))
    shapes: dict[int, tuple[Dim, ...]] = {}
    values = {name: extent for name, extent in (("s", s), ("t", t), ("d", d), ("e", e)) if extent > 0}
    for i, tail in enumerate(("sd", "td", "te")):
        extents = [symbol(name) if name in values else 0 for name in tail]
        shapes[i] = (*leads[i], *extents)
    op = Attention(1 / math.sqrt(max(1, d)), causal=causal, zero_nan=zero_nan)
    got = run_node(emit_attention, op, operands, target, threads=threads, shapes=shapes, values=values)
    assert_same(got, exact(op, operands))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("zero_nan", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_infinity(target: Target, zero_nan: bool, causal: bool, masked: bool) -> None:
    random = np.random.default_rng(5)
    op = Attention(0.5, causal=causal, zero_nan=zero_nan)
    for poison in range(6):
        q, k, v = floats(random, 20, 8), floats(random, 40, 8), floats(random, 40, 24)
        if poison == 1:
            q[3, 2] = np.nan
        elif poison == 2:
            k[30, 1] = np.inf
        elif poison == 3:
            v[35, 7], v[2, 1] = np.nan, np.inf
        elif poison == 4:
            q[:, 0], k[:, 0] = np.inf, -np.inf
        elif poison == 5:
            q *= 1e18
            k *= 1e18
        operands = [q, k, v]
        if masked:
            shown = random.random((20, 40)) < 0.5
            shown[7] = False
            operands.append(shown)
        assert_same(run_node(emit_attention, op, operands, target, threads=2), exact(op, [*operands]))


@pytest.mark.parametrize("target", TARGETS)
def test_a_negative_scale_and_a_finite_fill(target: Target) -> None:
    random = np.random.default_rng(6)
    operands = [floats(random, 3, 9, 5), floats(random, 3, 21, 5), floats(random, 3, 21, 17)]
    for op, extra in ((Attention(-0.7), []), (Attention(0.3, fill=-1e4), [random.random((3, 1, 21)) < 0.5])):
        assert_same(run_node(emit_attention, op, [*operands, *extra], target), exact(op, [*operands, *extra]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_halves(target: Target, dtype: Any) -> None:
    random = np.random.default_rng(8)
    q, k, v = (floats(random, 2, *shape).astype(dtype) for shape in ((11, 16), (37, 16), (37, 40)))
    mask = np.where(random.random((11, 37)) < 0.5, -8, 0).astype(dtype)
    op = Attention(0.25)
    got = run_node(emit_attention, op, [q, k, v, mask], target)
    assert got.dtype == dtype
    assert_same(got, exact(op, [q, k, v, mask]), 3 * float(ml_dtypes.finfo(dtype).eps))


def test_doubles_have_no_native_form() -> None:
    (target, *_) = targets()
    with pytest.raises(AssertionError, match="no native form"):
        run_node(emit_attention, Attention(1.0), [np.ones((2, 2))] * 3, target)
