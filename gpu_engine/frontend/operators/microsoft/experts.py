"""Mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.frontend.operators.activation import gelu
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.weights import number_of, unpacked
from gpu_engine.frontend.operators.movement import cut, split_at
from gpu_engine.frontend.operators.selection import top_k
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.expr import Expr, cast, equal, maximum, minimum, sigmoid, where
from gpu_engine.ir.graph import Builder, Value

Layer = tuple[Value, Value | None]
ACTIVATIONS = {
    "relu": lambda x: maximum(x, 0),
    "gelu": lambda x: gelu(x, approximate="tanh"),
    "silu": lambda x: x * sigmoid(x),
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Gate:
    """How the first layers of an expert become the input of the last one: the attributes of MoE."""

    activation_type: str
    alpha: float
    beta: float
    fusion: int
    limit: float | None


@operator("MoE", since=1, domain=MICROSOFT)
def mixture_of_experts(
    b: Builder,
    x: Value,
    router_probs: Value,
    fc1_weights: Value,
    fc1_bias: Value | None,
    fc2_weights: Value,
    fc2_bias: Value | None = None,
    fc3_weights: Value | None = None,
    fc3_bias: Value | None = None,
    *,
    k: int = 1,
    activation_type: str = "relu",
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    normalize_routing_weights: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    use_sparse_mixer: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MoE

    Every expert computes every token; those that a token does not choose count nothing.
    """
    _refuse_mixer(b, use_sparse_mixer)
    gate = Gate(activation_type, activation_alpha, activation_beta, swiglu_fusion, swiglu_limit)
    third = None if fc3_weights is None else (fc3_weights, fc3_bias)
    shares = routed(b, router_probs, k, bool(normalize_routing_weights))
    return mixed(b, x, shares, gate, (fc1_weights, fc1_bias), (fc2_weights, fc2_bias), third)


@operator("QMoE", since=1, domain=MICROSOFT)
def quantized_mixture_of_experts(
    b: Builder,
    x: Value,
    router_probs: Value,
    fc1_weights: Value,
    fc1_scales: Value | None,
    fc1_bias: Value | None,
    fc2_weights: Value,
    fc2_scales: Value | None = None,
    fc2_bias: Value | None = None,
    fc3_weights: Value | None = None,
    fc3_scales: Value | None = None,
    fc3_bias: Value | None = None,
    fc1_zero_points: Value | None = None,
    fc2_zero_points: Value | None = None,
    fc3_zero_points: Value | None = None,
    router_weights: Value | None = None,
    *,
    k: int = 1,
    activation_type: str = "relu",
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    normalize_routing_weights: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    use_sparse_mixer: int = 0,
    expert_weight_bits: int = 4,
    fc1_expert_weight_bits: int | None = None,
    fc2_expert_weight_bits: int | None = None,
    fc3_expert_weight_bits: int | None = None,
    block_size: int = 0,
    quant_type: str = "int",
    weights_prepacked: int = -1,
    accuracy_level: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QMoE

    Weights of a layer are [E, N, K] in bytes, with a scale for every row, or for every block of a row. Unnormalised
    routing weights stay so, as in MoE; ONNX Runtime's CPU kernel normalises them always.
    """
    _refuse_mixer(b, use_sparse_mixer)
    if quant_type != "int" or weights_prepacked > 0:
        raise UnsupportedModel(f"{b.source}: quant_type {quant_type}, weights_prepacked {weights_prepacked}")
    layers = [
        None
        if weights is None or scales is None
        else (expert_weights(b, weights, scales, zeros, bits or expert_weight_bits), bias)
        for weights, scales, zeros, bits, bias in (
            (fc1_weights, fc1_scales, fc1_zero_points, fc1_expert_weight_bits, fc1_bias),
            (fc2_weights, fc2_scales, fc2_zero_points, fc2_expert_weight_bits, fc2_bias),
            (fc3_weights, fc3_scales, fc3_zero_points, fc3_expert_weight_bits, fc3_bias),
        )
    ]
    if layers[0] is None or layers[1] is None:
        raise InvalidModel("weights of integers without scales")
    gate = Gate(activation_type, activation_alpha, activation_beta, swiglu_fusion, swiglu_limit)
    shares = routed(b, router_probs, k, bool(normalize_routing_weights), router_weights)
    return mixed(b, x, shares, gate, layers[0], layers[1], layers[2])


def _refuse_mixer(b: Builder, use_sparse_mixer: int) -> None:
    if use_sparse_mixer:
        raise UnsupportedModel(f"{b.source}: use_sparse_mixer, which ONNX Runtime has on CUDA only")


def expert_weights(b: Builder, packed: Value, scales: Value, zeros: Value | None, bits: int) -> Value:
    """packed [E, N, K * bits / 8] as numbers [E, N, K], with scales [E, N] or [E, N, blocks] and zero points alike,
    packed along their last axis."""
    if bits not in (2, 4, 8):
        raise InvalidModel(f"weights of {bits} bits")
    codes = unpacked(b, packed, bits)
    experts, rows, width = codes.shape
    blocks = scales.shape[2] if scales.rank == 3 else 1
    apart = b.emit(ops.Reshape((experts, rows, blocks, dims.floor_div(width, blocks))), codes)
    scale = b.emit(ops.Reshape((experts, rows, blocks, 1)), scales)
    zero = b.constant(np.full((), 2 ** (bits - 1), FLOAT32))
    if zeros is not None:
        held = unpacked(b, zeros, bits)
        held = cut(b, held, {held.rank - 1: (0, 1, scales.shape[-1])})
        zero = b.emit(ops.Reshape(scale.shape), held)
    return b.emit(ops.Reshape((experts, rows, width)), emit_map(b, number_of, apart, scale, zero))


def mixed(b: Builder, x: Value, shares: Value, gate: Gate, first: Layer, last: Layer, other: Layer | None) -> Value:
    """The sum of what the experts make of x [.., H], by their shares [T, E]; a layer is (weights [E, I, H], bias)."""
    tokens = x if x.rank == 2 else b.emit(ops.Reshape((dims.product(x.shape[:-1]), x.shape[-1])), x)
    hidden = _layer(b, tokens, *first)
    result = _layer(b, _gated(b, gate, hidden, None if other is None else _layer(b, tokens, *other)), *last)
    weights = b.emit(ops.Reshape((shares.shape[1], shares.shape[0], 1)), b.emit(ops.Transpose((1, 0)), shares))
    share, value = expr.arg(1, shares.dtype), expr.arg(0, result.dtype)
    chosen = where(equal(share, 0), 0.0, value * cast(share, value.dtype))
    total = b.emit(ops.Reduce("sum", (0,), False, before=chosen), result, weights)
    return total if x.rank == 2 else b.emit(ops.Reshape(x.shape), total)


def routed(b: Builder, scores: Value, k: int, normalized: bool, weights: Value | None = None) -> Value:
    """The share of every expert in every token, [T, E]: the softmax of the k best scores, or their `weights`, and 0 for
    the others."""
    probabilities = b.emit(ops.Softmax(1), scores)
    values, indices = top_k(b, probabilities, b.constant([k]), axis=1)
    if weights is not None:
        values = b.emit(ops.GatherElements(1), weights, indices)
    if normalized:
        total = b.emit(ops.Reduce("sum", (1,), True), values)
        values = emit_map(b, lambda v, t: v / t, values, total)
    values, indices = (b.emit(ops.Reshape((scores.shape[0], k, 1)), part) for part in (values, indices))
    experts = b.emit(ops.Iota(scores.shape[1], INT64))
    spread = emit_map(b, lambda v, i, e: where(equal(i, e), v, 0.0), values, indices, experts)
    return b.emit(ops.Reduce("sum", (1,), False), spread)


def _layer(b: Builder, x: Value, weights: Value, bias: Value | None) -> Value:
    """x [T, H] or [E, T, H] times weights [E, I, H] plus bias [E, I], as [E, T, I]."""
    rows = x if x.rank == 3 else b.emit(ops.Reshape((1, *x.shape)), x)
    product = b.emit(ops.MatMul(transpose_b=True), rows, weights)
    if bias is None:
        return product
    return emit_map(b, lambda e, c: e + c, product, b.emit(ops.Reshape((bias.shape[0], 1, bias.shape[1])), bias))


def _gated(b: Builder, gate: Gate, hidden: Value, other: Value | None) -> Value:
    if gate.activation_type == "swiglu":
        return _swiglu(b, gate, hidden, other)
    if gate.activation_type not in ACTIVATIONS:
        raise InvalidModel(f"the activation {gate.activation_type} is not one of {', '.join(ACTIVATIONS)}, swiglu")
    inner = emit_map(b, ACTIVATIONS[gate.activation_type], hidden)
    return inner if other is None else emit_map(b, lambda e, g: e * g, inner, other)


def _swiglu(b: Builder, gate: Gate, hidden: Value, other: Value | None) -> Value:
    """A gated linear unit of two halves: apart (`other`), in turns (fusion 1), or one behind the other (2)."""
    half = dims.floor_div(hidden.shape[2], 2)
    if gate.fusion == 1:
        left, right = (cut(b, hidden, {2: (i, 2, half)}) for i in (0, 1))
    elif gate.fusion == 2:
        left, right = split_at(b, hidden, 2, (half, half), 2)
    elif other is not None:
        left, right = hidden, other
    else:
        raise InvalidModel("swiglu without fusion needs a third layer")

    def unit(g: Expr, linear: Expr) -> Expr:
        if gate.limit is not None:
            g, linear = minimum(g, gate.limit), expr.clip(linear, -gate.limit, gate.limit)
        return g * sigmoid(gate.alpha * g) * (linear + gate.beta)

    return emit_map(b, unit, left, right)
