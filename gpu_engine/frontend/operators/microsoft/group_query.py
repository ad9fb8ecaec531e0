"""GroupQueryAttention: what decoders of language models run, with keys and values kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_engine.errors import UnsupportedModel
from gpu_engine.frontend.operators.attention import probabilities_of, scores_of, split_heads, weighted
from gpu_engine.frontend.operators.generator import range_
from gpu_engine.frontend.operators.microsoft.cache import cleared, with_room, written
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.masks import causal as causal_mask
from gpu_engine.frontend.operators.microsoft.packing import joined_heads
from gpu_engine.frontend.operators.microsoft.rotary import angles, rotated
from gpu_engine.frontend.operators.movement import cut, split_at
from gpu_engine.frontend.registry import emit_map, operator, scalar
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.expr import cast, equal, tanh, where
from gpu_engine.ir.graph import Builder, Value


@dataclass(frozen=True)
class Lengths:
    """Per row, int64 [B]: how many keys count (`total`), and how many of these are from earlier calls (`past`).
    `limit` is the most keys of any row, int64 []."""

    total: Value
    past: Value
    limit: Value


@operator("GroupQueryAttention", since=1, domain=MICROSOFT)
def group_query_attention(
    b: Builder,
    query: Value,
    key: Value | None,
    value: Value | None,
    past_key: Value | None,
    past_value: Value | None,
    seqlens_k: Value,
    total_sequence_length: Value,
    cos_cache: Value | None = None,
    sin_cache: Value | None = None,
    position_ids: Value | None = None,
    attention_bias: Value | None = None,
    head_sink: Value | None = None,
    k_scale: Value | None = None,
    v_scale: Value | None = None,
    q_norm_weight: Value | None = None,
    k_norm_weight: Value | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    causal: int = 1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    smooth_softmax: int = -1,
    qk_output: int = 0,
    qk_norm_epsilon: float = 1e-6,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
    sliding_window_cache: int = 0,
    output_count: int = 1,
) -> Sequence[Value | None]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention

    What present_key and present_value hold beyond the keys of a row is 0. Quantised and windowed caches are refused.
    """
    if sliding_window_cache or (k_quant_type, v_quant_type) != ("NONE", "NONE"):
        raise UnsupportedModel(f"{b.source}: a cache that is quantised or slides")
    q, k, v = _projections(b, query, key, value, num_heads, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        norm = ops.LayerNorm(3, qk_norm_epsilon, centered=False)
        q, k = b.emit(norm, q, q_norm_weight), b.emit(norm, k, k_norm_weight)
    lengths = _lengths(b, seqlens_k, total_sequence_length, q)
    if do_rotary and cos_cache is not None and sin_cache is not None:
        places = _positions(b, lengths, q) if position_ids is None else position_ids
        cosine, sine = angles(b, cos_cache, places), angles(b, sin_cache, places)
        q, k = (rotated(b, x, cosine, sine, bool(rotary_interleaved)) for x in (q, k))
    k, v = (_kept(b, old, new, lengths) for old, new in ((past_key, k), (past_value, v)))
    shown = _shown(b, q, k, lengths, bool(causal), local_window_size)
    raw = scores_of(b, q, k, scale or None)
    if softcap > 0:
        raw = emit_map(b, lambda s: softcap * tanh(s / softcap), raw)
    if attention_bias is not None:
        raw = emit_map(b, lambda s, c: s + c, raw, with_room(b, attention_bias, k.shape[2]))
    hidden = emit_map(b, lambda s, c: where(c, s, -np.inf), raw, shown)
    sink = head_sink if head_sink is not None or smooth_softmax <= 0 else scalar(b, 0, q.dtype)
    weights = _softmax(b, hidden, sink, may_hide_all=local_window_size > 0)
    outputs = (joined_heads(b, weighted(b, weights, v)), k, v)
    if output_count < 4 or not qk_output:
        return outputs[:output_count]
    seen = emit_map(b, lambda s, c: where(c, s, 0.0), raw, shown) if qk_output == 1 else weights
    return *outputs, _columns(b, seen, lengths)


def _projections(
    b: Builder, query: Value, key: Value | None, value: Value | None, heads: int, groups: int
) -> tuple[Value, Value, Value]:
    """[B, heads, S, D] and twice [B, groups, S, D]."""
    if key is None or value is None:
        size = dims.floor_div(query.shape[2], heads + 2 * groups)
        query, key, value = split_at(b, query, 2, (heads * size, groups * size, groups * size), 3)
    return split_heads(b, query, heads), split_heads(b, key, groups), split_heads(b, value, groups)


def _lengths(b: Builder, seqlens_k: Value, total: Value, q: Value) -> Lengths:
    """A call that brings as many queries as there are keys starts anew."""
    limit = emit_map(b, lambda t: cast(t, INT64), b.emit(ops.Reshape(()), total))
    rows = emit_map(b, lambda n: cast(n, INT64) + 1, b.emit(ops.Reshape((q.shape[0],)), seqlens_k))
    new = b.shape_constant(np.array(q.shape[2], object))
    past = emit_map(b, lambda n, s, t: where(equal(s, t), 0, n - s), rows, new, limit)
    return Lengths(rows, past, limit)


def _positions(b: Builder, lengths: Lengths, q: Value) -> Value:
    """The position of every query, [B, S]."""
    first = b.emit(ops.Reshape((lengths.past.shape[0], 1)), lengths.past)
    return emit_map(b, lambda i, p: expr.maximum(i + p, 0), b.emit(ops.Iota(q.shape[2], INT64)), first)


def _kept(b: Builder, old: Value | None, new: Value, lengths: Lengths) -> Value:
    """The keys or values of earlier calls and of this one, [B, groups, T, D]."""
    if old is None:
        return new
    held = b.shape_constant(np.array(old.shape[2], object))
    most = emit_map(b, lambda h, t: expr.maximum(h, t), held, lengths.limit)
    places = range_(b, scalar(b, 0, INT64), most, scalar(b, 1, INT64))
    both = written(b, old, new, lengths.past, places)
    end = emit_map(b, lambda p, s: p + s, lengths.past, b.shape_constant([new.shape[2]]))
    return cleared(b, both, end)


def _shown(b: Builder, q: Value, k: Value, lengths: Lengths, backward: bool, window: int) -> Value:
    """Whether a query sees a key, [B, 1, S or 1, T]."""
    extents = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if backward:
        return causal_mask(b, extents, lengths.past, window=max(window, 0))
    end = b.emit(ops.Reshape((lengths.total.shape[0], 1, 1, 1)), lengths.total)
    return emit_map(b, lambda i, n: i < n, b.emit(ops.Iota(k.shape[2], INT64)), end)


def _softmax(b: Builder, scores: Value, sink: Value | None, *, may_hide_all: bool) -> Value:
    """The softmax along the keys, with a score per head (or one for all) that takes a share and gives nothing."""
    if sink is None:
        return probabilities_of(b, scores, scores.dtype, scores.dtype, may_hide_all=may_hide_all)
    column = b.emit(ops.Reshape((sink.shape[0] if sink.rank else 1, 1, 1)), sink)
    more = b.emit(ops.Expand((*scores.shape[:3], 1)), column)
    both = b.emit(ops.Softmax(3), b.emit(ops.Concat(3), scores, more))
    return cut(b, both, {3: (0, 1, scores.shape[3])})


def _columns(b: Builder, x: Value, lengths: Lengths) -> Value:
    """x [B, N, S, T] without the keys that no row has."""
    places = range_(b, scalar(b, 0, INT64), lengths.limit, scalar(b, 1, INT64))
    return b.emit(ops.Gather(3), x, places)
