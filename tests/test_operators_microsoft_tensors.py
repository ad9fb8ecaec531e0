"""Index, token, image and transform operators of com.microsoft against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.microsoft.tokens import hash_of
from tests.microsoft_models import Inputs, agree, integers, node_model, numbers
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


@pytest.mark.parametrize(
    ("name", "inputs", "attributes"),
    [
        ("Rfft", {"x": numbers(4)}, {"normalized": 1}),
        ("MurmurHash3", {"x": numbers(4, dtype=np.float16)}, {}),
        ("NGramRepeatBlock", {"i": integers(0, 3, 1, 4), "s": numbers(1, 3)}, {"ngram_size": 0}),
    ],
)
def test_what_cannot_be_is_refused(name: str, inputs: Inputs, attributes: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match=name):
        graph_of(node_model(name, inputs, attributes))
