"""Fused products, activations and retired operators against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel
from tests.microsoft_models import agree, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of

CONVOLUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("", {"activation": "Relu"}),
    ("b", {"activation": "Tanh", "strides": [2, 1]}),
    ("bz", {"activation": "Sigmoid", "dilations": [2, 1]}),
    ("z", {"activation": "LeakyRelu", "activation_params": [0.1], "pads": [1, 0, 2, 1]}),
    ("bz", {"activation": "Clip", "activation_params": [-0.5, 0.25], "auto_pad": "SAME_UPPER"}),
    ("b", {"activation": "HardSigmoid", "activation_params": [0.25, 0.4], "group": 2}),
    ("bz", {"activation": "HardSwish", "kernel_shape": [3, 2]}),
    ("bz", {}),
]


@pytest.mark.parametrize(("given", "attributes"), CONVOLUTIONS)
def test_fused_conv(given: str, attributes: dict[str, Any]) -> None:
    x, w = numbers(2, 4, 7, 6), numbers(6, 4 // attributes.get("group", 1), 3, 2, seed=1)
    plain = {key: value for key, value in attributes.items() if not key.startswith("activation")}
    (y,) = onnxruntime_exactly(node_model("::Conv", {"x": x, "w": w}, plain, version=21), {"x": x, "w": w})
    inputs = {
        "x": x,
        "w": w,
        "b": numbers(6, seed=2) if "b" in given else None,
        "z": numbers(*y.shape, seed=3) if "z" in given else None,
    }
    agree("FusedConv", inputs, known=("w", "b"), **attributes)
    nhwc = {key: v if v is None or key in "wb" else v.transpose(0, 2, 3, 1) for key, v in inputs.items()}
    model = node_model("FusedConv", inputs, attributes)
    (expected,) = onnxruntime_exactly(model, {key: v for key, v in inputs.items() if v is not None})
    agree("NhwcFusedConv", nhwc, known=("w", "b"), expected=[expected.transpose(0, 2, 3, 1)], **attributes)


def test_nhwc_conv() -> None:
    x, w, bias = numbers(2, 4, 7, 6), numbers(6, 2, 3, 2, seed=1), numbers(6, seed=2)
    attributes = {"group": 2, "pads": [1, 0, 1, 1], "strides": [2, 1]}
    inputs = {"x": x, "w": w, "b": bias}
    (expected,) = onnxruntime_exactly(node_model("::Conv", inputs, attributes, version=21), inputs)
    nhwc = {**inputs, "x": x.transpose(0, 2, 3, 1)}
    agree("NhwcConv", nhwc, known=("w", "b"), expected=[expected.transpose(0, 2, 3, 1)], **attributes)


@pytest.mark.parametrize("pads", [None, [1, 0, 0, 1]])
def test_conv_transpose_with_dynamic_pads(pads: list[int] | None) -> None:
    x, w, bias = numbers(2, 4, 5, 6), numbers(4, 3, 3, 2, seed=1), numbers(3, seed=2)
    attributes = {"strides": [2, 2], "output_padding": [1, 0]}
    plain = {"x": x, "w": w, "b": bias}
    fixed = attributes if pads is None else {**attributes, "pads": pads}
    expected = onnxruntime_exactly(node_model("::ConvTranspose", plain, fixed, version=21), plain)
    inputs = {"x": x, "w": w, "p": None if pads is None else np.array(pads), "b": bias}
    agree("ConvTransposeWithDynamicPads", inputs, known=("w",), fixed=("p",), expected=expected, **attributes)


FUNCTIONS: list[dict[str, Any]] = [
    {"activation": "Relu"},
    {"activation": "LeakyRelu", "activation_alpha": 0.3},
    {"activation": "Elu", "activation_alpha": 0.3},
    {"activation": "Celu", "activation_alpha": 0.3},
    {"activation": "HardSigmoid", "activation_alpha": 0.3, "activation_beta": 0.6},
    {"activation": "ParametricSoftplus", "activation_alpha": 0.3, "activation_beta": 0.6},
    {"activation": "ScaledTanh", "activation_alpha": 0.3, "activation_beta": 0.6},
    {"activation": "Selu", "activation_alpha": 0.3, "activation_gamma": 1.5},
    {"activation": "ThresholdedRelu", "activation_alpha": 0.3, "activation_beta": 9.0},
    {"activation": "Sigmoid", "alpha": 0.5, "beta": 2.0},
    {"activation": "Softplus", "transA": 1},
    {"activation": "Softsign", "transB": 1},
    {"activation": "Tanh", "transA": 1, "transB": 1, "alpha": 0.25},
]


@pytest.mark.parametrize("attributes", FUNCTIONS, ids=lambda attributes: attributes["activation"])
@pytest.mark.parametrize("bias", [None, (5,), (3, 1), (3, 5)])
def test_fused_gemm(attributes: dict[str, Any], bias: tuple[int, ...] | None) -> None:
    a, c = numbers(3, 4), numbers(4, 5, seed=1)
    inputs = {
        "a": a.T.copy() if attributes.get("transA") else a,
        "b": c.T.copy() if attributes.get("transB") else c,
        "c": None if bias is None else numbers(*bias, seed=2),
    }
    agree("FusedGemm", inputs, known=("b", "c"), **attributes)


PRODUCTS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]] = [
    ((2, 3, 4, 5), (2, 3, 5, 6), {}),
    ((4, 2, 3, 5), (2, 3, 5, 6), {"transBatchA": 1}),
    ((5, 2, 3, 4), (2, 3, 5, 6), {"transBatchA": 1, "transA": 1}),
    ((2, 3, 4, 5), (5, 2, 3, 6), {"transBatchB": 1}),
    ((2, 3, 4, 5), (6, 2, 3, 5), {"transBatchB": 1, "transB": 1}),
    ((5,), (5, 6), {"transA": 1}),
    ((5,), (2, 6, 5), {"transB": 1}),
    ((4, 5), (5,), {"transB": 1}),
    ((5,), (5,), {"transA": 1}),
    ((3, 4, 5), (5, 6), {}),
    ((5, 4), (3, 5, 6), {"transA": 1}),
    ((4, 5), (2, 6, 5), {"transB": 1}),
]


@pytest.mark.parametrize(("left", "right", "attributes"), PRODUCTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_matmul(left: tuple[int, ...], right: tuple[int, ...], attributes: dict[str, int], dtype: Any) -> None:
    inputs = {"a": numbers(*left, dtype=dtype), "b": numbers(*right, seed=1, dtype=dtype)}
    agree("FusedMatMul", inputs, known=("b",), alpha=0.25, **attributes)
    if dtype == np.float32 and not any(key.startswith("transBatch") for key in attributes):
        agree("TransposeMatMul", inputs, known=("b",), **attributes)


def test_a_transposed_matrix_times_a_vector() -> None:
    """onnxruntime 1.31 reads the matrix as if it lay transposed already."""
    a, v = numbers(5, 4), numbers(5, seed=1)
    agree("FusedMatMul", {"a": a, "b": v}, expected=[a.T @ v], transA=1)


def test_gelus() -> None:
    x = np.concatenate([numbers(40) * 3, np.array([-40, -5, -0.0, 0, 5, 40], np.float32)])
    bias = numbers(46, seed=1)
    agree("Gelu", {"x": x}, atol=1e-6)
    agree("QuickGelu", {"x": x}, atol=1e-6)
    agree("QuickGelu", {"x": x}, atol=1e-6, alpha=0.5)
    agree("FastGelu", {"x": x}, atol=1e-6)
    for shape in ((46,), (2, 3, 46)):
        wide = np.broadcast_to(x, shape).copy()
        agree("FastGelu", {"x": wide, "b": bias}, known=("b",), atol=1e-6)
        agree("BiasGelu", {"x": wide, "b": bias}, known=("b",), atol=1e-6)


def test_fused_sums() -> None:
    x, skip, bias = numbers(2, 3, 8), numbers(2, 3, 8, seed=1), numbers(8, seed=2)
    agree("BiasAdd", {"x": x, "b": bias, "s": skip}, expected=[x + bias + skip])
    left, right = np.split(x + bias, 2, axis=-1)
    (gated,) = onnxruntime_exactly(node_model("Gelu", {"x": right}, {}), {"x": right})
    agree("BiasSplitGelu", {"x": x, "b": bias}, known=("b",), expected=[left * gated])
    product = numbers(2, 3, 4, seed=3)
    inputs = {"x": (product @ numbers(4, 8, seed=4)).astype(np.float32), "b": bias}
    expected = onnxruntime_exactly(node_model("FastGelu", inputs, {}), inputs)
    agree("GemmFastGelu", {"x": product, "w": numbers(4, 8, seed=4), "b": bias}, expected=expected)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("bias", [(1, 1, 5), (2, 1, 5), (1, 4, 5)])
def test_bias_softmax(axis: int, bias: tuple[int, ...]) -> None:
    x, added = numbers(2, 4, 5), numbers(*bias, seed=1)
    inputs = {"x": x + added}
    expected = onnxruntime_exactly(node_model("::Softmax", inputs, {"axis": axis}, version=11), inputs)
    agree("BiasSoftmax", {"x": x, "b": added}, expected=expected, axis=axis, is_inner_broadcast=int(bias[1] == 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_rounds_between_its_steps(dtype: Any) -> None:
    """A step of float16 at most, where a library's exponential rounds the other way."""
    x, y, gate = (numbers(3, 7, 8, seed=seed, dtype=dtype) for seed in (0, 1, 2))
    agree("GatedAdd", {"x": x, "y": y, "g": gate[..., :1].copy()}, rtol=0, atol=0)
    step = 1e-3 if dtype == np.float16 else 1e-6
    agree("ScaledSiLU", {"x": x}, rtol=step, atol=1e-6, alpha=0.7)
    agree("ScaledSiLU", {"x": x, "s": np.array(1.3, np.float32)}, rtol=step, atol=1e-6)


@pytest.mark.parametrize("spoiled", [None, np.inf, -np.inf, np.nan])
def test_is_all_finite(spoiled: float | None) -> None:
    x, y = numbers(3, 4), numbers(5)
    y[2] = y[2] if spoiled is None else spoiled
    finite, number = bool(np.isfinite(y).all()), not np.isnan(y).any()
    for attributes, expected in (({}, finite), ({"isnan_only": 1}, number), ({"isinf_only": 1}, not np.isinf(y).any())):
        agree("IsAllFinite", {"x": x, "y": y}, expected=[np.asarray(expected)], **attributes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_cdist(dtype: Any, metric: str) -> None:
    inputs = {"a": numbers(6, 5, dtype=dtype), "b": numbers(7, 5, seed=1, dtype=dtype)}
    agree("CDist", inputs, known=("b",), metric=metric)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_inverse(dtype: Any) -> None:
    x = (numbers(2, 3, 4, 4) + 3 * np.eye(4, dtype=np.float32)).astype(dtype)
    agree("Inverse", {"x": x}, rtol=4e-3 if dtype == np.float16 else 1e-4, atol=1e-3 if dtype == np.float16 else 1e-5)


def test_retired_operators() -> None:
    x, image = numbers(3, 5), numbers(2, 3, 6, 5)
    agree("::ScaledTanh", {"x": x}, version=7, alpha=0.5, beta=2.0)
    agree("::ParametricSoftplus", {"x": x}, version=7, alpha=0.5, beta=2.0)
    agree("::Affine", {"x": x}, version=7, alpha=0.5, beta=2.0)
    agree("::Scale", {"x": x}, version=7, scale=0.5)
    agree("::ImageScaler", {"x": image}, version=7, scale=0.5, bias=[1.0, 2.0, 3.0])
    agree("::Crop", {"x": image}, version=7, border=[1, 2, 1, 0])
    agree("::Crop", {"x": image}, version=7, border=[1, 2, 0, 0], scale=[2, 3])
    inputs = {"x": x, "s": np.array([1, -4]), "e": np.array([3, 1000]), "a": np.array([0, 1])}
    agree("::DynamicSlice", inputs, fixed=("s", "e", "a"), version=7)


@pytest.mark.parametrize(
    ("name", "inputs", "attributes"),
    [
        ("FusedGemm", {"a": numbers(2, 3), "b": numbers(3, 4)}, {"activation": "Gelu"}),
        ("FusedConv", {"x": numbers(1, 3, 5), "w": numbers(2, 3, 3)}, {"activation": "Clip"}),
        ("CDist", {"a": numbers(2, 3), "b": numbers(3, 3)}, {"metric": "cosine"}),
        ("IsAllFinite", {"x": numbers(2)}, {"isinf_only": 1, "isnan_only": 1}),
    ],
)
def test_what_cannot_be_is_refused(name: str, inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match=name):
        graph_of(node_model(name, inputs, attributes))
