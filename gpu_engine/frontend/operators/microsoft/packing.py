"""Heads side by side and apart."""

from __future__ import annotations

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.attention import split_heads
from gpu_engine.frontend.operators.movement import cut, split_at
from gpu_engine.frontend.registry import emit_map
from gpu_engine.ir import ops
from gpu_engine.ir.graph import Builder, Value


def joined_heads(b: Builder, y: Value) -> Value:
    """y [B, N, S, D] as [B, S, N * D]."""
    moved = b.emit(ops.Transpose((0, 2, 1, 3)), y)
    return b.emit(ops.Reshape((*moved.shape[:2], moved.shape[2] * moved.shape[3])), moved)


def heads_of(
    b: Builder, query: Value, key: Value | None, value: Value | None, bias: Value | None, heads: int
) -> tuple[Value, Value, Value]:
    """q, k and v as [B, N, S or T, D] from separate, packed ([B, S, N, 3 or 2, D]) or finished tensors; the bias is
    for what is not finished."""
    if key is None:
        q, k, v = _unpacked(b, query, 3)
    elif value is None:
        q, (k, v) = split_heads(b, query, heads), _unpacked(b, key, 2)
    else:
        q, k, v = split_heads(b, query, heads), split_heads(b, key, heads), split_heads(b, value, heads)
    if bias is None:
        return q, k, v
    width = q.shape[1] * q.shape[3]
    parts = [cut(b, bias, {0: (start, 1, size)}) for start, size in (
        (0, width), (width, width), (2 * width, bias.shape[0] - 2 * width))]  # fmt: skip
    finished = key is not None and key.rank == 4
    return tuple(  # type: ignore[return-value]
        x if finished and i else emit_map(b, lambda e, c: e + c, x, _head_bias(b, part, x))
        for i, (x, part) in enumerate(zip((q, k, v), parts, strict=True))
    )


def _unpacked(b: Builder, x: Value, count: int) -> tuple[Value, ...]:
    """x [B, S, N, count, D] as `count` tensors [B, N, S, D]."""
    if x.rank != 5:
        raise InvalidModel(f"{x.type} is not {count} tensors packed, [B, S, N, {count}, D]")
    rows, length, heads, _, size = x.shape
    parts = split_at(b, x, 3, (1,) * count, count)
    apart = (b.emit(ops.Reshape((rows, length, heads, size)), part) for part in parts)
    return tuple(b.emit(ops.Transpose((0, 2, 1, 3)), part) for part in apart)


def _head_bias(b: Builder, bias: Value, x: Value) -> Value:
    """bias [N * D] as [N, 1, D]."""
    return b.emit(ops.Reshape((x.shape[1], 1, x.shape[3])), bias)
