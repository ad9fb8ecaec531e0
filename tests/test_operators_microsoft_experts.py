"""Mixtures of experts of com.microsoft against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel, UnsupportedModel
from tests.microsoft_models import Array, Inputs, agree, integers, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of
from tests.test_operators_microsoft_weights import packed

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


HIDDEN = 32


def quantized_layer(bits: int, rows: int, columns: int, block: int, zeros: bool, seed: int) -> dict[str, Array | None]:
    """Weights, scales and zero points as the operator takes them, and the numbers that they stand for."""
    blocks = columns // block if block else 1
    codes = integers(0, 2**bits, EXPERTS, rows, columns, seed=seed, dtype=np.uint8)
    scales = (np.abs(numbers(EXPERTS, rows, blocks, seed=seed)) * 0.02 + 0.01).astype(np.float32)
    zero = integers(0, 2**bits, EXPERTS, rows, blocks, seed=seed + 9, dtype=np.uint8)
    zero = zero if zeros else np.full_like(zero, 2 ** (bits - 1))
    apart = codes.reshape(EXPERTS, rows, blocks, -1).astype(np.float32)
    return {
        "w": packed(codes, bits),
        "s": scales if block else scales[..., 0],
        "z": packed(zero if block else zero[..., 0], bits) if zeros else None,
        "numbers": ((apart - zero[..., None]) * scales[..., None]).reshape(EXPERTS, rows, columns),
    }


def quantized_mixture(bits: int, block: int, zeros: bool, fused: int = 1) -> tuple[Inputs, Inputs]:
    """The inputs of QMoE, and of the MoE of the same numbers."""
    first = quantized_layer(bits, fused * HIDDEN, HIDDEN, block, zeros, 1)
    last = quantized_layer(bits, HIDDEN, HIDDEN, block, zeros, 2)
    shared = {"x": numbers(TOKENS, HIDDEN), "r": numbers(TOKENS, EXPERTS, seed=1)}
    bias = {"b1": numbers(EXPERTS, fused * HIDDEN, seed=3), "b2": numbers(EXPERTS, HIDDEN, seed=5)}
    order = {
        "w1": first["w"], "s1": first["s"], "b1": bias["b1"], "w2": last["w"], "s2": last["s"], "b2": bias["b2"],
        "w3": None, "s3": None, "b3": None, "z1": first["z"], "z2": last["z"], "z3": None, "rw": None,
    }  # fmt: skip
    plain = {"w1": first["numbers"], "b1": bias["b1"], "w2": last["numbers"], "b2": bias["b2"]}
    return {**shared, **order}, {**shared, **plain}


HELD = (*LAYERS, "s1", "s2", "z1", "z2")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("zeros", [False, True])
def test_quantized_mixture_of_experts(bits: int, block: int, zeros: bool) -> None:
    """onnxruntime quantises the tokens as well where blocks have 8 bits: there the reference is MoE."""
    inputs, plain = quantized_mixture(bits, block, zeros)
    attributes: dict[str, Any] = {"k": 2, "normalize_routing_weights": 1}
    expected = None
    if bits == 8 and block:
        given = {key: array for key, array in plain.items() if array is not None}
        expected = onnxruntime_exactly(node_model("MoE", plain, attributes), given)
    more = {"expert_weight_bits": bits, **({"block_size": block} if block else {})}
    agree("QMoE", inputs, known=HELD, atol=1e-4 * 4**bits, rtol=1e-3, expected=expected, **attributes, **more)


def test_quantized_experts_that_are_gated() -> None:
    """Widths for single layers are in no CPU kernel of onnxruntime: here they say what all layers have."""
    inputs, _ = quantized_mixture(4, 16, True, fused=2)
    attributes = {"k": 2, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1}
    attributes["block_size"] = 16
    agree("QMoE", inputs, known=HELD, atol=1e-3, **attributes)
    given = {key: array for key, array in inputs.items() if array is not None}
    expected = onnxruntime_exactly(node_model("QMoE", inputs, attributes), given)
    widths = {"expert_weight_bits": 8, "fc1_expert_weight_bits": 4, "fc2_expert_weight_bits": 4}
    agree("QMoE", inputs, known=HELD, atol=1e-3, expected=expected, **attributes, **widths)


@pytest.mark.parametrize("normalized", [0, 1])
def test_weights_apart_from_the_scores_that_choose(normalized: int) -> None:
    inputs, _ = quantized_mixture(4, 0, False)
    weights = np.abs(numbers(TOKENS, EXPERTS, seed=8))
    attributes = {"k": 2, "normalize_routing_weights": normalized}
    agree("QMoE", {**inputs, "rw": weights}, known=HELD, atol=1e-3, **attributes)


@pytest.mark.parametrize(
    ("name", "attributes", "error"),
    [
        ("MoE", {"use_sparse_mixer": 1}, UnsupportedModel),
        ("MoE", {"activation_type": "swiglu"}, InvalidModel),
        ("MoE", {"activation_type": "elu"}, InvalidModel),
        ("QMoE", {"quant_type": "fp8"}, UnsupportedModel),
        ("QMoE", {"expert_weight_bits": 3}, InvalidModel),
    ],
)
def test_what_cannot_be_is_refused(name: str, attributes: dict[str, Any], error: type[Exception]) -> None:
    inputs = mixture() if name == "MoE" else quantized_mixture(4, 0, False)[0]
    with pytest.raises(error, match=name):
        graph_of(node_model(name, inputs, attributes))
