"""Attention with packed projections, masks as lengths or numbers, and keys of earlier calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.errors import UnsupportedModel
from gpu_engine.frontend.operators.attention import probabilities_of, scores_of, split_heads, weighted
from gpu_engine.frontend.operators.linear import matmul
from gpu_engine.frontend.operators.microsoft.cache import cleared, with_room, written
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.masks import causal, joined, padding_bias
from gpu_engine.frontend.operators.microsoft.packing import heads_of, joined_heads
from gpu_engine.frontend.operators.movement import cut, split_at
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Value


@dataclass(frozen=True)
class Attended:
    """What the heads q [B, N, S, D], k [B, N, T, D] and v [B, N, T, E] make: y [B, S, N * E] and the weights."""

    y: Value
    weights: Value


def attend(b: Builder, q: Value, k: Value, v: Value, scale: float | None, bias: Value | None) -> Attended:
    """softmax(scale * q k^T + bias) v; without a scale 1 / sqrt(D)."""
    scores = scores_of(b, q, k, scale or None)
    if bias is not None:
        scores = emit_map(b, lambda s, c: s + c, scores, bias)
    weights = probabilities_of(b, scores, q.dtype, q.dtype, may_hide_all=False)
    return Attended(joined_heads(b, weighted(b, weights, v)), weights)


@operator("Attention", since=1, domain=MICROSOFT)
def attention(
    b: Builder,
    x: Value,
    weights: Value,
    bias: Value | None = None,
    mask_index: Value | None = None,
    past: Value | None = None,
    attention_bias: Value | None = None,
    past_sequence_length: Value | None = None,
    *,
    num_heads: int,
    unidirectional: int = 0,
    qkv_hidden_sizes: Sequence[int] = (),
    scale: float = 0.0,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
    rotary_embedding_dim: int = 0,
    past_present_share_buffer: int = 0,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention"""
    projected = matmul(b, x, weights)
    projected = projected if bias is None else emit_map(b, lambda e, c: e + c, projected, bias)
    return self_attention(
        b,
        projected,
        mask_index,
        past,
        attention_bias,
        num_heads=num_heads,
        causal_only=bool(unidirectional),
        sizes=qkv_hidden_sizes,
        scale=scale,
        fill=mask_filter_value,
        refused=do_rotary or past_present_share_buffer,
        output_count=output_count,
    )


def self_attention(
    b: Builder,
    projected: Value,
    mask_index: Value | None,
    past: Value | None,
    attention_bias: Value | None,
    *,
    num_heads: int,
    causal_only: bool,
    sizes: Sequence[int],
    scale: float,
    fill: float,
    refused: int,
    output_count: int,
) -> Sequence[Value]:
    """(y [B, S, V], present [2, B, N, T, D]) for query, key and value side by side in `projected` [B, S, H + H + V]."""
    if refused:
        raise UnsupportedModel(f"{b.source}: do_rotary and past_present_share_buffer exist on CUDA only")
    width = dims.floor_div(projected.shape[2], 3)
    parts = split_at(b, projected, 2, tuple(sizes) or (width,) * 3, 3)
    q, k, v = (split_heads(b, part, num_heads) for part in parts)
    length: Dim = 0
    if past is not None:
        length = past.shape[3]
        k, v = (
            b.emit(ops.Concat(2), b.emit(ops.Reshape(past.shape[1:]), cut(b, past, {0: (i, 1, 1)})), new)
            for i, new in enumerate((k, v))
        )
    extents = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    biases = [] if attention_bias is None else [attention_bias]
    if mask_index is not None:
        biases.append(padding_bias(b, mask_index, extents, fill, q.dtype, starts=True, past=length))
    shown = [causal(b, extents, b.shape_constant([length]))] if causal_only else []
    found = attend(b, q, k, v, scale, joined(b, biases, shown, q.dtype))
    if output_count == 1:
        return (found.y,)
    return found.y, b.emit(ops.Concat(0), *(b.emit(ops.Reshape((1, *value.shape)), value) for value in (k, v)))


@operator("MultiHeadAttention", since=1, domain=MICROSOFT)
def multi_head_attention(
    b: Builder,
    query: Value,
    key: Value | None = None,
    value: Value | None = None,
    bias: Value | None = None,
    key_padding_mask: Value | None = None,
    attention_bias: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    past_sequence_length: Value | None = None,
    cache_indirection: Value | None = None,
    *,
    num_heads: int,
    unidirectional: int = 0,
    scale: float = 0.0,
    mask_filter_value: float = -10000.0,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention

    The fourth output are the weights after the softmax. Where there are more or fewer keys than queries, unidirectional
    hides nothing from the last query, as ONNX Runtime's kernel does.
    """
    if cache_indirection is not None:
        raise UnsupportedModel(f"{b.source}: cache_indirection belongs to ONNX Runtime's own beam search")
    q, k, v = heads_of(b, query, key, value, bias, num_heads)
    keys = _with_past(b, k, v, past_key, past_value, past_sequence_length)
    extents = (q.shape[0], q.shape[1], q.shape[2], keys.k.shape[2])
    biases, shown = [], [] if keys.filled is None else [keys.filled]
    if attention_bias is not None:
        biases.append(with_room(b, attention_bias, extents[3]) if shown else attention_bias)
    if key_padding_mask is not None:
        mask = with_room(b, key_padding_mask, extents[3]) if shown else key_padding_mask
        biases.append(padding_bias(b, mask, extents, mask_filter_value, q.dtype, starts=False, past=0))
    if unidirectional:
        shown.append(causal(b, extents, keys.first, last_sees_all=k.shape[2] != q.shape[2]))
    found = attend(b, q, keys.k, keys.v, scale, joined(b, biases, shown, q.dtype))
    return (found.y, *keys.present, found.weights)[:output_count]


@dataclass(frozen=True)
class Keys:
    """Keys and values of earlier calls and of this one, [B, N, T, D], from position `first` on this one's.

    `present` are they as a later call wants them; `filled` says which there are, where there is room for more.
    """

    k: Value
    v: Value
    present: tuple[Value, Value]
    first: Value
    filled: Value | None = None


def _with_past(
    b: Builder, k: Value, v: Value, past_k: Value | None, past_v: Value | None, length: Value | None
) -> Keys:
    if past_k is None or past_v is None:
        return Keys(k, v, (k, v), b.shape_constant([0]))
    if length is None:
        present = b.emit(ops.Concat(2), past_k, k), b.emit(ops.Concat(2), past_v, v)
        return Keys(*present, present, b.shape_constant([past_k.shape[2]]))
    first = b.emit(ops.Reshape((1,)), length)
    present = written(b, past_k, k, first), written(b, past_v, v, first)
    end = emit_map(b, lambda p, n: p + n, first, b.shape_constant([k.shape[2]], first.dtype))
    places = b.emit(ops.Iota(past_k.shape[2], first.dtype))
    filled = emit_map(b, lambda i, n: i < n, b.emit(ops.Reshape((1, 1, 1, past_k.shape[2])), places), end)
    return Keys(cleared(b, present[0], end), cleared(b, present[1], end), present, first, filled)
