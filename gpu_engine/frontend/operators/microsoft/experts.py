"""Mixtures of experts."""

from __future__ import annotations

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.frontend.operators.activation import gelu
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.movement import cut, split_at
from gpu_engine.frontend.operators.selection import top_k
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.expr import Expr, cast, equal, maximum, minimum, sigmoid, where
from gpu_engine.ir.graph import Builder, Value

ACTIVATIONS = {
    "relu": lambda x: maximum(x, 0),
    "gelu": lambda x: gelu(x, approximate="tanh"),
    "silu": lambda x: x * sigmoid(x),
    "identity": lambda x: x,
}


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
    if use_sparse_mixer:
        raise UnsupportedModel(f"{b.source}: use_sparse_mixer, which ONNX Runtime has on CUDA only")
    tokens = x if x.rank == 2 else b.emit(ops.Reshape((dims.product(x.shape[:-1]), x.shape[-1])), x)
    shares = routed(b, router_probs, k, bool(normalize_routing_weights))
    hidden = _layer(b, tokens, fc1_weights, fc1_bias)
    gate = None if fc3_weights is None else _layer(b, tokens, fc3_weights, fc3_bias)
    if activation_type == "swiglu":
        inner = _swiglu(b, hidden, gate, swiglu_fusion, activation_alpha, activation_beta, swiglu_limit)
    elif activation_type in ACTIVATIONS:
        inner = emit_map(b, ACTIVATIONS[activation_type], hidden)
        inner = inner if gate is None else emit_map(b, lambda e, g: e * g, inner, gate)
    else:
        raise InvalidModel(f"the activation {activation_type} is not one of {', '.join(ACTIVATIONS)}, swiglu")
    result = _layer(b, inner, fc2_weights, fc2_bias)
    weights = b.emit(ops.Reshape((shares.shape[1], shares.shape[0], 1)), b.emit(ops.Transpose((1, 0)), shares))
    share, value = expr.arg(1, shares.dtype), expr.arg(0, result.dtype)
    chosen = where(equal(share, 0), 0.0, value * cast(share, value.dtype))
    total = b.emit(ops.Reduce("sum", (0,), False, before=chosen), result, weights)
    return total if x.rank == 2 else b.emit(ops.Reshape(x.shape), total)


def routed(b: Builder, logits: Value, k: int, normalized: bool) -> Value:
    """The share of every expert in every token, [T, E]: the softmax of the k best scores, 0 for the others."""
    probabilities = b.emit(ops.Softmax(1), logits)
    values, indices = top_k(b, probabilities, b.constant([k]), axis=1)
    if normalized:
        total = b.emit(ops.Reduce("sum", (1,), True), values)
        values = emit_map(b, lambda v, t: v / t, values, total)
    values, indices = (b.emit(ops.Reshape((logits.shape[0], k, 1)), part) for part in (values, indices))
    experts = b.emit(ops.Iota(logits.shape[1], INT64))
    spread = emit_map(b, lambda v, i, e: where(equal(i, e), v, 0.0), values, indices, experts)
    return b.emit(ops.Reduce("sum", (1,), False), spread)


def _layer(b: Builder, x: Value, weights: Value, bias: Value | None) -> Value:
    """x [T, H] or [E, T, H] times weights [E, I, H] plus bias [E, I], as [E, T, I]."""
    rows = x if x.rank == 3 else b.emit(ops.Reshape((1, *x.shape)), x)
    product = b.emit(ops.MatMul(transpose_b=True), rows, weights)
    if bias is None:
        return product
    return emit_map(b, lambda e, c: e + c, product, b.emit(ops.Reshape((bias.shape[0], 1, bias.shape[1])), bias))


def _swiglu(
    b: Builder, hidden: Value, other: Value | None, fusion: int, alpha: float, beta: float, limit: float | None
) -> Value:
    """Both halves of a gated linear unit apart (`other`), in turns (fusion 1) or one behind the other (2)."""
    half = dims.floor_div(hidden.shape[2], 2)
    if fusion == 1:
        gate, linear = (cut(b, hidden, {2: (i, 2, half)}) for i in (0, 1))
    elif fusion == 2:
        gate, linear = split_at(b, hidden, 2, (half, half), 2)
    elif other is not None:
        gate, linear = hidden, other
    else:
        raise InvalidModel("swiglu without fusion needs a third layer")

    def unit(g: Expr, linear: Expr) -> Expr:
        if limit is not None:
            g, linear = minimum(g, limit), expr.clip(linear, -limit, limit)
        return g * sigmoid(alpha * g) * (linear + beta)

    return emit_map(b, unit, gate, linear)
