"""Keys and values of earlier calls, in buffers with room for later ones."""

from __future__ import annotations

from gpu_engine.frontend.registry import emit_map, scalar
from gpu_engine.ir import expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.expr import Expr, cast, where
from gpu_engine.ir.graph import Builder, Value


def written(b: Builder, buffer: Value, new: Value, first: Value, places: Value | None = None) -> Value:
    """buffer [B, N, M, D] with new [B, N, L, D] written over the positions from `first` on, as [B, N, T, D].

    `first` holds one position, or one per row [B]. `places` counts the T positions of the result, M if it is not given.
    Beyond both there is what the buffer holds, or where it holds nothing some other row.
    """
    both = b.emit(ops.Concat(2), buffer, new)
    place = b.emit(ops.Iota(buffer.shape[2], INT64)) if places is None else places
    sizes = (b.shape_constant([size]) for size in (buffer.shape[2], new.shape[2]))
    start = b.emit(ops.Reshape((first.shape[0], 1)), emit_map(b, lambda e: cast(e, INT64), first))

    def source(i: Expr, start: Expr, held: Expr, added: Expr) -> Expr:
        fresh = (i >= start) & (i < start + added)
        return where(fresh, held + i - start, expr.minimum(i, held + added - 1))

    index = emit_map(b, source, place, start, *sizes)
    if first.shape[0] == 1:
        return b.emit(ops.Gather(2), both, b.emit(ops.Reshape(place.shape), index))
    rows = b.emit(ops.Transpose((0, 2, 1, 3)), both)
    picks = b.emit(ops.Reshape((*index.shape, 1)), index)
    return b.emit(ops.Transpose((0, 2, 1, 3)), b.emit(ops.GatherND(1), rows, picks))


def cleared(b: Builder, buffer: Value, end: Value) -> Value:
    """buffer [B, N, M, D] with zeros from the position `end` on, which is one for all rows or one for each."""
    place = b.emit(ops.Reshape((buffer.shape[2], 1)), b.emit(ops.Iota(buffer.shape[2], INT64)))
    stop = b.emit(ops.Reshape((end.shape[0], 1, 1, 1)), emit_map(b, lambda e: cast(e, INT64), end))
    return emit_map(b, lambda x, i, n: where(i < n, x, expr.const(0, x.dtype)), buffer, place, stop)


def with_room(b: Builder, mask: Value, keys: Dim) -> Value:
    """A mask over the last axis of which there are as many keys as the buffer has room for; lengths as they are."""
    if mask.rank < 2:
        return mask
    none = (0,) * (mask.rank - 1)
    return b.emit(ops.Pad((*none, 0), (*none, keys - mask.shape[-1])), mask, scalar(b, 0, mask.dtype))
