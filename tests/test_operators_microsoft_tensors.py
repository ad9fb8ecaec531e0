"""Index, token, image and transform operators of com.microsoft, and its mixtures of experts, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.frontend.operators.microsoft.tokens import hash_of
from tests.microsoft_models import Array, Inputs, agree, integers, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of


def test_expand_dims() -> None:
    for axis in (0, 1, 2, -1, -3):
        agree("ExpandDims", {"x": numbers(2, 3), "a": np.array(axis, np.int32)}, known=("a",))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32, np.int64])
def test_range(dtype: Any) -> None:
    inputs = {"a": np.array(1, dtype), "b": np.array(7, dtype), "c": None}
    agree("Range", inputs, known=("a", "b"))
    backwards = {"a": np.array([9], dtype), "b": np.array([1], dtype), "c": np.array([-3], dtype)}
    agree("Range", backwards, known=("a", "b", "c"))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("axes", [1, 2])
def test_pad(mode: str, axes: int) -> None:
    pads = np.array([0, 1, -1, 2])
    value = np.array([1.5], np.float32) if mode == "constant" else None
    inputs = {"x": numbers(5, 4), "p": pads if axes == 1 else pads[None], "v": value}
    agree("Pad", inputs, known=("p", "v"), mode=mode)


def test_unfold_tensor() -> None:
    agree("UnfoldTensor", {"x": numbers(2, 7, 3)}, size=3, dim=1, step=2)
    agree("UnfoldTensor", {"x": integers(0, 99, 4, 10)}, size=4)
    agree("UnfoldTensor", {"x": numbers(5, 2)}, size=5, dim=-2)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, -1, 2])
def test_trilu(upper: int, k: int | None) -> None:
    diagonal = None if k is None else np.array(k)
    agree("Trilu", {"x": numbers(2, 4, 3), "k": diagonal}, known=("k",), upper=upper)
    agree("Trilu", {"x": integers(0, 9, 3, 3), "k": diagonal}, known=("k",), upper=upper)


def test_gathers() -> None:
    x, index = numbers(4, 3, 2), np.array([[0, 1], [-1, 2], [3, -3]], np.int32)
    agree("GatherND", {"x": x, "i": index}, known=("i",), fixed=("i",))
    agree("TorchEmbedding", {"w": x, "i": index.astype(np.int64) % 4}, expected=[x[index % 4]])


@pytest.mark.parametrize("values", [[2, 1, 1, 3, 4, 3], [], [5], [0.0, -0.0, 1, np.nan, 2, np.nan]])
def test_unique(values: list[float]) -> None:
    agree("Unique", {"x": np.array(values, np.float32)}, 3)


@pytest.mark.parametrize("attributes", [{}, {"positive": 0}, {"seed": 4294967295}, {"positive": 0, "seed": 7}])
def test_murmur_hash3(attributes: dict[str, int]) -> None:
    whole = np.array([[0, 1, -2], [2**31 - 1, -(2**31), 77]])
    for dtype in (np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64):
        agree("MurmurHash3", {"x": whole.astype(dtype)}, **attributes)
    agree("MurmurHash3", {"x": integers(-(2**62), 2**62, 3, 5)}, **attributes)
    texts = np.array([["", "a", "ab"], ["abc", "abcd", "größer €"]], object)
    agree("MurmurHash3", {"x": texts}, **attributes)


def test_murmur_hash3_of_its_own_cases() -> None:
    """https://github.com/aappleby/smhasher and the vectors that other libraries check with."""
    known = {(b"", 0): 0, (b"", 1): 0x514E28B7, (b"test", 0x9747B28C): 0x704B81DC, (b"Hello, world!", 1234): 0xFAF6CDB3}
    assert {case: hash_of(*case) for case in known} == known


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ngram_repeat_block(size: int) -> None:
    ids = np.array([[1, 2, 3, 1, 2], [4, 4, 4, 4, 4], [0, 1, 2, 3, 4]])
    agree("NGramRepeatBlock", {"i": ids, "s": numbers(3, 6)}, ngram_size=size)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_grid_sample(mode: str, padding_mode: str, align_corners: int) -> None:
    grid = np.random.default_rng(1).uniform(-1.3, 1.3, (2, 4, 3, 2)).astype(np.float32)
    attributes = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    agree("GridSample", {"x": numbers(2, 3, 6, 5), "g": grid}, **attributes)


BOXES = np.array([[0, 0, 1, 1], [0.21, 0.13, 0.83, 0.94], [-0.3, 0.2, 0.4, 1.4], [0.9, 0.8, 0.1, 0.2]], np.float32)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (1, 1)])
def test_crop_and_resize(mode: str, size: tuple[int, int]) -> None:
    index = np.array([0, 1, 1, 0], np.int32)
    inputs = {"x": numbers(2, 3, 7, 6), "r": BOXES, "b": index, "c": np.array(size, np.int32)}
    agree("CropAndResize", inputs, known=("c",), mode=mode, extrapolation_value=9.5)


@pytest.mark.parametrize("signal_ndim", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fourier_transforms(signal_ndim: int, dtype: Any) -> None:
    """onnxruntime has them on CUDA only; there and back again is the signal."""
    x = numbers(3, 4, 10, dtype=dtype)
    found = np.fft.rfftn(x, axes=tuple(range(3 - signal_ndim, 3)))
    parts = np.stack([found.real, found.imag], -1).astype(dtype)
    agree("Rfft", {"x": x}, expected=[parts], signal_ndim=signal_ndim)
    agree("Irfft", {"x": parts}, expected=[x], signal_ndim=signal_ndim)


def test_complex_products() -> None:
    x, y = numbers(2, 3, 2), numbers(3, 2, seed=1)
    left, right = x[..., 0] + 1j * x[..., 1], y[..., 0] + 1j * y[..., 1]
    for name, product in (("ComplexMul", left * right), ("ComplexMulConj", left * right.conj())):
        agree(name, {"x": x, "y": y}, expected=[np.stack([product.real, product.imag], -1).astype(np.float32)])


TOKENS, WIDTH, INNER, EXPERTS = 5, 8, 12, 4
LAYERS = ("w1", "b1", "w2", "b2", "w3", "b3")


def mixture(fused: int = 1, biased: bool = True, shape: tuple[int, ...] = (TOKENS, WIDTH)) -> Inputs:
    return {
        "x": numbers(*shape),
        "r": numbers(TOKENS, EXPERTS, seed=1),
        "w1": numbers(EXPERTS, fused * INNER, WIDTH, seed=2),
        "b1": numbers(EXPERTS, fused * INNER, seed=3) if biased else None,
        "w2": numbers(EXPERTS, WIDTH, INNER, seed=4),
        "b2": numbers(EXPERTS, WIDTH, seed=5) if biased else None,
    }


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normalized", [0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_mixture_of_experts(k: int, normalized: int, biased: bool) -> None:
    inputs = mixture(biased=biased, shape=(1, TOKENS, WIDTH) if biased else (TOKENS, WIDTH))
    agree("MoE", inputs, known=LAYERS, atol=1e-4, k=k, normalize_routing_weights=normalized)


@pytest.mark.parametrize("activation", ["gelu", "silu", "identity"])
def test_activations_of_experts(activation: str) -> None:
    agree("MoE", mixture(), known=LAYERS, atol=1e-4, k=2, activation_type=activation)


@pytest.mark.parametrize("more", [{}, {"swiglu_limit": 0.5}, {"activation_alpha": 1.702, "activation_beta": 1.0}])
def test_gated_experts(more: dict[str, float]) -> None:
    """onnxruntime's CPU kernel has the two halves in turns only."""
    inputs = mixture(2)
    attributes = {"k": 2, "activation_type": "swiglu", **more}
    given = {key: array for key, array in inputs.items() if array is not None}
    agree("MoE", inputs, known=LAYERS, atol=1e-4, swiglu_fusion=1, **attributes)
    expected = onnxruntime_exactly(node_model("MoE", inputs, {**attributes, "swiglu_fusion": 1}), given)
    halves = {key: halved(given[key]) for key in ("w1", "b1")}
    joined = {key: np.concatenate(pair, 1) for key, pair in halves.items()}
    agree("MoE", {**inputs, **joined}, known=LAYERS, atol=1e-4, expected=expected, swiglu_fusion=2, **attributes)
    apart = {**inputs, **{key: pair[0] for key, pair in halves.items()}, "w3": halves["w1"][1], "b3": halves["b1"][1]}
    agree("MoE", apart, known=LAYERS, atol=1e-4, expected=expected, **attributes)


def halved(x: Array) -> tuple[Array, Array]:
    return x[:, 0::2].copy(), x[:, 1::2].copy()


@pytest.mark.parametrize(
    ("name", "inputs", "attributes", "error"),
    [
        ("MoE", mixture(), {"use_sparse_mixer": 1}, UnsupportedModel),
        ("MoE", mixture(), {"activation_type": "swiglu"}, InvalidModel),
        ("MoE", mixture(), {"activation_type": "elu"}, InvalidModel),
        ("Rfft", {"x": numbers(4)}, {"normalized": 1}, InvalidModel),
        ("MurmurHash3", {"x": numbers(4, dtype=np.float16)}, {}, InvalidModel),
        ("NGramRepeatBlock", {"i": integers(0, 3, 1, 4), "s": numbers(1, 3)}, {"ngram_size": 0}, InvalidModel),
    ],
)
def test_what_cannot_be_is_refused(name: str, inputs: Inputs, attributes: dict[str, Any], error: type) -> None:
    with pytest.raises(error, match=name):
        graph_of(node_model(name, inputs, attributes))
