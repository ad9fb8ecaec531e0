"""Rotary embeddings: pairs of elements turned by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.attention import split_heads
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.packing import joined_heads
from gpu_engine.frontend.operators.movement import cut
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.expr import cast, cos, equal, sin, where
from gpu_engine.ir.graph import Builder, Value


@operator("RotaryEmbedding", since=1, domain=MICROSOFT)
def rotary_embedding(
    b: Builder,
    x: Value,
    position_ids: Value,
    cos_cache: Value,
    sin_cache: Value,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.RotaryEmbedding

    The scale is ignored, as ONNX Runtime does.
    """
    heads = heads_apart(b, x, cos_cache, num_heads)
    places = positions(b, position_ids, heads)
    cosine, sine = angles(b, cos_cache, places), angles(b, sin_cache, places)
    turned = rotated(b, heads, cosine, sine, bool(interleaved))
    return turned if x.rank == 4 else joined_heads(b, turned)


@operator("MRotaryEmbedding", since=1, domain=MICROSOFT)
def multimodal_rotary_embedding(
    b: Builder,
    x: Value,
    position_ids: Value,
    cos_cache: Value,
    sin_cache: Value,
    *,
    mrope_section: Sequence[int],
    mrope_layout: int = 0,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MRotaryEmbedding"""
    held = cos_cache.shape[1]
    if len(mrope_section) != 3 or min(mrope_section) < 0 or position_ids.rank != 3 or sum(mrope_section) != held:
        raise InvalidModel(f"the sections {list(mrope_section)} of {held} for positions {position_ids.type}")
    heads = heads_apart(b, x, cos_cache, num_heads)
    stream = b.constant(section_streams(mrope_section, interleaved=bool(mrope_layout)))

    def chosen(cache: Value) -> Value:
        streams = [cut(b, position_ids, {0: (i, 1, 1)}) for i in range(3)]
        found = [angles(b, cache, b.emit(ops.Reshape(one.shape[1:]), one)) for one in streams]
        return emit_map(b, lambda s, t, h, w: where(equal(s, 0), t, where(equal(s, 1), h, w)), stream, *found)

    turned = rotated(b, heads, chosen(cos_cache), chosen(sin_cache), bool(interleaved))
    return turned if x.rank == 4 else joined_heads(b, turned)


def section_streams(sections: Sequence[int], *, interleaved: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Which of the three streams of positions (time, height, width) every pair of elements takes its angle from."""
    if not interleaved:
        return np.repeat(np.arange(3), sections)
    column = np.arange(sum(sections))
    taken = [(column % 3 == i) & (column < 3 * sections[i]) for i in (1, 2)]
    return np.where(taken[0], 1, np.where(taken[1], 2, 0))


@operator("GemmaRotaryEmbedding", since=1, domain=MICROSOFT)
def gemma_rotary_embedding(
    b: Builder, emb: Value, q: Value, q_rot: Value, k: Value, k_rot: Value
) -> tuple[Value, Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GemmaRotaryEmbedding"""
    angle = b.emit(ops.Reshape((emb.shape[0], 1, *emb.shape[1:])), emb)
    cosine, sine = (emit_map(b, lambda e, f=f: cast(f(e), q.dtype), angle) for f in (cos, sin))
    return (
        emit_map(b, lambda e, r, c, s: e * c + r * s, q, q_rot, cosine, sine),
        emit_map(b, lambda e, r, c, s: e * c + r * s, k, k_rot, cosine, sine),
    )


def heads_apart(b: Builder, x: Value, cos_cache: Value, num_heads: int) -> Value:
    """x [B, S, N * D] as [B, N, S, D]; without a number of heads the cache tells D / 2."""
    if x.rank == 4:
        return x
    size = 2 * cos_cache.shape[1]
    heads = num_heads or dims.floor_div(x.shape[2], size)
    if isinstance(heads, int):
        return split_heads(b, x, heads)
    apart = b.emit(ops.Reshape((*x.shape[:2], heads, size)), x)
    return b.emit(ops.Transpose((0, 2, 1, 3)), apart)


def positions(b: Builder, position_ids: Value, heads: Value) -> Value:
    """The position of every element of a sequence, [B, S] or [1, S]; one number is that of the first one."""
    if position_ids.rank == 2:
        return position_ids
    return emit_map(b, lambda i, first: i + cast(first, INT64), b.emit(ops.Iota(heads.shape[2], INT64)),
                    b.emit(ops.Reshape((1, 1)), position_ids))  # fmt: skip


def angles(b: Builder, cache: Value, places: Value) -> Value:
    """The rows of a cache [M, R / 2] at positions [B, S], as [B, 1, S, R / 2]."""
    found = b.emit(ops.Gather(0), cache, places)
    return b.emit(ops.Reshape((found.shape[0], 1, *found.shape[1:])), found)


def rotated(b: Builder, x: Value, cosine: Value, sine: Value, interleaved: bool) -> Value:
    """x [B, N, S, D] with its first R elements turned: pairs i and i + R / 2, or neighbours where interleaved."""
    half = cosine.shape[3]
    if interleaved:
        turning = cut(b, x, {3: (0, 1, 2 * half)})
        pairs = b.emit(ops.Reshape((*x.shape[:3], half, 2)), turning)
        left, right = (b.emit(ops.Reshape((*x.shape[:3], half)), cut(b, pairs, {4: (i, 1, 1)})) for i in (0, 1))
    else:
        left, right = cut(b, x, {3: (0, 1, half)}), cut(b, x, {3: (half, 1, half)})
    new = [
        emit_map(b, lambda p, q, c, s: p * c - q * s, left, right, cosine, sine),
        emit_map(b, lambda p, q, c, s: q * c + p * s, left, right, cosine, sine),
    ]
    if interleaved:
        apart = (b.emit(ops.Reshape((*part.shape, 1)), part) for part in new)
        new = [b.emit(ops.Reshape((*x.shape[:3], 2 * half)), b.emit(ops.Concat(4), *apart))]
    rest = x.shape[3] - 2 * half
    if rest != 0:
        new.append(cut(b, x, {3: (2 * half, 1, rest)}))
    return b.emit(ops.Concat(3), *new) if len(new) > 1 else new[0]
