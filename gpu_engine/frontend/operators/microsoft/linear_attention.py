"""Attention with a state of fixed size, and what stands around it in the models that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.frontend.operators.activation import softplus
from gpu_engine.frontend.operators.convolution import with_bias
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.movement import cut
from gpu_engine.frontend.registry import array_operator, emit_map, operator, scalar
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import FLOAT32, compute_dtype
from gpu_engine.ir.expr import cast, sigmoid
from gpu_engine.ir.graph import Builder, TensorType, Value

RULES = ("linear", "gated", "delta", "gated_delta")


def _types(
    b: Builder,
    query: Value,
    key: Value,
    value: Value,
    past_state: Value | None = None,
    decay: Value | None = None,
    beta: Value | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    update_rule: str = "gated_delta",
    state_window: int = 0,
    **_: Any,
) -> tuple[TensorType, ...]:
    if state_window:
        raise UnsupportedModel(f"{b.source}: a window of {state_window} states")
    gated, delta = update_rule.startswith("gated"), update_rule.endswith("delta")
    heads = max(q_num_heads, kv_num_heads)
    shared = min(q_num_heads, kv_num_heads)
    if update_rule not in RULES or shared < 1 or heads % shared:
        raise InvalidModel(f"update_rule {update_rule} of {q_num_heads} and {kv_num_heads} heads")
    if (gated and decay is None) or (delta and beta is None):
        raise InvalidModel(f"update_rule {update_rule} needs {'decay' if decay is None else 'beta'}")
    sizes = dims.floor_div(key.shape[2], kv_num_heads), dims.floor_div(value.shape[2], kv_num_heads)
    state = query.dtype if past_state is None else past_state.dtype
    return (
        TensorType(query.dtype, (*query.shape[:2], heads * sizes[1])),
        TensorType(state, (query.shape[0], kv_num_heads, *sizes)),
    )


@array_operator("LinearAttention", since=1, domain=MICROSOFT, infer=_types)
def linear_attention(
    xp: Any,
    query: Any,
    key: Any,
    value: Any,
    past_state: Any = None,
    decay: Any = None,
    beta: Any = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    update_rule: str = "gated_delta",
    scale: float = 0.0,
    chunk_size: int = 64,
    state_window: int = 0,
) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.LinearAttention"""
    wide = compute_dtype(query.dtype)
    q, k, v = (
        _heads(x, heads, wide) for x, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    state = xp.zeros((*k.shape[1:3], k.shape[3], v.shape[3]), wide) if past_state is None else past_state.astype(wide)
    gates = None if decay is None or not update_rule.startswith("gated") else xp.exp(_heads(decay, kv_num_heads, wide))
    rates = None if beta is None or not update_rule.endswith("delta") else _heads(beta, beta.shape[2], wide)
    heads, repeats = max(q_num_heads, kv_num_heads), max(1, q_num_heads // kv_num_heads)
    q = xp.repeat(q, heads // q_num_heads, axis=2) * wide.type(scale or 1 / np.sqrt(q.shape[3]))
    y = xp.empty((*query.shape[:2], heads, v.shape[3]), wide)
    for t in range(query.shape[1]):
        state = state if gates is None else state * gates[t][..., None]
        new = v[t] if rates is None else rates[t] * (v[t] - xp.matmul(k[t][..., None, :], state)[..., 0, :])
        state = state + k[t][..., None] * new[..., None, :]
        y[:, t] = xp.matmul(q[t][..., None, :], xp.repeat(state, repeats, axis=1))[..., 0, :]
    return y.reshape(*query.shape[:2], -1), state


def _heads(x: Any, heads: int, dtype: Any) -> Any:
    """x [B, T, H * D] as [T, B, H, D]."""
    rows, steps, width = x.shape
    return x.astype(dtype, copy=False).reshape(rows, steps, heads, width // heads).swapaxes(0, 1)


@operator("LinearAttentionGate", since=1, domain=MICROSOFT)
def linear_attention_gate(
    b: Builder, a: Value, dt_bias: Value, decay_scale: Value, rate: Value | None = None, *, output_count: int = 1
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.LinearAttentionGate"""
    decay = emit_map(b, lambda e, c, s: cast(s * softplus(cast(e, FLOAT32) + c), e.dtype), a, dt_bias, decay_scale)
    if output_count == 1:
        return (decay,)
    if rate is None:
        raise InvalidModel("beta is asked for, and there is no b")
    return decay, emit_map(b, lambda e: cast(sigmoid(cast(e, FLOAT32)), e.dtype), rate)


@operator("CausalConvWithState", since=1, domain=MICROSOFT)
def causal_conv_with_state(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    past_state: Value | None = None,
    *,
    activation: str = "none",
    ndim: int = 1,
    dilation: int = 1,
    channels_last: int = 0,
    state_window: int = 0,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.CausalConvWithState"""
    channels = w.shape[0]
    if ndim != 1 or state_window:
        raise UnsupportedModel(f"{b.source}: {ndim} spatial axes and a window of {state_window} states")
    if w.rank != 3 or not isinstance(channels, int) or activation not in ("none", "silu", "swish"):
        raise InvalidModel(f"activation {activation!r}, weights {w.type}: the channels must be known")
    planes = _planes(b, x) if channels_last else x
    carried = (w.shape[2] - 1) * dilation
    if past_state is None:
        longer = b.emit(ops.Pad((0, 0, carried), (0, 0, 0)), planes, scalar(b, 0, x.dtype))
    else:
        longer = b.emit(ops.Concat(2), _planes(b, past_state) if channels_last else past_state, planes)
    y = with_bias(b, b.emit(ops.Conv((1,), (0,), (0,), (dilation,), channels), longer, w), bias)
    y = y if activation == "none" else emit_map(b, lambda e: e * sigmoid(e), y)
    state = cut(b, longer, {2: (longer.shape[2] - carried, 1, carried)})
    if not channels_last:
        return y, state
    return tuple(
        b.emit(ops.Reshape((part.shape[0], part.shape[2], *x.shape[2:])), b.emit(ops.Transpose((0, 2, 1)), part))
        for part in (y, state)
    )


def _planes(b: Builder, x: Value) -> Value:
    """x [B, L, d...] as [B, C, L]."""
    flat = b.emit(ops.Reshape((*x.shape[:2], dims.product(x.shape[2:]))), x)
    return b.emit(ops.Transpose((0, 2, 1)), flat)
