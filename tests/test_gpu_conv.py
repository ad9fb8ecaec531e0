"""Convolutions of the GPU's plan, interpreted beside their references."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from numpy.typing import NDArray

from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, UINT8, DType, is_float
from gpu_engine.ir.graph import Op, TensorType
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.plan.plan import Plan
from tests.gpu_runner import array_steps, execute, graph_of

Array = NDArray[Any]
TOLERANCES = {FLOAT32: 1e-5, FLOAT64: 1e-12, FLOAT16: 2e-3, BFLOAT16: 2e-2}


def data(seed: int, dtype: DType, *shape: int) -> Array:
    rng = np.random.default_rng(seed)
    if not is_float(dtype):
        found = np.iinfo(dtype)
        return rng.integers(max(found.min, -300), min(found.max, 300), shape, dtype, endpoint=True)
    return np.asarray(rng.standard_normal(shape).astype(dtype))


def conv(
    kernel: tuple[int, ...],
    stride: int = 1,
    pads: tuple[int, int] = (0, 0),
    dilation: int = 1,
    group: int = 1,
    *,
    planar: bool = False,
    **rest: Any,
) -> LastConv:
    rank = len(kernel)
    return LastConv(
        (stride,) * rank, pads[:1] * rank, pads[1:] * rank, (dilation,) * rank, group, None, planar, **rest
    )  # fmt: skip


def plan_of(op: Op, types: list[TensorType], constants: dict[int, Array], precision: str = "fp32") -> Plan:
    plan = InterpretDevice(options=GpuOptions(precision)).lower(graph_of(op, types, constants), NOT_BATCHED)
    assert not array_steps(plan), f"{op} has no kernel for {', '.join(map(str, types))}"
    return plan


def check(
    op: Op,
    *arrays: Array,
    known: tuple[int, ...] = (1,),
    precision: str = "fp32",
    tolerance: float = 0,
    seeds: tuple[int, ...] = (0,),
) -> None:
    """The plan's result is the reference's, whatever the order of programs."""
    constants = {i: arrays[i] for i in known}
    plan = plan_of(op, [TensorType(array.dtype, array.shape) for array in arrays], constants, precision)
    for seed in seeds:
        (found,) = execute(plan, [array for i, array in enumerate(arrays) if i not in known], seed)
        assert_near(found, reference(op, arrays), tolerance)


def reference(op: Op, arrays: tuple[Array, ...]) -> Array:
    found = op.evaluate(np, *arrays)[0]
    return np.asarray(found)


def assert_near(found: Array, wanted: Array, tolerance: float = 0) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if not is_float(found.dtype):
        np.testing.assert_array_equal(found, wanted)
        return
    wide, right = found.astype(np.float64), wanted.astype(np.float64)
    bound = tolerance or TOLERANCES[found.dtype]
    scale = max(1.0, float(np.max(np.abs(right), initial=0, where=np.isfinite(right))))
    np.testing.assert_allclose(wide, right, rtol=bound, atol=bound * scale)


CASES = {
    "3x3": (conv((3, 3), 1, (1, 1)), (2, 7, 9, 20), (33, 20, 3, 3)),
    "many channels": (conv((3, 3), 1, (1, 1)), (1, 4, 5, 64), (17, 64, 3, 3)),
    "stride": (conv((3, 2), 2, (1, 0)), (2, 9, 8, 36), (5, 36, 3, 2)),
    "dilation": (conv((3, 3), 1, (2, 3), 2), (1, 9, 6, 5), (8, 5, 3, 3)),
    "crop": (conv((2, 2), 1, (-1, -2)), (1, 9, 8, 6), (4, 6, 2, 2)),
    "dense": (conv((1, 1)), (2, 3, 5, 24), (40, 24, 1, 1)),
    "dense by strides": (conv((1, 1), 2), (2, 5, 7, 24), (9, 24, 1, 1)),
    "first layer": (conv((7, 7), 2, (3, 3), planar=True), (2, 3, 15, 17), (16, 3, 7, 7)),
    "1-d": (conv((5,), 1, (2, 2)), (2, 19, 12), (7, 12, 5)),
    "3-d": (conv((2, 3, 2), 1, (1, 1)), (1, 4, 5, 3, 10), (6, 10, 2, 3, 2)),
    "groups": (conv((3, 3), 1, (1, 1), group=2), (1, 5, 4, 36), (38, 18, 3, 3)),
    "dense groups": (conv((1, 1), group=3), (2, 3, 4, 48), (33, 16, 1, 1)),
    "depthwise": (conv((3, 3), 2, (1, 1), group=33), (2, 7, 8, 33), (33, 1, 3, 3)),
    "depthwise, long": (conv((7, 7), 1, (3, 3), group=8), (1, 9, 7, 8), (8, 1, 7, 7)),
    "multiplier": (conv((3, 3), 1, (1, 1), group=6), (1, 5, 6, 6), (18, 1, 3, 3)),
    "small groups": (conv((3, 3), 1, (1, 0), group=5), (1, 5, 6, 20), (30, 4, 3, 3)),
    "one result": (conv((2, 2)), (2, 3, 4, 70), (1, 70, 2, 2)),
    "one window": (conv((3, 2), 1, (0, 0)), (1, 3, 2, 18), (5, 18, 3, 2)),
    "one window, planar": (conv((3, 2), 1, (1, 0), planar=True), (1, 3, 2, 2), (5, 3, 3, 2)),
    "one depthwise window": (conv((3, 3), 3, (1, 0), group=4), (1, 3, 3, 4), (4, 1, 3, 3)),
    "no image": (conv((3, 3), 1, (1, 1)), (0, 3, 4, 5), (6, 5, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_forms(case: str) -> None:
    op, image, weights = CASES[case]
    check(op, data(1, FLOAT32, *image), data(2, FLOAT32, *weights), seeds=(0, 1))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("case", ["3x3", "groups", "first layer", "depthwise", "dense"])
def test_dtypes(case: str, dtype: DType) -> None:
    op, image, weights = CASES[case]
    check(op, data(1, dtype, *image), data(2, dtype, *weights))


@pytest.mark.parametrize("case", ["many channels", "stride", "groups", "depthwise", "dense"])
def test_weights_that_are_inputs(case: str) -> None:
    op, image, weights = CASES[case]
    check(op, data(1, FLOAT32, *image), data(2, FLOAT32, *weights), known=())


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("case", ["3x3", "first layer", "dense"])
def test_precisions(case: str, precision: str) -> None:
    op, image, weights = CASES[case]
    tolerance = 2e-2 if precision == "bf16" else 3e-3
    check(op, data(1, FLOAT32, *image), data(2, FLOAT32, *weights), precision=precision, tolerance=tolerance)


@pytest.mark.parametrize("pair", [(UINT8, INT8), (INT8, INT8), (INT16, INT16), (UINT8, INT16)], ids=str)
@pytest.mark.parametrize("case", ["3x3", "stride", "groups", "depthwise", "first layer"])
def test_integers(case: str, pair: tuple[DType, DType]) -> None:
    op, image, weights = CASES[case]
    exact = dataclasses.replace(op, accumulate=INT32)
    check(exact, data(1, pair[0], *image), data(2, pair[1], *weights))


def test_integers_with_an_epilogue() -> None:
    root = expr.cast(expr.cast(expr.arg(0, INT32), FLOAT32) * expr.arg(1, FLOAT32), INT8, saturate=True)
    op = dataclasses.replace(CASES["3x3"][0], accumulate=INT32, epilogue=root)
    check(op, data(1, UINT8, 1, 5, 4, 20), data(2, INT8, 9, 20, 3, 3), np.abs(data(3, FLOAT32, 9)) / np.float32(500))


@pytest.mark.parametrize("case", ["3x3", "dense", "groups", "depthwise", "many channels"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_epilogues(case: str, dtype: DType) -> None:
    """A bias, a gate of every image, a residual and an activation."""
    op, image, weights = CASES[case]
    root = expr.arg(0, dtype) + expr.arg(1, dtype) + expr.arg(2, dtype)
    root = expr.maximum(root * expr.arg(3, dtype), expr.const(0, dtype))
    x, w = data(1, dtype, *image), data(2, dtype, *weights)
    shape = reference(op, (x, w)).shape
    gate = data(5, dtype, shape[0], 1, 1, shape[-1])
    check(dataclasses.replace(op, epilogue=root), x, w, data(3, dtype, shape[-1]), data(4, dtype, *shape), gate)


@pytest.mark.parametrize("case", ["3x3", "stride", "first layer", "groups", "depthwise", "dense"])
def test_any_extents(case: str) -> None:
    op, image, weights = CASES[case]
    w = data(2, FLOAT32, *weights)
    n, h, wide = (dims.symbol(name) for name in "NHW")
    channels = image[1] if op.planar else image[-1]
    shape = (n, channels, h, wide) if op.planar else (n, h, wide, channels)
    plan = plan_of(op, [TensorType(FLOAT32, shape), TensorType(FLOAT32, w.shape)], {1: w})
    for sizes in ((1, 7, 7), (2, 8, 9)):
        x = data(3, FLOAT32, sizes[0], channels, *sizes[1:])
        x = x if op.planar else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        assert_near(execute(plan, [x])[0], reference(op, (x, w)))


@pytest.mark.parametrize("case", ["3x3", "depthwise", "dense", "first layer"])
def test_what_is_no_number_stays_in_its_windows(case: str) -> None:
    op, image, weights = CASES[case]
    x = data(1, FLOAT32, *image)
    x[0, 1, 1, 1], x[-1, 2, 3, 2], x[0, 2, 2, 0] = np.nan, np.inf, -np.inf
    check(op, x, data(2, FLOAT32, *weights))
