"""Weights of a few bits in com.microsoft against onnxruntime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.microsoft.weights import CODES
from gpu_engine.passes.pipeline import optimize
from tests.microsoft_models import Array, Inputs, agree, integers, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of
from tests.reference import kinds

WEIGHTS = ("b", "s", "z", "g", "c")


def packed(codes: Array, bits: int) -> Array:
    """Codes of the last axis, the first one in the lowest bits of a byte."""
    per = 8 // bits
    missing = -codes.shape[-1] % per
    whole = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]).reshape(*codes.shape[:-1], -1, per)
    return (whole.astype(np.uint32) << (bits * np.arange(per, dtype=np.uint32))).sum(-1).astype(np.uint8)


def quantized(
    bits: int, rows: int = 6, columns: int = 40, block: int = 16, dtype: Any = np.float32
) -> dict[str, Array]:
    blocks = -(-columns // block)
    return {
        "codes": integers(0, 2**bits, rows, blocks, block, dtype=np.uint8),
        "scales": (np.abs(numbers(rows, blocks, seed=1)) + 0.1).astype(dtype),
        "zeros": integers(0, 2**bits, rows, blocks, seed=2, dtype=np.uint8),
    }


def inputs_of(held: dict[str, Array], bits: int, a: Array, zeros: str) -> Inputs:
    kept = {"": None, "packed": packed(held["zeros"], bits), "flat": packed(held["zeros"], bits).ravel()}
    kept["numbers"] = held["zeros"].astype(held["scales"].dtype)
    scales = held["scales"].ravel() if zeros == "flat" else held["scales"]
    return {"a": a, "b": packed(held["codes"], bits), "s": scales, "z": kept[zeros], "g": None, "c": None}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["", "packed", "flat", "numbers"])
@pytest.mark.parametrize("shape", [(2, 3, 40), (3, 40), (40,)])
def test_matmul_nbits(bits: int, zeros: str, shape: tuple[int, ...]) -> None:
    """onnxruntime has zero points that are numbers for 2 and 4 bits only."""
    inputs = inputs_of(quantized(bits), bits, numbers(*shape), zeros)
    attributes = {"N": 6, "K": 40, "bits": bits, "block_size": 16, "accuracy_level": 1}
    expected = None
    if bits == 8 and zeros == "numbers":
        other = inputs_of(quantized(bits), bits, numbers(*shape), "packed")
        given = {key: array for key, array in other.items() if array is not None}
        expected = onnxruntime_exactly(node_model("MatMulNBits", other, attributes), given)
    atol = 2e-6 * 4**bits
    agree("MatMulNBits", inputs, known=WEIGHTS, atol=atol, expected=expected, **attributes)
    if zeros == "packed":
        agree("MatMulNBits", {**inputs, "c": numbers(6)}, known=WEIGHTS, atol=atol, **attributes)


def test_matmul_nbits_of_narrow_floats() -> None:
    held = quantized(4, dtype=np.float16)
    inputs = inputs_of(held, 4, numbers(3, 40, dtype=np.float16), "packed")
    agree("MatMulNBits", inputs, known=WEIGHTS, N=6, K=40, block_size=16, rtol=5e-3, atol=5e-2)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_columns_in_another_order(bits: int, padded: bool) -> None:
    """The expectation is the specification's: with an index, onnxruntime 1.31 takes the middle for a zero point, and
    reads 2 bits as if they were 4."""
    held, a = quantized(bits), numbers(3, 40)
    group = np.random.default_rng(5).permutation(np.repeat(np.arange(3), 16)[:40]).astype(np.int32)
    index = np.pad(group, (0, 8)) if padded else group
    attributes = {"N": 6, "K": 40, "bits": bits, "block_size": 16, "accuracy_level": 1}
    flat = held["codes"].reshape(6, -1)[:, :40].astype(np.float32)
    plain = {**inputs_of(held, bits, a, ""), "g": index}
    product = a @ ((flat - 2 ** (bits - 1)) * held["scales"][:, group]).T
    expected = None if bits == 4 else [product]
    agree("MatMulNBits", plain, known=WEIGHTS, atol=2e-4, expected=expected, **attributes)
    weights = (flat - held["zeros"][:, group]) * held["scales"][:, group]
    inputs = {**inputs_of(held, bits, a, "packed"), "g": index}
    agree("MatMulNBits", inputs, known=WEIGHTS, atol=2e-4, expected=[a @ weights.T], **attributes)


def test_constant_weights_become_numbers_while_compiling() -> None:
    inputs = inputs_of(quantized(4), 4, numbers(3, 40), "packed")
    graph = graph_of(node_model("MatMulNBits", inputs, {"N": 6, "K": 40, "block_size": 16}, 1, WEIGHTS, ("a",)))
    assert kinds(graph) == ["Dequantize", "MatMul"]
    assert kinds(optimize(graph)) == ["MatMul"]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(6, 40), (5, 33)])
@pytest.mark.parametrize("transposed", [1, 0])
def test_matmul_bnb4(kind: int, rows: int, columns: int, transposed: int) -> None:
    """Where B is not transposed (for training), the expectation is the specification's: onnxruntime 1.31 writes only
    the first N of the K columns."""
    codes = integers(0, 16, rows * columns, dtype=np.uint8)
    pairs = np.pad(codes, (0, codes.size % 2)).reshape(-1, 2)
    absmax = (np.abs(numbers(-(-codes.size // 16), seed=1)) + 0.1).astype(np.float32)
    inputs = {"a": numbers(2, 3, columns if transposed else rows), "b": pairs[:, 0] << 4 | pairs[:, 1], "s": absmax}
    attributes = {"N": rows, "K": columns, "block_size": 16, "quant_type": kind, "transB": transposed}
    expected = None
    if not transposed:
        weights = (CODES[kind][codes] * np.repeat(absmax, 16)[: codes.size]).reshape(rows, columns)
        expected = [inputs["a"] @ weights]
    agree("MatMulBnb4", inputs, known=("b", "s"), expected=expected, **attributes)
    assert np.unique(CODES[kind]).size == (15 if kind == 0 else 16)


INDICES = [np.array([[0, 8, 3], [-1, 5, -9]]), np.array([2, 11, -12, 8], np.int32), np.array(4)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("indices", INDICES, ids=["two axes", "beyond", "one"])
def test_gather_bytes(bits: int, indices: Array) -> None:
    codes, zeros = (integers(0, 2**bits, 9, n, seed=n, dtype=np.uint8) for n in (40, 3))
    inputs = {"d": packed(codes, bits), "i": indices, "s": numbers(9, 3)}
    for more in ({}, {"z": packed(zeros, bits)}):
        agree("GatherBlockQuantized", {**inputs, **more}, fixed=("d", "s", "z"), bits=bits, block_size=16)
    many = {"d": packed(codes.reshape(3, 3, 40), bits), "i": np.asarray(indices % 3), "s": numbers(3, 3, 3)}
    agree("GatherBlockQuantized", many, fixed=("d", "s"), bits=bits, block_size=16, quantize_axis=-1)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize(("picked", "blocked"), [(0, 1), (1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("scale", [np.float32, np.float16])
def test_gather_nibbles(dtype: Any, picked: int, blocked: int, scale: Any) -> None:
    low = int(ml_dtypes.iinfo(dtype).min)
    shape = (20, 3) if blocked == 0 else (9, 3)
    codes = integers(low, low + 16, 20 if blocked == 0 else 9, 40).astype(dtype)
    blocks = (2, 40) if blocked == 0 else shape
    zeros = integers(low, low + 16, *blocks, seed=1).astype(dtype)
    inputs = {"d": codes, "i": INDICES[0], "s": numbers(*blocks, dtype=scale)}
    attributes = {"block_size": 16, "gather_axis": picked, "quantize_axis": blocked}
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if scale is np.float16 else {}
    for more in ({}, {"z": zeros}):
        agree("GatherBlockQuantized", {**inputs, **more}, fixed=("d", "s", "z"), **attributes, **tolerance)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn])
@pytest.mark.parametrize(("scales", "block"), [((9, 3), 16), ((9, 1), 0), ((1, 1), 0), ((1, 3), 16)])
@pytest.mark.parametrize("picked", [0, 1])
def test_gather_small_floats(dtype: Any, scales: tuple[int, int], block: int, picked: int) -> None:
    inputs = {"d": numbers(9, 40).astype(dtype), "i": INDICES[0], "s": numbers(*scales)}
    agree("GatherBlockQuantized", inputs, fixed=("d", "s"), block_size=block, gather_axis=picked)


def test_what_cannot_be_is_refused() -> None:
    inputs = inputs_of(quantized(4), 4, numbers(3, 40), "")
    for more in ({"bits": 3}, {"weight_prepacked": 1}):
        with pytest.raises(InvalidModel, match="MatMulNBits"):
            graph_of(node_model("MatMulNBits", inputs, {"N": 6, "K": 40, "block_size": 16, **more}))
    given = {"d": integers(0, 256, 9, 20, dtype=np.uint8), "i": INDICES[0], "s": numbers(9, 3)}
    with pytest.raises(InvalidModel, match="gathered along axis 1"):
        graph_of(node_model("GatherBlockQuantized", given, {"block_size": 16, "gather_axis": 1}))
