"""The normalisations of com.microsoft against onnxruntime, or its own ONNX operators where it has no kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel
from tests.microsoft_models import Array, agree, integers, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of

HALF = {"rtol": 5e-3, "atol": 5e-3}


@pytest.mark.parametrize("skip", [(2, 3, 8), (1, 3, 8), (3, 8)])
@pytest.mark.parametrize("affine", ["", "b", "c", "bc"])
def test_skip_layer_normalization(skip: tuple[int, ...], affine: str) -> None:
    x, gamma, beta, bias = numbers(2, 3, 8), numbers(8, seed=1), numbers(8, seed=2), numbers(8, seed=3)
    inputs = {
        "x": x,
        "s": numbers(*skip, seed=4),
        "g": gamma,
        "b": beta if "b" in affine else None,
        "c": bias if "c" in affine else None,
    }
    agree("SkipLayerNormalization", inputs, (0, 3), known=("g", "b", "c"), epsilon=1e-5)
    del inputs["b"]
    agree("SkipSimplifiedLayerNormalization", inputs, (0, 3), known=("g", "c"), epsilon=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_skip_layer_normalization_of_two_axes(dtype: Any) -> None:
    inputs = {name: numbers(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(
        {"x": (5, 16), "s": (5, 16), "g": (16,)}.items())}  # fmt: skip
    tolerance = HALF if dtype == np.float16 else {}
    agree("SkipLayerNormalization", inputs, **tolerance)
    agree("SkipSimplifiedLayerNormalization", inputs, **tolerance)


def test_statistics_of_skip_layer_normalization() -> None:
    """onnxruntime's CPU kernel leaves them unwritten."""
    x, skip, gamma = numbers(2, 3, 8), numbers(2, 3, 8, seed=1), numbers(8, seed=2)
    total = x + skip
    root = 1 / np.sqrt(total.var(-1, keepdims=True) + 1e-3)
    expected = [total.mean(-1, keepdims=True), root]
    agree("SkipLayerNormalization", {"x": x, "s": skip, "g": gamma}, (1, 2), expected=expected, epsilon=1e-3)
    root = 1 / np.sqrt((total * total).mean(-1, keepdims=True) + 1e-3)
    inputs = {"x": x, "s": skip, "g": gamma}
    agree("SkipSimplifiedLayerNormalization", inputs, (2,), expected=[root], epsilon=1e-3)


@pytest.mark.parametrize(("dtype", "scale"), [("f4", "f4"), ("f8", "f8"), ("f2", "f2"), ("f4", "f2"), ("f2", "f4")])
@pytest.mark.parametrize("axis", [-1, 1])
def test_simplified_layer_normalization(dtype: str, scale: str, axis: int) -> None:
    x = numbers(2, 3, 8, dtype=dtype)
    gamma = numbers(*x.shape[axis:], seed=1, dtype=scale)
    wide = x.astype(np.float64)
    root = 1 / np.sqrt((wide**2).mean(tuple(range(axis % 3, 3)), keepdims=True) + 1e-5)
    computed = [(wide * root * gamma).astype(scale), root.astype(np.float32)]
    tolerance = HALF if "f2" in (dtype, scale) else {}
    inputs = {"x": x, "g": gamma}
    expected = computed if dtype != scale else None
    agree("::SimplifiedLayerNormalization", inputs, 2, version=17, expected=expected, axis=axis, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization_before_its_opset(bias: bool, axis: int) -> None:
    x = numbers(2, 3, 8)
    scale, shift = numbers(*x.shape[axis:], seed=1), numbers(*x.shape[axis:], seed=2)
    inputs = {"x": x, "g": scale, "b": shift if bias else None}
    agree("::LayerNormalization", inputs, 3, version=13, known=("g", "b"), axis=axis)


def norm_inputs(shape: tuple[int, ...]) -> dict[str, Array]:
    channels = shape[1]
    return {"x": numbers(*shape), "g": numbers(channels, seed=1), "b": numbers(channels, seed=2)}


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
def test_group_norm(last: int, activation: int) -> None:
    def layout(x: Array) -> Array:
        return x.transpose(0, 2, 3, 1).copy() if last else x

    def reference(x: Array) -> Array:
        attributes = {"num_groups": 2, "epsilon": 1e-3}
        (y,) = onnxruntime_exactly(
            node_model("::GroupNormalization", {**inputs, "x": x}, attributes, version=21), {**inputs, "x": x}
        )
        return layout(y / (1 + np.exp(-y)) if activation else y)

    inputs = norm_inputs((2, 6, 5, 4))
    attributes = {"groups": 2, "epsilon": 1e-3, "channels_last": last, "activation": activation}
    given = {**inputs, "x": layout(inputs["x"])}
    agree("GroupNorm", given, known=("g", "b"), expected=[reference(inputs["x"])], **attributes)
    bias = numbers(6, seed=3)
    for skip in (numbers(2, 6, 5, 4, seed=4), numbers(2, 6, 1, 1, seed=4), numbers(2, 6, seed=4)):
        spread = skip if skip.ndim == 4 else skip[..., None, None]
        for added in (None, bias):
            total = inputs["x"] + spread + (0 if added is None else bias[:, None, None])
            more = {**given, "s": layout(skip) if skip.ndim == 4 else skip, "c": added}
            agree("SkipGroupNorm", more, 2, expected=[reference(total), layout(total)], **attributes)


@pytest.mark.parametrize("given", ["", "s", "m", "p", "smp"])
def test_embed_layer_normalization(given: str) -> None:
    ids = {"dtype": np.int32}
    inputs = {
        "i": integers(0, 9, 2, 5, **ids),
        "s": integers(0, 2, 2, 5, seed=1, **ids) if "s" in given else None,
        "we": numbers(9, 8),
        "pe": numbers(12, 8, seed=1),
        "se": numbers(2, 8, seed=2) if "s" in given else None,
        "g": numbers(8, seed=3),
        "b": numbers(8, seed=4),
        "m": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32) if "m" in given else None,
        "p": integers(0, 12, 2, 5, seed=5, **ids) if "p" in given else None,
    }
    weights = ("we", "pe", "se", "g", "b")
    agree("EmbedLayerNormalization", inputs, 3, known=weights, epsilon=1e-5)
    if "p" in given:
        agree("EmbedLayerNormalization", {**inputs, "p": integers(0, 12, 1, 5, **ids)}, 3, known=weights)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("segments", [False, True])
def test_q_embed_layer_normalization(dtype: Any, segments: bool) -> None:
    low = np.iinfo(dtype).min
    tables = {"we": (9, 8), "pe": (12, 8), "se": (2, 8), "g": (8,), "b": (8,)}
    inputs: dict[str, Array | None] = {
        "i": integers(0, 9, 2, 5, dtype=np.int32), "s": integers(0, 2, 2, 5, seed=1, dtype=np.int32),
        **{name: integers(low, low + 256, *shape, seed=2, dtype=dtype) for name, shape in tables.items()},
        "m": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32),
        **{name + "s": np.array(0.01 * (i + 1), np.float32) for i, name in enumerate(tables)},
        **{name + "z": np.array(low + 100 + i, dtype) for i, name in enumerate(tables)},
    }  # fmt: skip
    if not segments:
        inputs |= dict.fromkeys(("s", "se", "ses", "sez"))
    agree("QEmbedLayerNormalization", inputs, 2, known=tuple(tables), epsilon=1e-5)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("scale", [None, (4,), (3, 4), (12,)])
def test_branchwise_rms_norm(dtype: str, scale: tuple[int, ...] | None) -> None:
    tolerance = HALF if dtype == "f2" else {}
    factor = None if scale is None else numbers(*scale, seed=1, dtype="f2")
    x = numbers(2, 5, 3, 4, dtype=dtype)
    agree("BranchwiseRMSNorm", {"x": x, "s": factor}, known=("s",), **tolerance)
    agree("BranchwiseRMSNorm", {"x": x.reshape(2, 5, 12), "s": factor}, known=("s",), num_branches=3, **tolerance)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
def test_gated_rms_norm(dtype: str, activation: str) -> None:
    inputs = {"x": numbers(2, 5, 12, dtype=dtype), "s": numbers(4, dtype=dtype), "g": numbers(2, 5, 12, dtype=dtype)}
    agree("GatedRMSNorm", inputs, known=("s",), activation=activation, **(HALF if dtype == "f2" else {}))


def test_what_cannot_be_is_refused() -> None:
    inputs = norm_inputs((2, 6, 5, 4))
    with pytest.raises(InvalidModel, match="GroupNorm"):
        graph_of(node_model("GroupNorm", inputs, {"groups": 4, "activation": 0, "channels_last": 0}))
    with pytest.raises(InvalidModel, match="activation 2"):
        graph_of(node_model("GroupNorm", inputs, {"groups": 2, "activation": 2, "channels_last": 0}))
    gates = {"x": numbers(2, 4), "s": numbers(4), "g": numbers(2, 4)}
    with pytest.raises(InvalidModel, match="tanh"):
        graph_of(node_model("GatedRMSNorm", gates, {"activation": "tanh"}))
