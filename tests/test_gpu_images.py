"""Transposed convolutions, pools and resizes of the GPU's plan, interpreted beside their references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from numpy.typing import NDArray

from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, UINT8, DType
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import Pool, Resize
from gpu_engine.ir.ops.channels_last import LastConvTranspose, LastPool
from tests.gpu_runner import execute
from tests.test_gpu_conv import assert_near, check, data, plan_of

Array = NDArray[Any]


def back(
    rank: int,
    stride: int = 1,
    pads: tuple[int, int] = (0, 0),
    dilation: int = 1,
    extra: int = 0,
    group: int = 1,
    epilogue: expr.Expr | None = None,
) -> LastConvTranspose:
    return LastConvTranspose(
        (stride,) * rank, pads[:1] * rank, pads[1:] * rank, (dilation,) * rank, (extra,) * rank, group, epilogue
    )  # fmt: skip


TRANSPOSED = {
    "phases": (back(2, 2, (1, 1)), (2, 5, 4, 20), (20, 9, 4, 4)),
    "phases of different taps": (back(2, 2, (1, 0)), (1, 4, 5, 6), (6, 7, 3, 3)),
    "cut phases": (back(2, 3, (1, 1), 1, 1), (1, 4, 3, 5), (5, 6, 4, 5)),
    "fewer taps than phases": (back(2, 2), (1, 3, 4, 33), (33, 5, 1, 1)),
    "plain": (back(2, 1, (1, 2), 2), (2, 6, 7, 18), (18, 4, 3, 2)),
    "groups": (back(2, 1, (1, 1), group=3), (2, 4, 5, 12), (12, 5, 3, 3)),
    "1-d": (back(1, 2, (1, 1)), (2, 9, 8), (8, 3, 4)),
    "3-d": (back(3, 2), (1, 2, 3, 2, 5), (5, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions(case: str) -> None:
    op, image, weights = TRANSPOSED[case]
    check(op, data(1, FLOAT32, *image), data(2, FLOAT32, *weights))


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_transposed_convolutions_in_other_types(precision: str) -> None:
    op, image, weights = TRANSPOSED["phases"]
    check(op, data(1, FLOAT32, *image), data(2, FLOAT32, *weights), precision=precision, tolerance=3e-3)
    check(op, data(1, BFLOAT16, *image), data(2, BFLOAT16, *weights))


@pytest.mark.parametrize("case", ["phases", "cut phases"])
def test_transposed_convolutions_with_epilogues(case: str) -> None:
    op, image, weights = TRANSPOSED[case]
    root = expr.maximum(expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32), 0.0) * expr.arg(2, FLOAT32)
    whole = back(2, op.strides[0], (1, 1), 1, op.output_padding[0], epilogue=root)  # type: ignore[arg-type]
    x, w = data(1, FLOAT32, *image), data(2, FLOAT32, *weights)
    shape = whole.form.infer(TensorType(FLOAT32, x.transpose(0, 3, 1, 2).shape), TensorType(FLOAT32, w.shape))[0].shape
    last = (dims.number(shape[0]), dims.number(shape[2]), dims.number(shape[3]), dims.number(shape[1]))
    check(whole, x, w, data(3, FLOAT32, last[3]), data(4, FLOAT32, *last))


def pool(kind: str, kernel: tuple[int, ...], stride: int, pads: tuple[int, int], **rest: Any) -> Pool:
    rank = len(kernel)
    dilation = rest.pop("dilation", 1)
    return Pool(kind, kernel, (stride,) * rank, pads[:1] * rank, pads[1:] * rank, (dilation,) * rank, **rest)


POOLS = {
    "max": pool("max", (3, 3), 2, (1, 1)),
    "max of dilated": pool("max", (2, 3), 1, (1, 2), dilation=2),
    "max of padding alone": pool("max", (2, 2), 2, (3, 3)),
    "sum": pool("sum", (2, 2), 1, (0, 1)),
    "average": pool("average", (3, 2), 2, (1, 1)),
    "average with padding": pool("average", (3, 3), 2, (1, 1), count_include_pad=True),
    "average, ceil": pool("average", (3, 3), 2, (0, 1), ceil_mode=True),
    "average with padding, ceil": pool("average", (3, 3), 3, (1, 1), ceil_mode=True, count_include_pad=True),
    "average inside": pool("average", (2, 2), 2, (0, 0)),
    "crop": pool("average", (2, 2), 1, (-1, -2)),
    "dilated average": pool("average", (2, 2), 1, (1, 1), dilation=2),
    "one window": pool("average", (9, 9), 4, (0, 2), ceil_mode=True),
    "many taps": pool("max", (6, 7), 3, (2, 2)),
}


def last(op: Pool) -> LastPool:
    return LastPool(
        op.kind, op.kernel, op.strides, op.before, op.after, op.dilations, op.ceil_mode, op.count_include_pad
    )  # fmt: skip


@pytest.mark.parametrize("case", POOLS)
def test_pools(case: str) -> None:
    x = data(1, FLOAT32, 2, 3, 11, 10)
    x[0, 1, 4, 5], x[1, 0, 2, 2] = np.nan, np.inf
    check(POOLS[case], x, known=())
    check(last(POOLS[case]), np.ascontiguousarray(x.transpose(0, 2, 3, 1)), known=())


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT64, INT8, UINT8, INT32], ids=str)
def test_pools_of_other_types(dtype: DType) -> None:
    kinds = ["max", "average"] if dtype.kind in "fV" else ["max"]
    for kind in kinds:
        check(last(POOLS[kind]), data(1, dtype, 2, 7, 6, 19), known=())
    check(pool("max", (3,), 2, (1, 1)), data(2, dtype, 2, 5, 9), known=())
    check(pool("max", (2, 2, 2), 2, (0, 0)), data(2, dtype, 1, 2, 4, 5, 4), known=())


def test_pools_of_one_window() -> None:
    for kind in ("max", "average"):
        op = pool(kind, (2, 2), 2, (1, 1), ceil_mode=True)
        check(op, data(1, FLOAT32, 1, 1, 1, 1), known=())
        check(last(op), data(1, FLOAT32, 1, 1, 1, 6), known=())


def test_pools_of_any_extents() -> None:
    n, c, h, w = (dims.symbol(name) for name in "NCHW")
    for op, shape in ((POOLS["average, ceil"], (n, c, h, w)), (last(POOLS["max"]), (n, h, w, 5))):
        plan = plan_of(op, [TensorType(FLOAT32, shape)], {})
        for sizes in ((1, 3, 5, 5), (2, 9, 8, 5), (3, 6, 7, 5)):
            x = data(3, FLOAT32, *sizes)
            assert_near(execute(plan, [x])[0], np.asarray(op.evaluate(np, x)[0]))


def resize(
    mode: str, scales: tuple[float | None, ...], extents: tuple[Any, ...], coordinates: str = "half_pixel", **rest: Any
) -> Resize:
    return Resize(extents, scales, mode, coordinates, **rest)


UP, DOWN = ((2, 3, 10, 14), (None, None, 2.0, None)), ((2, 3, 3, 4), (None, None, 0.6, None))


@pytest.mark.parametrize("extents, scales", [UP, DOWN], ids=["up", "down"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    "coordinates",
    ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"],
)
def test_resizes(mode: str, coordinates: str, extents: Any, scales: Any) -> None:
    check(resize(mode, scales, extents, coordinates), data(1, FLOAT32, 2, 3, 5, 7), known=())


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple"])
def test_nearest(rounding: str) -> None:
    for extents in ((1, 10, 3, 2), (1, 3, 7, 2)):
        op = resize("nearest", (None,) * 4, extents, nearest_mode=rounding)
        check(op, data(1, FLOAT32, 1, 5, 4, 2), known=())


def test_resizes_by_tables() -> None:
    x = data(1, FLOAT32, 1, 2, 6, 8)
    shrunk = (1, 2, 3, 4)
    check(resize("linear", (None,) * 4, shrunk, antialias=True), x, known=())
    check(resize("cubic", (None,) * 4, (1, 2, 9, 8), exclude_outside=True), x, known=())
    roi = ((0.0, 1.0), (0.0, 1.0), (-0.2, 0.8), (0.3, 1.4))
    crop = {"coordinates": "tf_crop_and_resize", "roi": roi, "extrapolation_value": 7.5}
    for mode in ("nearest", "linear"):
        check(resize(mode, (None,) * 4, (1, 2, 5, 7), **crop), x, known=())


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT64, INT8, UINT8, INT32], ids=str)
def test_resizes_of_other_types(dtype: DType) -> None:
    for mode in ("nearest", "linear", "cubic"):
        check(resize(mode, (None,) * 3, (2, 9, 4)), data(1, dtype, 2, 5, 4), known=())


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resizes_of_any_extents(mode: str) -> None:
    n, h, w = (dims.symbol(name) for name in "NHW")
    for scales, coordinates in (((None, 2.0, None, None), "half_pixel"), ((None,) * 4, "align_corners")):
        op = resize(mode, scales, (n, 2 * h, 5, 3), coordinates)
        plan = plan_of(op, [TensorType(FLOAT32, (n, h, w, 3))], {})
        for sizes in ((1, 1, 5), (2, 3, 7)):
            x = data(4, FLOAT32, *sizes, 3)
            known = resize(mode, scales, (sizes[0], 2 * sizes[1], 5, 3), coordinates)
            assert_near(execute(plan, [x])[0], np.asarray(known.evaluate(np, x)[0]))
