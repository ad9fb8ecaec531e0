"""Convolutions of the CPU device against float64: all algorithms, odd sizes, vector widths, teams of threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy, composite
from numpy.typing import NDArray

from cpu_fallback.conv_choice import best_winograd
from cpu_fallback.conv_lowering import emit_conv, emit_depthwise, emit_direct, emit_winograd, has_phases
from cpu_fallback.conv_weights import is_balanced
from cpu_fallback.native import Target, host
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Conv, ConvTranspose
from tests.kernel_runner import targets
from tests.layer_runner import Case, error, normal, run

Array = NDArray[Any]
TARGETS = targets()
TEAMS = st.sampled_from([1, 2, 3, 5])
QUICK = settings(max_examples=60, deadline=None)
SUMS = 3e-6
"""Rounding of sums of products of normal numbers, over the largest of them."""
WINOGRAD = {2: 3e-6, 4: 3e-5}
"""The same of F(m x m, 3 x 3), whose transforms have larger coefficients."""


def sums(*kinds: int) -> tuple[Expr, ...]:
    return tuple(expr.arg(i, FLOAT32) for i in range(len(kinds) + 1))


def biased(s: Expr, b: Expr) -> Expr:
    return s + b


def rectified(s: Expr, b: Expr) -> Expr:
    return expr.maximum(s + b, 0.0)


def residual(s: Expr, b: Expr, r: Expr) -> Expr:
    return expr.maximum(s + b + r, 0.0)


def scaled(s: Expr, b: Expr, c: Expr) -> Expr:
    return expr.clip((s + b) * 0.37 + 1.618, -1.5, 2.5) * c


def swish(s: Expr, b: Expr) -> Expr:
    return (s + b) * expr.sigmoid(s + b)


EPILOGUES: dict[Callable[..., Expr], str] = {biased: "c", rectified: "c", residual: "cf", scaled: "cs", swish: "c"}


def finished(op: Conv | ConvTranspose, x: Array, w: Array, function: Callable[..., Expr] | None, **more: Any) -> Case:
    """The case with this epilogue and operands of the shapes it takes."""
    plain = Case(op, x, w, **more)
    if function is None:
        return plain
    shape = plain.oracle.shape
    shapes = {"c": shape[-1:], "f": shape, "s": (1,)}
    extras = tuple(normal(100 + i, shapes[kind]) for i, kind in enumerate(EPILOGUES[function]))
    return Case(op, x, w, function(*sums(*map(ord, EPILOGUES[function]))), extras, **more)


@composite
def convolutions(draw: DrawFn, rank: int = 2) -> Case:
    """Any form: groups, strides, dilations, pads that differ or crop, images that are empty or as small as can be."""

    def each(values: SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(rank))

    group = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 40 // group))
    kernel, strides = each(st.integers(1, 5 if rank < 3 else 3)), each(st.integers(1, 3))
    dilations, before, after = each(st.sampled_from([1, 1, 2, 3])), each(st.integers(-1, 3)), each(st.integers(-1, 3))
    reach = tuple((k - 1) * d + 1 - b - a for k, d, b, a in zip(kernel, dilations, before, after, strict=True))
    extents = tuple(max(1, r) + draw(st.integers(0, 33 if rank < 3 else 9)) for r in reach)
    x = normal(0, (draw(st.integers(0, 3)), channels * group, *extents))
    op = Conv(strides, before, after, dilations, group)
    w = normal(1, (outputs * group, channels, *kernel))
    function = draw(st.sampled_from([None, *EPILOGUES]))
    return finished(op, x, w, function, planar=group == 1 and draw(st.booleans()))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.vector_nbytes}")
@given(case=convolutions(), team=TEAMS)
@QUICK
def test_direct(target: Target, case: Case, team: int) -> None:
    assert error(run(case, target, team, emit_direct), case.oracle) < SUMS


@given(case=st.one_of(convolutions(rank=1), convolutions(rank=3)), team=TEAMS)
@QUICK
def test_other_ranks(case: Case, team: int) -> None:
    assert error(run(case, host(), team, emit_direct), case.oracle) < SUMS


@pytest.mark.parametrize("width", [1, 5, 6, 7, 8, 13, 14, 15, 21, 28, 29, 33])
def test_rows_of_every_length(width: int) -> None:
    """Stretches of rows, pairs of half rows, and pixels as they come."""
    for target in TARGETS:
        op = Conv((1, 1), (1, 1), (1, 1), (1, 1))
        case = finished(op, normal(width, (2, 17, 5, width)), normal(2, (35, 17, 3, 3)), rectified)
        assert error(run(case, target, 2, emit_direct), case.oracle) < SUMS


@pytest.mark.parametrize("channels", [64, 1024, 2048])
def test_deep_pointwise(channels: int) -> None:
    case = finished(
        Conv((1, 1), (0, 0), (0, 0), (1, 1)), normal(0, (1, channels, 7, 7)), normal(1, (70, channels, 1, 1)), residual
    )
    assert error(run(case, host(), 1, emit_direct), case.oracle) < SUMS


@composite
def squares(draw: DrawFn) -> Case:
    """3 x 3 of stride 1, at least as many channels as any vector has lanes."""
    channels, outputs = draw(st.integers(16, 50)), draw(st.integers(1, 70))
    before, after = ((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(2))
    extents = [max(1, 3 - b - a) + draw(st.integers(0, 19)) for b, a in zip(before, after, strict=True)]
    x = normal(0, (draw(st.integers(0, 3)), channels, *extents))
    op = Conv((1, 1), before, after, (1, 1))
    return finished(op, x, normal(1, (outputs, channels, 3, 3)), draw(st.sampled_from([None, *EPILOGUES])))


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.vector_nbytes}")
@given(case=squares(), team=TEAMS)
@settings(max_examples=25, deadline=None)
def test_winograd(target: Target, m: int, case: Case, team: int) -> None:
    assert error(run(case, target, team, partial(emit_winograd, m=m)), case.oracle) < WINOGRAD[m]


@pytest.mark.parametrize("m", [2, 4])
def test_winograd_error_bound_of_deep_layers(m: int) -> None:
    scale = np.float32((9 * 512) ** -0.5)
    case = Case(Conv((1, 1), (1, 1), (1, 1), (1, 1)), normal(3, (1, 512, 12, 12)), normal(4, (64, 512, 3, 3)) * scale)
    assert error(run(case, host(), 1, partial(emit_winograd, m=m)), case.oracle) < WINOGRAD[m]
    assert error(run(case, host(), 1, emit_direct), case.oracle) < SUMS


@pytest.mark.parametrize("m", [2, 4])
def test_winograd_keeps_numbers_that_are_not_finite_inside_their_tiles(m: int) -> None:
    x = normal(0, (1, 16, 16, 16))
    x[0, 3, 8, 8] = np.nan
    case = Case(Conv((1, 1), (1, 1), (1, 1), (1, 1)), x, normal(1, (16, 16, 3, 3)))
    found = run(case, host(), 1, partial(emit_winograd, m=m))
    assert np.isnan(found[np.isnan(case.oracle)]).all()
    rows, columns = np.nonzero(np.isnan(found[0]).any(-1))
    reached = range(max(0, 7 // m * m), 9 // m * m + m)
    assert set(rows) | set(columns) <= set(reached)


@composite
def depthwise(draw: DrawFn) -> Case:
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    channels = draw(st.integers(1, 70))
    kernel = tuple(draw(st.integers(1, 7)) for _ in range(rank))
    strides, dilations = (tuple(draw(st.integers(1, 3)) for _ in range(rank)) for _ in range(2))
    before, after = (tuple(draw(st.integers(-1, 4)) for _ in range(rank)) for _ in range(2))
    reach = tuple((k - 1) * d + 1 - b - a for k, d, b, a in zip(kernel, dilations, before, after, strict=True))
    extents = tuple(max(1, r) + draw(st.integers(0, 17)) for r in reach)
    x = normal(0, (draw(st.integers(0, 2)), channels, *extents))
    op = Conv(strides, before, after, dilations, channels)
    return finished(op, x, normal(1, (channels, 1, *kernel)), draw(st.sampled_from([None, *EPILOGUES])))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.vector_nbytes}")
@given(case=depthwise(), team=TEAMS)
@QUICK
def test_depthwise(target: Target, case: Case, team: int) -> None:
    assert error(run(case, target, team, emit_depthwise), case.oracle) < SUMS


@composite
def transposed(draw: DrawFn) -> Case:
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    kernel = tuple(stride + draw(st.integers(0, 2)) for stride in strides)
    before, after = (tuple(draw(st.integers(0, 1)) for _ in range(rank)) for _ in range(2))
    extra = tuple(draw(st.integers(0, stride - 1)) for stride in strides)
    group = draw(st.sampled_from([1, 1, 2]))
    channels, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    extents = [draw(st.integers(3, 18 if rank < 3 else 6)) for _ in range(rank)]
    x = normal(0, (draw(st.integers(0, 2)), channels * group, *extents))
    op = ConvTranspose(strides, before, after, (1,) * rank, extra, group)
    w = normal(1, (channels * group, outputs, *kernel))
    return finished(op, x, w, draw(st.sampled_from([None, *EPILOGUES])))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.vector_nbytes}")
@given(case=transposed(), team=TEAMS)
@QUICK
def test_transposed(target: Target, case: Case, team: int) -> None:
    assert isinstance(case.op, ConvTranspose)
    assert has_phases(case.op, case.w.shape[2:])
    assert error(run(case, target, team), case.oracle) < SUMS


def test_results_without_a_tap_are_left_to_others() -> None:
    assert not has_phases(ConvTranspose((3, 3), (0, 0), (0, 0), (1, 1), (0, 0)), (2, 2))
    assert not has_phases(ConvTranspose((2,), (dims.symbol("p"),), (0,), (1,), (0,)), (2,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    """In the middle, at the edge beside padding, and in weights over padding, where 0 times infinity counts."""
    for group, emit in ((1, emit_direct), (20, emit_depthwise)):
        x, w = normal(0, (1, 20, 9, 9)), normal(1, (20, 20 // group, 3, 3))
        x[0, 2, 4, 4] = x[0, 7, 0, 8] = value
        w[3, 0, 0, 0] = value
        case = finished(Conv((1, 1), (1, 1), (1, 1), (1, 1), group), x, w, biased)
        for target in TARGETS:
            assert error(run(case, target, 1, emit), case.oracle) < SUMS


@pytest.mark.parametrize("value", [1e6, 1e37])
def test_a_weight_that_drowns_the_others_keeps_to_its_taps(value: float) -> None:
    """It meets only zeros: sums of other products must not feel it."""
    x, w = normal(0, (1, 32, 28, 28)), normal(1, (32, 32, 3, 3))
    x[0, 5] = 0
    w[7, 5, 1, 1] = value
    case = finished(Conv((1, 1), (1, 1), (1, 1), (1, 1), 1), x, w, biased)
    assert error(run(case, host(), 1, emit_conv), case.oracle) < SUMS


def test_the_choice_of_algorithm() -> None:
    """Winograd where it pays; never for few channels, strides, groups or weights that outweigh the image."""

    def chosen(channels: int, extent: dims.Dim, stride: int = 1, group: int = 1) -> int:
        op = Conv((stride, stride), (1, 1), (1, 1), (1, 1), group)
        shape = (dims.symbol("N"), extent, extent, channels)
        return best_winograd(op, (channels, channels // group, 3, 3), shape, shape, host())

    assert chosen(64, 56) == chosen(128, 28) == chosen(64, dims.symbol("H")) == 4
    assert chosen(3, 56) == chosen(64, 56, stride=2) == chosen(64, 56, group=2) == chosen(512, 2) == 0


def test_which_weights_are_balanced() -> None:
    """None that is so large that transforms drown the others in its rounding; zeros, as a residual branch starts with,
    drown nothing."""
    weights = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
    outlier, infinite = weights.copy(), weights.copy()
    outlier[0, 0, 0, 0], infinite[0, 0, 0, 0] = 1e5, np.nan
    assert is_balanced(weights) and is_balanced(np.zeros_like(weights))
    assert not any(map(is_balanced, (outlier, infinite)))
    assert is_balanced(np.zeros((0, 8, 3, 3), np.float32))


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("stride", [2**31, 2**40, 2**57])
def test_strides_longer_than_any_axis(stride: int, group: int) -> None:
    """One result: offsets over others would not fit 64 bits."""
    op, w = Conv((1, stride), (0, 0), (0, 0), (1, 1), group), normal(1, (16, 16 // group, 3, 3))
    case = Case(op, normal(0, (2, 16, 5, 3)), w)
    assert error(run(case, host(), 1, emit_conv), case.oracle) < SUMS
    assert not has_phases(ConvTranspose((1, stride), (0, 0), (0, 0), (1, 1), (0, 0)), (3, 3))
