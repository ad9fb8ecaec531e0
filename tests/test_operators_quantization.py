"""Quantised operators against exact integer arithmetic, NumPy and onnxruntime."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dtypes import INT16
from gpu_engine.ir.ops import Conv
from tests.test_operators_nn import agree, numbers
from tests.test_operators_tensor import graph_of, model_of, run

Array = NDArray[Any]
BYTES = (np.uint8, np.int8)


def bytes_of(dtype: Any, *shape: int, seed: int = 0) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


@pytest.mark.parametrize(("left", "right"), list(itertools.product(BYTES, BYTES)))
@pytest.mark.parametrize("form", ["static", "symbolic", "constant"])
def test_matmul_integer_is_exact(left: Any, right: Any, form: str) -> None:
    a, b = bytes_of(left, 2, 3, 64), bytes_of(right, 64, 5, seed=1)
    for a_zero, b_zero in (
        (None, None),
        (left(7), None),
        (None, bytes_of(right, 5, seed=2)),
        (bytes_of(left, 3, seed=3), right(-3 if right is np.int8 else 131)),
    ):
        zeros = {
            "az": None if a_zero is None else np.asarray(a_zero),
            "bz": None if b_zero is None else np.asarray(b_zero),
        }
        row = 0 if a_zero is None else np.asarray(a_zero, np.int64).reshape(-1, 1)
        expected = np.matmul(a.astype(np.int64) - row, b.astype(np.int64) - (0 if b_zero is None else b_zero))
        found = run("MatMulInteger", {"a": a, "b": b, **zeros}, form=form, known=("b", "bz"))
        np.testing.assert_array_equal(found, expected.astype(np.int32))


def test_matmul_integer_of_vectors() -> None:
    a, b = bytes_of(np.uint8, 6), bytes_of(np.int8, 2, 6, 3, seed=1)
    wide = a.astype(np.int32) - 9, b.astype(np.int32)
    zero = {"az": np.asarray(9, np.uint8)}
    np.testing.assert_array_equal(run("MatMulInteger", {"a": a, "b": b, **zero}), np.matmul(*wide))
    np.testing.assert_array_equal(
        run("MatMulInteger", {"a": a, "b": b[0, :, 0], **zero}), np.matmul(wide[0], wide[1][0, :, 0])
    )
    left = b.swapaxes(1, 2).copy()
    np.testing.assert_array_equal(run("MatMulInteger", {"a": left, "b": a}), np.matmul(left.astype(np.int32), a))


def test_products_of_the_greatest_bytes_do_not_saturate() -> None:
    a, b = np.full((1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    assert run("MatMulInteger", {"a": a, "b": b}).item() == 255 * 127 * 64


@pytest.mark.parametrize("form", ["static", "symbolic", "known"])
@pytest.mark.parametrize("channels", [False, True])
def test_conv_integer_pads_with_the_zero_point(form: str, channels: bool) -> None:
    x, w = bytes_of(np.uint8, 2, 4, 6, 5), bytes_of(np.uint8, 6, 2, 3, 2, seed=1)
    x_zero = np.asarray(200, np.uint8)
    w_zero = bytes_of(np.uint8, 6, seed=2) if channels else np.asarray(128, np.uint8)
    attributes = {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": 2}
    shifted = w.astype(np.float32) - w_zero.astype(np.float32).reshape(-1, 1, 1, 1)
    expected = run("Conv", {"x": x.astype(np.float32) - 200, "w": shifted}, **attributes)
    inputs = {"x": x, "w": w, "xz": x_zero, "wz": w_zero}
    found = run("ConvInteger", inputs, 10, known=("w", "wz"), form=form, **attributes)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected.astype(np.int64))


def test_weights_around_128_become_centred_integers() -> None:
    inputs = {
        "x": bytes_of(np.uint8, 1, 2, 5, 5),
        "w": bytes_of(np.uint8, 2, 2, 3, 3, seed=1),
        "xz": None,
        "wz": np.asarray(128, np.uint8),
    }
    graph = graph_of(model_of("ConvInteger", inputs, {}, 10, 1, ("w", "wz"), ("x", "xz")))
    *_, node = graph.nodes
    assert isinstance(node.op, Conv)
    assert node.inputs[1].dtype == INT16 and node.inputs[1].constant is not None


def test_quantized_products_round_half_to_even() -> None:
    x, w = bytes_of(np.uint8, 1, 3, 5, 5), bytes_of(np.int8, 4, 3, 2, 2, seed=1)
    scale = {"xs": np.float32(0.02), "ws": np.linspace(0.01, 0.03, 4, dtype=np.float32), "ys": np.float32(0.05)}
    inputs = {
        "x": x, "xs": np.asarray(scale["xs"]), "xz": np.asarray(120, np.uint8),
        "w": w, "ws": scale["ws"], "wz": np.zeros(4, np.int8),
        "ys": np.asarray(scale["ys"]), "yz": np.asarray(10, np.uint8), "b": np.arange(4, dtype=np.int32) * 100,
    }  # fmt: skip
    sums = run("Conv", {"x": x.astype(np.float32) - 120, "w": w.astype(np.float32)})
    sums = sums + inputs["b"].reshape(-1, 1, 1)
    ratio = np.rint(sums * (scale["xs"] * scale["ws"] / scale["ys"]).reshape(-1, 1, 1)) + 10
    np.testing.assert_array_equal(run("QLinearConv", inputs, 10), np.clip(ratio, 0, 255).astype(np.uint8))


def test_quantize_and_dequantize_agree_with_onnxruntime() -> None:
    x, scale = numbers(3, 4, 5) * 40, np.array([0.5, 0.25, 1.5, 0.1], np.float32)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        zero = bytes_of(np.int8, 4, seed=1).astype(dtype) if dtype != np.uint16 else np.array([1, 2, 3, 4], dtype)
        agree("QuantizeLinear", {"x": x, "s": scale, "z": zero}, known=("s", "z"), axis=1)
        agree(
            "DequantizeLinear", {"x": x.astype(np.int8).astype(dtype), "s": scale, "z": zero}, known=("s", "z"), axis=-2
        )
    agree("DynamicQuantizeLinear", {"x": x}, outputs=3)
    agree("DynamicQuantizeLinear", {"x": abs(x) + 1}, outputs=3)


def test_saturation_of_what_is_not_finite() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -2.5, 3.5], np.float32)
    one = np.asarray(1, np.float32)
    found = run("QuantizeLinear", {"x": x, "s": one, "z": np.asarray(0, np.int8)})
    np.testing.assert_array_equal(found[1:], np.array([127, -128, 127, -2, 4], np.int8))
    eight = run("QuantizeLinear", {"x": x, "s": one}, output_dtype=TensorProto.FLOAT8E4M3FN).astype(np.float32)
    np.testing.assert_array_equal(eight, np.array([np.nan, 448, -448, 448, -2.5, 3.5], np.float32))
    open_ended = run("QuantizeLinear", {"x": x, "s": one}, output_dtype=TensorProto.FLOAT8E5M2, saturate=0)
    assert np.isinf(open_ended[1:4].astype(np.float32)).all()


@pytest.mark.parametrize("extent", [6, 7])
def test_blocks_may_end_early(extent: int) -> None:
    x, blocks = numbers(2, extent, 3) * 5, -(-extent // 3)
    scale = abs(numbers(2, blocks, 3, seed=1)) + 0.5
    spread = np.repeat(scale, 3, axis=1)[:, :extent]
    for form in ("known", "symbolic"):
        inputs = {"x": x, "s": scale}
        found = run("QuantizeLinear", inputs, form=form, axis=1, block_size=3, output_dtype=TensorProto.INT4)
        assert found.dtype == ml_dtypes.int4
        expected = np.clip(np.rint(x / spread), -8, 7)
        np.testing.assert_array_equal(found.astype(np.float32), expected)
        back = run("DequantizeLinear", {"x": found, "s": scale}, form=form, axis=1, block_size=3)
        np.testing.assert_allclose(back, expected * spread, rtol=1e-6)


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(InvalidModel, match="blocks of 3"):
        run("QuantizeLinear", {"x": numbers(2, 6), "s": numbers(2, 3)}, axis=1, block_size=3)


def test_zeros_quantize_dynamically_without_nan() -> None:
    y, scale, zero = run("DynamicQuantizeLinear", {"x": np.zeros((2, 3), np.float32)}, outputs=3)
    assert not y.any() and zero == 0 and scale == 1
