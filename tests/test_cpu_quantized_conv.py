"""Integer convolutions of the CPU device against exact sums: every algorithm, form, target and number of threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.integer_conv import emit_integer_conv
from cpu_fallback.integer_planes import MOST_CHANNELS, PairedPlanes
from cpu_fallback.integer_winograd_transforms import SCALES, fits
from cpu_fallback.native import Target, host
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT16, INT32, UINT8
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Conv, Map
from gpu_engine.ir.ops.channels_last import LastConv, LastPool
from tests.cpu_execution import check_op, is_native, lowered, run_graph
from tests.kernel_runner import targets
from tests.node_runner import run_node
from tests.reference import graph_of

Array = NDArray[Any]
pytestmark = pytest.mark.skipif(not host().x86, reason="integer kernels are for x86")
TARGETS = [pytest.param(target, id=f"{target.vector_nbytes * 8}") for target in targets()]
SUM = expr.cast(expr.arg(0, INT32), FLOAT32)
SCALED = SUM * expr.arg(1, FLOAT32) + expr.arg(2, FLOAT32)


def quantized(x: Expr, low: int, high: int, dtype: Any) -> Expr:
    return expr.cast(expr.round_even(expr.minimum(expr.maximum(x, float(low)), float(high))), dtype, saturate=True)


EPILOGUES: dict[str, tuple[Expr | None, tuple[str, ...]]] = {
    "none": (None, ()),
    "centred": (quantized(SCALED, -28, 227, INT16), ("channel", "channel")),
    "uint8": (quantized(SCALED, 0, 255, UINT8), ("channel", "scalar")),
    "int8": (quantized(SCALED, -128, 127, INT8), ("scalar", "channel")),
    "float": (SCALED, ("channel", "channel")),
    "residual": (
        quantized(SCALED + expr.cast(expr.arg(3, INT16), FLOAT32) * 0.5, -100, 155, INT16),
        ("channel", "channel", "full"),
    ),
    "costly": (quantized(expr.erf(SCALED * 0.125) * 64 + expr.tanh(SCALED), -28, 227, INT16), ("channel", "channel")),
}


def image(random: np.random.Generator, *shape: int) -> Array:
    """Bytes less a zero point, the extremes among them."""
    zero = int(random.integers(0, 256))
    found = random.integers(-zero, 256 - zero, shape)
    return np.where(random.random(shape) < 0.1, random.choice([-zero, 255 - zero], shape), found).astype(INT16)


def weights(random: np.random.Generator, *shape: int) -> Array:
    return random.integers(-128, 128, shape).astype(INT16)


def operands(random: np.random.Generator, kinds: tuple[str, ...], result: tuple[int, ...]) -> list[Array]:
    """Powers of two and halves: no epilogue rounds before it is meant to, and many sums lie between two integers."""
    found: list[Array] = []
    for i, kind in enumerate(kinds):
        shape = {"scalar": (), "channel": (1,) * (len(result) - 1) + result[-1:], "full": result}[kind]
        if kind == "full":
            found.append(image(random, *shape))
        elif i == 0:
            found.append((2.0 ** -random.integers(8, 14, shape)).astype(FLOAT32))
        else:
            found.append((random.integers(-40, 40, shape) / 2).astype(FLOAT32))
    return found


def check(
    op: LastConv, x: Array, w: Array, name: str, target: Target, threads: int = 1, seed: int = 0, m: int | None = None
) -> None:
    """The result of x [N, spatial..., C] equals what exact sums give."""
    root, kinds = EPILOGUES[name]
    plain = LastConv(op.strides, op.before, op.after, op.dilations, op.group, None, False, INT32)
    (sums,) = plain.evaluate(np, x.astype(np.int64), w.astype(np.int64))
    extras = operands(np.random.default_rng(seed), kinds, sums.shape)
    whole = LastConv(op.strides, op.before, op.after, op.dilations, op.group, root, False, INT32)
    expected = sums.astype(np.int32) if root is None else Map(root).evaluate(np, sums.astype(np.int32), *extras)[0]
    found = run_node(
        partial(emit_integer_conv, m=m), whole, [x, w, *extras], target,
        threads=threads, constants=[1], result=expected.dtype,
    )  # fmt: skip
    assert found.dtype == expected.dtype
    if name == "costly":
        np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=1)
    elif name == "float":
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, expected)


@st.composite
def dense(draw: st.DrawFn) -> tuple[LastConv, tuple[int, ...], tuple[int, ...]]:
    axes = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, strides, dilations = draw(each), draw(each), draw(each)
    pads = [draw(st.tuples(*[st.integers(0, 2)] * axes)) for _ in range(2)]
    spatial = tuple(
        max(draw(st.integers(1, 17)), (k - 1) * d + 1 - before - after)
        for k, d, before, after in zip(kernel, dilations, *pads, strict=True)
    )
    channels, outputs = 2 * draw(st.integers(1, 17)), draw(st.integers(1, 35))
    op = LastConv(strides, pads[0], pads[1], dilations, 1, None, False, INT32)
    return op, (draw(st.integers(1, 3)), *spatial, channels), (outputs, channels, *kernel)


@settings(max_examples=60, deadline=None)
@given(
    case=dense(), name=st.sampled_from(sorted(EPILOGUES)), target=st.sampled_from(targets()),
    threads=st.sampled_from((1, 1, 2, 5)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_dense_convolution(case: Any, name: str, target: Target, threads: int, seed: int) -> None:
    op, x, w = case
    random = np.random.default_rng(seed)
    check(op, image(random, *x), weights(random, *w), name, target, threads, seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("columns", range(1, 34))
def test_any_width(columns: int, target: Target) -> None:
    random = np.random.default_rng(columns)
    op = LastConv((1, 1), (1, 1), (1, 1), (1, 1), 1, None, False, INT32)
    x, w = image(random, 1, 5, columns, 6), weights(random, 1 + columns % 20, 6, 3, 3)
    check(op, x, w, "residual", target, seed=columns)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("extent", [1, 2, 3, 4, 5, 7, 8, 13])
def test_winograd_is_exact(m: int, extent: int, target: Target) -> None:
    """Every image of bytes and every int8 weight: sums that leave 32 bits on the way come back."""
    random = np.random.default_rng(extent)
    op = LastConv((1, 1), (1, 1), (1, 1), (1, 1), 1, None, False, INT32)
    x, w = image(random, 2, extent, extent + 1, 38), weights(random, 27, 38, 3, 3)
    for name in ("none", "residual", "float"):
        check(op, x, w, name, target, threads=1 + extent % 3, m=m)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("m", "channels"), [(2, 32), (2, 512), (4, 32), (4, 114)])
def test_winograd_of_the_greatest_numbers(m: int, channels: int, target: Target) -> None:
    op = LastConv((1, 1), (0, 1), (1, 0), (1, 1), 1, None, False, INT32)
    x = np.full((1, 6, 6, channels), 255, INT16)
    for sign in (-1, 1):
        w = np.full((17, channels, 3, 3), sign * 127, INT16)
        assert fits(w, m, 255)
        check(op, x, w, "none", target, m=m)
        check(op, -x, w, "none", target, m=m)


def test_what_winograd_cannot_hold_is_refused() -> None:
    assert not fits(np.full((1, 116, 3, 3), 127, INT16), 4, 255)
    assert not fits(np.full((1, 2, 3, 3), 255, INT16), 4, 255)
    assert not fits(np.full((1, 2, 3, 3), 1, INT16), 4, 32767)
    assert SCALES == {2: 4, 4: 576}


@st.composite
def depthwise(draw: st.DrawFn) -> tuple[LastConv, tuple[int, ...], tuple[int, ...]]:
    axes = draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, strides, dilations = draw(st.tuples(*[st.integers(1, 5)] * axes)), draw(each), draw(each)
    pads = [draw(st.tuples(*[st.integers(0, 3)] * axes)) for _ in range(2)]
    spatial = tuple(
        max(draw(st.integers(1, 14)), (k - 1) * d + 1 - before - after)
        for k, d, before, after in zip(kernel, dilations, *pads, strict=True)
    )
    channels = draw(st.integers(2, 40))
    op = LastConv(strides, pads[0], pads[1], dilations, channels, None, False, INT32)
    return op, (draw(st.integers(1, 3)), *spatial, channels), (channels, 1, *kernel)


@settings(max_examples=60, deadline=None)
@given(
    case=depthwise(), name=st.sampled_from(sorted(EPILOGUES)), target=st.sampled_from(targets()),
    threads=st.sampled_from((1, 2, 5)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_depthwise_convolution(case: Any, name: str, target: Target, threads: int, seed: int) -> None:
    op, x, w = case
    random = np.random.default_rng(seed)
    check(op, image(random, *x), weights(random, *w), name, target, threads, seed)


@pytest.mark.parametrize("channels", range(1, MOST_CHANNELS + 1))
@pytest.mark.parametrize("spatial", [(1, 1), (3, 5), (4, 8), (33,), (2, 3, 4), (0, 3)])
def test_planes_become_pairs(channels: int, spatial: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((2, channels, *spatial)).astype(FLOAT32)
    before = quantized(expr.arg(0, FLOAT32) * 50, -28, 227, INT16)
    check_op(PairedPlanes(before), [x], 0)


@pytest.mark.parametrize("channels", [*range(1, 34), 64, 100])
def test_maxima_of_integers(channels: int) -> None:
    op = LastPool("max", (3, 2), (2, 1), (1, 0), (1, 1), (1, 2), True, False)
    check_op(op, [image(np.random.default_rng(channels), 2, 7, 9, channels)], 0)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8])
def test_integer_convolutions_of_a_graph(group: int, channels: int) -> None:
    """Also those that have no integer kernel: odd groups, and channels that come in no pairs."""
    random = np.random.default_rng(channels)
    x, w = image(random, 2, channels * group, 9, 7), weights(random, 3 * group, channels, 3, 3)
    op = Conv((2, 1), (1, 0), (1, 2), (1, 1), group, accumulate=INT32)
    graph = graph_of({"x": (INT16, x.shape)}, lambda builder, value: builder.emit(op, value, builder.constant(w)))
    assert is_native(lowered(graph))
    np.testing.assert_array_equal(next(iter(run_graph(graph, {"x": x}).values())), op.evaluate(np, x, w)[0])
