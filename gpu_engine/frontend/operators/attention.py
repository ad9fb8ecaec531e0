"""Attention as plain engine operations: two products around a softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.bodies import Bodies
from gpu_engine.frontend.model import ModelGraph
from gpu_engine.frontend.registry import emit_map, operator, scalar
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, FLOAT32, FLOAT64, INT64, DType, from_onnx
from gpu_engine.ir.expr import Expr, cast, equal, tanh, where
from gpu_engine.ir.graph import Builder, Value


@dataclass(frozen=True)
class Positions:
    """Where keys are visible: `offset` is the first query's position, `valid` how many keys each row has."""

    causal: bool
    left: int
    right: int
    offset: Value
    valid: Value | None


@operator("Attention", since=23)
def attention(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    nonpad_kv_seqlen: Value | None = None,
    *,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    softmax_precision: int = 0,
    qk_matmul_output_mode: int = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__Attention.html"""
    packed = q.rank == 3
    q, k, v = split_heads(b, q, q_num_heads), split_heads(b, k, kv_num_heads), split_heads(b, v, kv_num_heads)
    past: Dim = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = b.emit(ops.Concat(2), past_key, k), b.emit(ops.Concat(2), past_value, v)
    raw = scores_of(b, q, k, scale)
    capped = emit_map(b, lambda s: softcap * tanh(s / softcap), raw) if softcap > 0 else raw
    offset = b.shape_constant([past])
    if nonpad_kv_seqlen is not None:
        offset = emit_map(b, lambda n, s: n - s, nonpad_kv_seqlen, b.shape_constant([q.shape[2]]))
    if is_causal not in (0, 1):
        raise InvalidModel(f"is_causal is 0 or 1, not {is_causal}")
    positions = Positions(bool(is_causal), left_window_size, right_window_size, offset, nonpad_kv_seqlen)
    biased = _masked(b, capped, attn_mask, positions)
    hides = attn_mask is not None or nonpad_kv_seqlen is not None or max(left_window_size, right_window_size) >= 0
    precision = from_onnx(softmax_precision) if softmax_precision else q.dtype
    probabilities = probabilities_of(b, biased, precision, q.dtype, may_hide_all=hides)
    y = weighted(b, probabilities, v)
    if packed:
        y = b.emit(ops.Transpose((0, 2, 1, 3)), y)
        y = b.emit(ops.Reshape((*y.shape[:2], y.shape[2] * y.shape[3])), y)
    return (y, k, v, (raw, capped, biased, probabilities)[qk_matmul_output_mode])[:output_count]


@operator("FlexAttention", since=1, domain="ai.onnx.preview")
def flex_attention(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    *,
    scale: float | None = None,
    softmax_precision: int = 0,
    score_mod: ModelGraph | None = None,
    prob_mod: ModelGraph | None = None,
    bodies: Bodies,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_ai_onnx_preview_FlexAttention.html"""
    precision = from_onnx(softmax_precision) if softmax_precision else FLOAT64 if q.dtype == FLOAT64 else FLOAT32
    scores = emit_map(b, lambda s: cast(s, precision), scores_of(b, q, k, scale))
    if score_mod is not None:
        scores = _modified(bodies, score_mod, scores)
    probabilities = probabilities_of(b, scores, precision, precision, may_hide_all=score_mod is not None)
    if prob_mod is not None:
        probabilities = _modified(bodies, prob_mod, probabilities)
    return weighted(b, emit_map(b, lambda p: cast(p, q.dtype), probabilities), v)


def _modified(bodies: Bodies, graph: ModelGraph, value: Value) -> Value:
    (result,) = bodies.inline(graph, (value,))
    if not isinstance(result, Value) or result.dtype != value.dtype or result.rank != value.rank:
        raise InvalidModel("a modifier must keep the shape and element type of its input")
    return result


def split_heads(b: Builder, x: Value, heads: int) -> Value:
    """x [B, S, H*D] as [B, H, S, D]; four axes stay."""
    if x.rank == 4:
        return x
    if x.rank != 3 or heads < 1:
        raise InvalidModel(f"{x.type} in {heads} heads")
    split = b.emit(ops.Reshape((*x.shape[:2], heads, dims.floor_div(x.shape[2], heads))), x)
    return b.emit(ops.Transpose((0, 2, 1, 3)), split)


def scores_of(b: Builder, q: Value, k: Value, scale: float | None) -> Value:
    """q k^T * scale as [B, H, S, T]; narrow floats share the scale between the operands, lest the product overflow."""
    factor = _factor(b, q, scale)
    if q.dtype.itemsize < 4:
        root = emit_map(b, lambda s: cast(expr.sqrt(s), q.dtype), factor)
        q, k = (emit_map(b, lambda e, s: e * s, value, root) for value in (q, k))
    else:
        q = emit_map(b, lambda e, s: e * cast(s, e.dtype), q, factor)
    shape = (*q.shape[:3], k.shape[2])
    product = b.emit(ops.MatMul(transpose_b=True), *_grouped(b, q, k))
    return product if product.rank == 4 else b.emit(ops.Reshape(shape), product)


def _factor(b: Builder, q: Value, scale: float | None) -> Value:
    wide: DType = FLOAT64 if q.dtype == FLOAT64 else FLOAT32
    if scale is not None:
        return scalar(b, scale, wide)
    size = q.shape[3]
    if isinstance(size, int):
        return scalar(b, 1 / float(np.sqrt(size)), wide)
    return emit_map(b, lambda s: 1 / expr.sqrt(cast(s, wide)), b.shape_constant([size]))


def weighted(b: Builder, probabilities: Value, v: Value) -> Value:
    v = emit_map(b, lambda e: cast(e, probabilities.dtype), v) if v.dtype != probabilities.dtype else v
    shape = (*probabilities.shape[:3], v.shape[3])
    product = b.emit(ops.MatMul(), *_grouped(b, probabilities, v))
    return product if product.rank == 4 else b.emit(ops.Reshape(shape), product)


def _grouped(b: Builder, x: Value, shared: Value) -> tuple[Value, Value]:
    """Both operands; where several heads of x [B, H, ...] share one of `shared` [B, G, ...], with an axis for that."""
    heads, groups = x.shape[1], shared.shape[1]
    if heads == groups or groups == 1:
        return x, shared
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise InvalidModel(f"{heads} heads share {groups}")
    apart = (x.shape[0], groups, dims.floor_div(heads, groups), *x.shape[2:])
    single = (*shared.shape[:2], 1, *shared.shape[2:])
    return b.emit(ops.Reshape(apart), x), b.emit(ops.Reshape(single), shared)


def _masked(b: Builder, scores: Value, mask: Value | None, positions: Positions) -> Value:
    """The scores with the mask added, or -inf where it or the positions hide a key."""
    if mask is not None:
        mask = _padded_mask(b, mask, scores.shape[3])
        if mask.dtype == BOOL:
            scores = emit_map(b, lambda s, m: where(m, s, -np.inf), scores, mask)
        else:
            scores = emit_map(b, lambda s, m: s + cast(m, s.dtype), scores, mask)
    visible = _visible(positions)
    if visible is None:
        return scores
    rows, columns = scores.shape[2:]
    query = b.emit(
        ops.Reshape((rows, 1)),
        b.emit(
            ops.Iota(rows, INT64),
        ),
    )
    key = b.emit(ops.Iota(columns, INT64))
    offset = b.emit(ops.Reshape((positions.offset.shape[0], 1, 1, 1)), positions.offset)
    valid = positions.valid
    if valid is not None:
        valid = b.emit(ops.Reshape((valid.shape[0], 1, 1, 1)), valid)
    allowed = emit_map(b, visible, query, key, offset, valid)
    return emit_map(b, lambda s, a: where(a, s, -np.inf), scores, allowed)


def _visible(positions: Positions) -> Callable[[Expr, Expr, Expr, Expr | None], Expr] | None:
    """Whether the query may see the key, as a function of (query, key, offset, valid keys); None if it always may."""
    unbounded = not positions.causal and positions.left < 0 and positions.right < 0
    if unbounded and positions.valid is None:
        return None

    def visible(query: Expr, key: Expr, offset: Expr, valid: Expr | None) -> Expr:
        at = query + offset
        tests = [key < valid] if valid is not None else []
        tests += [key <= at] if positions.causal else []
        tests += [at - key <= positions.left] if positions.left >= 0 else []
        tests += [key - at <= positions.right] if positions.right >= 0 else []
        result = tests[0]
        for test in tests[1:]:
            result = result & test
        return result

    return visible


def _padded_mask(b: Builder, mask: Value, columns: Dim) -> Value:
    """The mask with as many columns as there are keys; those it lacks are hidden."""
    held = mask.shape[-1] if mask.rank else 1
    missing = columns - held
    if held == 1 or missing == 0 or (isinstance(missing, int) and missing < 0):
        return mask
    hidden = scalar(b, False, BOOL) if mask.dtype == BOOL else scalar(b, -np.inf, mask.dtype)
    none = (0,) * (mask.rank - 1)
    return b.emit(ops.Pad((*none, 0), (*none, missing)), mask, hidden)


def probabilities_of(b: Builder, scores: Value, precision: DType, dtype: DType, *, may_hide_all: bool) -> Value:
    """The softmax along the keys; with `may_hide_all`, a key at -inf has probability 0 also where all are."""
    precise = emit_map(b, lambda s: cast(s, precision), scores) if scores.dtype != precision else scores
    soft = b.emit(ops.Softmax(3), precise)
    if may_hide_all:
        return emit_map(b, lambda p, s: cast(where(equal(s, -np.inf), 0.0, p), dtype), soft, precise)
    return soft if precision == dtype else emit_map(b, lambda p: cast(p, dtype), soft)
