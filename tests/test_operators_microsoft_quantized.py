"""Quantised operators of com.microsoft against onnxruntime.

Results of bytes may be a step away where a number lies between two: onnxruntime adds the zero point before it rounds,
or looks the result up in a table that was rounded itself.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_engine.errors import InvalidModel
from tests.microsoft_models import Array, Inputs, agree, integers, node_model, numbers
from tests.one_node import graph_of

BYTES = [np.uint8, np.int8]


def random_bytes(dtype: Any, *shape: int, seed: int = 0) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


def scale(value: float) -> Array:
    return np.array(value, np.float32)


def operand(name: str, dtype: Any, *shape: int, step: float, zero: int, seed: int = 0) -> dict[str, Array]:
    held = random_bytes(dtype, *shape, seed=seed)
    return {name: held, name + "s": scale(step), name + "z": np.array(zero, dtype)}


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("left", "right"), [((5, 7), (5, 7)), ((2, 3, 7), (7,)), ((2, 1, 7), (3, 1)), ((), (3, 5))])
def test_sums_and_products(dtype: Any, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    inputs = {
        **operand("a", dtype, *left, step=0.11, zero=3),
        **operand("b", dtype, *right, step=0.07, zero=-0, seed=1),
    }
    result = {"cs": scale(0.19), "cz": np.array(10, dtype)}
    agree("QLinearAdd", {**inputs, **result}, known=("b",), steps=1)
    agree("QLinearMul", {**inputs, "cs": scale(9.3), "cz": result["cz"]}, known=("b",), steps=1)


@pytest.mark.parametrize("dtype", BYTES)
def test_zero_points_may_be_left_out(dtype: Any) -> None:
    """onnxruntime's type inference stumbles over their absence."""
    a, c = random_bytes(dtype, 3, 5), random_bytes(dtype, 5, seed=1)
    info = np.iinfo(dtype)
    total = np.rint((a * np.float32(0.1) + c * np.float32(0.2)) / np.float32(0.4)).clip(info.min, info.max)
    inputs = {"a": a, "as": scale(0.1), "az": None, "b": c, "bs": scale(0.2), "bz": None, "cs": scale(0.4)}
    agree("QLinearAdd", inputs, expected=[total.astype(dtype)], steps=1)


@pytest.mark.parametrize("dtype", BYTES)
def test_functions_of_one_operand(dtype: Any) -> None:
    x = {"x": np.arange(256).astype(np.uint8).view(dtype), "xs": scale(0.05), "xz": np.array(20, dtype)}
    agree("QLinearSigmoid", {**x, "ys": scale(1 / 256), "yz": np.array(np.iinfo(dtype).min, dtype)}, steps=1)
    for alpha in (0.01, 0.4):
        agree("QLinearLeakyRelu", {**x, "ys": scale(0.04), "yz": np.array(-7 % 128, dtype)}, steps=1, alpha=alpha)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("opset", "axis"), [(13, -1), (13, 1), (12, 1), (11, -1), (12, 0)])
def test_softmax(dtype: Any, opset: int, axis: int) -> None:
    inputs = {**operand("x", dtype, 2, 3, 9, step=0.05, zero=3), "ys": scale(1 / 256), "yz": np.array(0, dtype)}
    attributes = {"opset": opset, "axis": axis}
    agree("QLinearSoftmax", inputs, steps=1, **attributes)


@pytest.mark.parametrize("dtype", BYTES)
def test_choices_and_joins(dtype: Any) -> None:
    operands = {**operand("x", dtype, 4, 5, step=0.1, zero=3), **operand("y", dtype, 5, step=0.2, zero=7, seed=1)}
    condition = {"c": np.array([[True], [False], [True], [False]])}
    result = {"zs": scale(0.15), "zz": np.array(9, dtype)}
    agree("QLinearWhere", {**condition, **operands, **result}, steps=1)
    wide = operand("w", dtype, 3, 5, step=0.15, zero=9, seed=2)
    flat = {**operands, "y": random_bytes(dtype, 2, 5, seed=1)}
    agree("QLinearConcat", {**result, **flat, **wide}, steps=1, axis=0)
    agree("QLinearConcat", {**result, **wide}, steps=1, axis=-1)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3, 7, 6), (2, 3, 7)])
def test_global_average_pool(dtype: Any, last: int, shape: tuple[int, ...]) -> None:
    x, result = operand("x", dtype, *shape, step=0.1, zero=3), {"ys": scale(0.02), "yz": np.array(5, dtype)}
    agree("QLinearGlobalAveragePool", {**x, **result}, steps=1, channels_last=last)


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [3, 2]},
    {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]},
    {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    {"kernel_shape": [2, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
]


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("attributes", POOLS, ids=str)
def test_average_pool(dtype: Any, last: int, attributes: dict[str, Any]) -> None:
    x, result = operand("x", dtype, 2, 8, 7, 6, step=0.1, zero=3), {"ys": scale(0.06), "yz": np.array(5, dtype)}
    agree("QLinearAveragePool", {**x, **result}, steps=1, channels_last=last, **attributes)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("axes", "keepdims"), [([1, 2], 1), ([-1], 0)])
def test_reduce_mean(dtype: Any, axes: list[int], keepdims: int) -> None:
    x, result = operand("x", dtype, 4, 5, 6, step=0.1, zero=3), {"ys": scale(0.03), "yz": np.array(5, dtype)}
    mean = ((x["x"].astype(np.float32) - 3) * np.float32(0.1)).mean(tuple(axes), keepdims=bool(keepdims))
    info = np.iinfo(dtype)
    expected = (np.rint(mean / np.float32(0.03)) + 5).clip(info.min, info.max).astype(dtype)
    agree("QLinearReduceMean", {**x, **result}, expected=[expected], steps=1, axes=axes, keepdims=keepdims)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("attributes", [{}, {"pads": [1, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2]},
                                        {"auto_pad": "SAME_LOWER"}, {"ceil_mode": 1, "strides": [2, 2]}])  # fmt: skip
def test_nhwc_max_pool(dtype: Any, attributes: dict[str, Any]) -> None:
    agree("NhwcMaxPool", {"x": random_bytes(dtype, 2, 7, 6, 5)}, kernel_shape=[3, 2], **attributes)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_quantize_and_dequantize(dtype: Any, axis: int | None) -> None:
    count = {None: (), 0: (3,), -1: (5,)}[axis]
    steps = np.asarray((np.abs(numbers(*count, seed=1)) + 0.2) * (100 / np.iinfo(dtype).max), np.float32)
    zero = np.broadcast_to(np.array(5, dtype), count).copy()
    attributes = {} if axis is None else {"axis": axis}
    agree(
        "QuantizeLinear", {"x": numbers(3, 4, 5) * 60, "s": steps, "z": zero}, known=("s", "z"), steps=1, **attributes
    )
    x = random_bytes(dtype, 3, 4, 5)
    agree("DequantizeLinear", {"x": x, "s": steps, "z": zero}, known=("s", "z"), **attributes)
    if axis is None:
        agree("DequantizeLinear", {"x": x, "s": steps}, known=("s",))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("axis", [None, 1])
def test_dequantize_nibbles(dtype: Any, axis: int | None) -> None:
    low = int(ml_dtypes.iinfo(dtype).min)
    x = integers(low, low + 16, 3, 4, 5).astype(dtype)
    count, attributes = ((), {}) if axis is None else ((4,), {"axis": axis})
    steps = np.asarray(np.abs(numbers(*count, seed=1)) + 0.2, np.float32)
    zero = np.broadcast_to(np.array(1, dtype), count).copy()
    agree("DequantizeLinear", {"x": x, "s": steps, "z": zero}, fixed=("x", "s", "z"), **attributes)


def operands(left: Any, right: Any, columns: bool, transposed: tuple[int, int] = (0, 0)) -> dict[str, Array]:
    a, w = random_bytes(left, 6, 33), random_bytes(right, 33, 9, seed=1)
    return {
        "a": a.T.copy() if transposed[0] else a,
        "as": scale(0.02),
        "az": np.array(7, left),
        "b": w.T.copy() if transposed[1] else w,
        "bs": (np.abs(numbers(9, seed=2)) * 0.01).astype(np.float32) if columns else scale(0.01),
        "bz": random_bytes(right, 9, seed=3) if columns else np.array(3, right),
    }


PAIRS = [(np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8)]
WEIGHTS = ("b", "bs", "bz")


@pytest.mark.parametrize(("left", "right"), PAIRS)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_qgemm(left: Any, right: Any, columns: bool, transposed: tuple[int, int]) -> None:
    inputs: Inputs = operands(left, right, columns, transposed)
    attributes = {"transA": transposed[0], "transB": transposed[1], "alpha": 0.5}
    agree("QGemm", inputs, known=WEIGHTS, **attributes)
    c = np.random.default_rng(4).integers(-5000, 5000, (9,)).astype(np.int32)
    agree("QGemm", {**inputs, "c": c}, known=(*WEIGHTS, "c"), **attributes)
    result = {"ys": scale(0.05), "yz": np.array(11, left)}
    agree("QGemm", {**inputs, "c": c, **result}, known=(*WEIGHTS, "c"), steps=1, **attributes)
    agree("QGemm", {**inputs, "c": None, **result}, known=WEIGHTS, steps=1, **attributes)


@pytest.mark.parametrize(("left", "right"), PAIRS)
@pytest.mark.parametrize("columns", [False, True])
def test_matmul_integer_to_float(left: Any, right: Any, columns: bool) -> None:
    held = operands(left, right, columns)
    inputs = {"a": np.stack([held["a"], held["a"][::-1]]), **{key: held[key] for key in ("b", "as", "bs", "az", "bz")}}
    agree("MatMulIntegerToFloat", inputs, known=WEIGHTS)
    agree("MatMulIntegerToFloat", {**inputs, "c": numbers(9)}, known=(*WEIGHTS, "c"))
    plain = {**inputs, "as": np.array([0.02], np.float32), "az": None, "bz": None}
    agree("MatMulIntegerToFloat", plain, known=WEIGHTS)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("columns", [False, True])
def test_dynamic_quantize_matmul(dtype: Any, columns: bool) -> None:
    held = operands(np.uint8, dtype, columns)
    inputs = {"a": numbers(2, 6, 33), "b": held["b"], "bs": held["bs"], "bz": held["bz"]}
    agree("DynamicQuantizeMatMul", inputs, known=WEIGHTS)
    agree("DynamicQuantizeMatMul", {**inputs, "bz": None, "c": numbers(9)}, known=(*WEIGHTS, "c"))


@pytest.mark.parametrize("weight", BYTES)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("mask", [None, [3, 2], [[1, 1, 0], [1, 1, 1]]])
@pytest.mark.parametrize("past", [False, True])
def test_qattention(weight: Any, columns: bool, mask: Any, past: bool) -> None:
    count = (24,) if columns else ()
    if past and mask is not None and np.ndim(mask) == 2:
        mask = [[1, 1, *row] for row in mask]
    inputs = {
        "x": random_bytes(np.uint8, 2, 3, 16),
        "w": random_bytes(weight, 16, 24, seed=1),
        "b": numbers(24),
        "xs": scale(0.02),
        "ws": np.full(count, 0.01, np.float32) * (1 + np.arange(24, dtype=np.float32) / 24 if columns else 1),
        "m": None if mask is None else np.array(mask, np.int32),
        "xz": np.array(130, np.uint8),
        "wz": random_bytes(weight, *count, seed=2) if columns else np.array(3, weight),
        "p": numbers(2, 2, 2, 2, 4, seed=3) if past else None,
    }
    inputs["ws"] = np.asarray(inputs["ws"], np.float32)
    held = ("w", "b", "ws", "wz")
    agree("QAttention", inputs, 2 if past else 1, known=held, num_heads=2, unidirectional=int(past), atol=1e-4)


@pytest.mark.parametrize(("left", "right"), PAIRS)
@pytest.mark.parametrize("last", [0, 1])
def test_qlinear_conv(left: Any, right: Any, last: int) -> None:
    """Weights of 7 bits where they are signed and the image is not: onnxruntime's sums of two products saturate."""
    x = random_bytes(left, 2, 4, 6, 7)
    w = random_bytes(right, 6, 2, 3, 2, seed=1) // (2 if left is np.uint8 and right is np.int8 else 1)
    inputs = {
        "x": x.transpose(0, 2, 3, 1).copy() if last else x, "xs": scale(0.02), "xz": np.array(5, left),
        "w": w, "ws": (np.arange(6, dtype=np.float32) + 1) / 300,
        "wz": np.full(6, 3 if right is np.uint8 else 0, right), "ys": scale(0.2), "yz": np.array(7, left),
        "b": np.arange(6, dtype=np.int32) * 50,
    }  # fmt: skip
    attributes = {"group": 2, "pads": [1, 0, 1, 1], "strides": [2, 1], "channels_last": last}
    agree("QLinearConv", inputs, known=("w", "ws", "wz", "b"), steps=1, **attributes)


def test_integers() -> None:
    a, w = (np.random.default_rng(i).integers(-(2**15), 2**15, (5, 5)).astype(np.int16) for i in (0, 1))
    agree("MatMulInteger16", {"a": a // 8, "b": w}, known=("b",))
    bytes_, others = random_bytes(np.uint8, 3, 4), random_bytes(np.uint8, 4, seed=1)
    product = (bytes_.astype(np.int32) - 7) * (others.astype(np.int32) - 9)
    inputs = {"a": bytes_, "az": np.array(7, np.uint8), "b": others, "bz": np.array(9, np.uint8)}
    agree("MulInteger", inputs, expected=[product])
    total = bytes_.sum(1, dtype=np.int32, keepdims=True)
    agree("ReduceSumInteger", {"x": bytes_}, expected=[total], axes=[1], keepdims=1)


def test_what_cannot_be_is_refused() -> None:
    result = {"ys": scale(1), "yz": np.array(0, np.uint8)}
    with pytest.raises(InvalidModel, match="triples"):
        graph_of(node_model("QLinearConcat", {**result, "x": random_bytes(np.uint8, 3)}, {"axis": 0}))
    inputs = {**operands(np.uint8, np.uint8, False), "a": random_bytes(np.uint8, 2, 3, 4)}
    with pytest.raises(InvalidModel, match="QGemm"):
        graph_of(node_model("QGemm", inputs, {}))
