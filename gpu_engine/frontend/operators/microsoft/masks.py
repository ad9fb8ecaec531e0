"""Which keys a query sees, in the forms that the attention operators of com.microsoft know.

A mask hides a key by adding `fill` to its score, as ONNX Runtime does: where all are hidden, all count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.movement import cut
from gpu_engine.frontend.registry import emit_map
from gpu_engine.ir import expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT64, DType
from gpu_engine.ir.expr import Expr, cast, where
from gpu_engine.ir.graph import Builder, Value


def padding_bias(
    b: Builder, mask: Value, scores: Sequence[Dim], fill: float, dtype: DType, *, starts: bool, past: Dim
) -> Value:
    """What to add to scores of the shape [B, N, S, T] for a mask_index or key_padding_mask; it broadcasts to them.

    One axis: [B] how many keys a row has, with `starts` [2 * B] where they end and where they start, [3 * B + 2] as
    [B]. Two, [B, T], and three, [B, S, T]: 1 for a key that counts. Four, [B, 1, M, M]: the same for every position
    there may be.
    """
    if mask.rank == 1:
        return _by_lengths(b, mask, scores[0], scores[3], fill, dtype, starts)
    if mask.rank == 4:
        mask = cut(b, mask, {2: (past, 1, scores[2]), 3: (0, 1, scores[3])})
    elif mask.rank in (2, 3):
        middle = (1,) * (4 - mask.rank)
        mask = b.emit(ops.Reshape((mask.shape[0], *middle, *mask.shape[1:])), mask)
    else:
        raise InvalidModel(f"a mask {mask.type}")
    return emit_map(b, lambda m: where(m > 0, expr.const(0, dtype), fill), mask)


def _by_lengths(b: Builder, mask: Value, rows: Dim, keys: Dim, fill: float, dtype: DType, starts: bool) -> Value:
    places, held = b.emit(ops.Iota(keys, mask.dtype)), mask.shape[0]
    ends = b.emit(ops.Reshape((rows, 1, 1, 1)), cut(b, mask, {0: (0, 1, rows)}))
    if not starts or held == rows or (isinstance(held, int) and isinstance(rows, int) and held != 2 * rows):
        return emit_map(b, lambda key, end: where(key < end, expr.const(0, dtype), fill), places, ends)
    first = b.emit(ops.Reshape((rows, 1, 1, 1)), _starts(b, mask, rows))

    def weight(key: Expr, start: Expr, end: Expr) -> Expr:
        return where((key >= start) & (key < end), expr.const(0, dtype), fill)

    return emit_map(b, weight, places, first, ends)


def _starts(b: Builder, mask: Value, rows: Dim) -> Value:
    """Where the keys of every row start, [rows], for a mask of 2 * rows elements; 0 if it turns out to have others."""
    held = mask.shape[0]
    if held == 2 * rows:
        return cut(b, mask, {0: (rows, 1, rows)})
    index = emit_map(
        b,
        lambda row, count, held: expr.maximum(expr.minimum(row + count, held - 1), 0),
        b.emit(ops.Iota(rows, INT64)),
        *(b.shape_constant([extent]) for extent in (rows, held)),
    )
    return emit_map(
        b,
        lambda start, held, twice: where(expr.equal(held, twice), start, 0),
        b.emit(ops.Gather(0), mask, index),
        *(b.shape_constant([extent]) for extent in (held, 2 * rows)),
    )


def causal(b: Builder, scores: Sequence[Dim], first: Value, *, last_sees_all: bool = False, window: int = 0) -> Value:
    """Whether a query of [B, N, S, T] sees a key, as bool [1 or B, 1, S, T].

    first [1] or [B] is the position of the first query: a query sees the keys up to its own, of these the last
    `window` if that is not 0. With `last_sees_all`, nothing is hidden from the last query.
    """
    queries, keys = scores[2:]
    query = b.emit(ops.Reshape((queries, 1)), b.emit(ops.Iota(queries, INT64)))
    key = b.emit(ops.Iota(keys, INT64))
    offset = b.emit(ops.Reshape((first.shape[0], 1, 1, 1)), emit_map(b, lambda e: cast(e, INT64), first))
    last = b.shape_constant([queries - 1])

    def visible(query: Expr, key: Expr, offset: Expr, last: Expr) -> Expr:
        seen = key <= query + offset
        if window:
            seen = seen & (query + offset - key < window)
        return seen | expr.equal(query, last) if last_sees_all else seen

    return emit_map(b, visible, query, key, offset, last)


def joined(b: Builder, biases: Sequence[Value], shown: Sequence[Value], dtype: DType) -> Value | None:
    """One value to add to the scores: the sum of the biases, -inf where not all of `shown` hold; None for neither."""
    allowed = reduce(lambda p, q: emit_map(b, lambda x, y: x & y, p, q), shown) if shown else None
    total = reduce(lambda p, q: emit_map(b, lambda x, y: x + y, p, q), biases) if biases else None
    if allowed is None:
        return total
    if total is None:
        return emit_map(b, lambda s: where(s, expr.const(0, dtype), -np.inf), allowed)
    return emit_map(b, lambda t, s: where(s, t, -np.inf), total, allowed)
