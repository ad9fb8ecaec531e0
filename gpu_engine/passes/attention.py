"""Recognition of attention: product, scale, mask, softmax, product.

The key may be transposed anywhere, the scale may stand before or after the product or on both sides of it, the mask may
be added or chosen by Where, and NaN weights may be replaced by 0 (how exporters make fully masked rows finite).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gpu_engine.ir.dtypes import BOOL, is_float
from gpu_engine.ir.graph import Builder, Graph, Node, Value
from gpu_engine.ir.ops import Attention, Expand, Map, MatMul, Reshape, Softmax, Transpose
from gpu_engine.passes.counting import Uses, only_user, rewrite_counting
from gpu_engine.passes.operands import tidy
from gpu_engine.passes.terms import Term, head, number, operands, same, term_of
from gpu_engine.passes.transposes import emit_transpose, swapped, transposed


@dataclass(frozen=True)
class Scores:
    """`scale` times the MatMul `product`, then masked: `mask` is added, or says where to keep instead of `fill`."""

    product: Node
    scale: float = 1.0
    mask: Term | None = None
    fill: float = -math.inf
    inverted: bool = False


def recognize_attention(graph: Graph) -> Graph:
    """The graph with attention as one operation wherever nothing else uses its scores and weights."""
    return rewrite_counting(graph, _recognized)


def _recognized(node: Node, builder: Builder, uses: Uses) -> tuple[Value] | None:
    if node.op != MatMul() or not is_float(node.outputs[0].dtype) or not only_user(node.inputs[0], node, uses):
        return None
    weights, v = node.inputs
    found = _softmax(weights, builder, uses)
    if found is None:
        return None
    softmax, zero_nan = found
    scores = _scores(term_of(softmax.inputs[0]), builder, depth=6)
    if scores is None or scores.product.outputs[0].shape != weights.shape:
        return None
    if uses.get(scores.product.outputs[0]) != 1 or uses.get(softmax.inputs[0]) != 1:
        return None
    return _emitted(scores, v, zero_nan, builder)


def _emitted(scores: Scores, v: Value, zero_nan: bool, builder: Builder) -> tuple[Value] | None:
    assert isinstance(scores.product.op, MatMul)
    q, scale_q = _unscaled(scores.product.inputs[0], builder)
    keys, scale_k = _unscaled(scores.product.inputs[1], builder)
    k = keys if scores.product.op.transpose_b else _untransposed(keys, builder)
    if k is None or not q.dtype == k.dtype == v.dtype or min(q.rank, k.rank, v.rank) < 2:
        return None
    masks = () if scores.mask is None else (_mask(scores.mask, scores.inverted, builder),)
    if any(mask.dtype not in (BOOL, q.dtype) for mask in masks):
        return None
    op = Attention(scores.scale * scale_q * scale_k, fill=scores.fill, zero_nan=zero_nan)
    return (builder.emit(op, q, k, v, *masks),)


def _softmax(weights: Value, builder: Builder, uses: Uses) -> tuple[Node, bool] | None:
    """(softmax over the last axis that makes `weights`, whether its NaNs are replaced by 0)."""
    term, zero_nan = _uncast(term_of(weights), builder), False
    if chosen := operands(term, "where", builder):
        tested = operands(chosen[0], "isnan", builder)
        if not tested or number(chosen[1], builder) != 0 or not same(tested[0], chosen[2], builder):
            return None
        term, zero_nan = _uncast(chosen[2], builder), True
    value = head(term, builder).value
    node = None if value is None else builder.producer(value)
    if value is None or node is None or node.op != Softmax(value.rank - 1) or value.shape != weights.shape:
        return None
    return (node, zero_nan) if uses.get(value, 3) <= (2 if zero_nan else 1) else None


def _scores(term: Term, builder: Builder, depth: int) -> Scores | None:
    """The term read from the inside out."""
    term = head(term, builder)
    if depth == 0:
        return None
    if term.value is not None:
        node = builder.producer(term.value)
        plain = node is not None and node.op in (MatMul(), MatMul(transpose_b=True))
        return Scores(node) if node is not None and plain else None
    children = [Term(child, term.inputs) for child in term.expr.args]
    match term.expr.op:
        case "cast":
            return _scores(_uncast(term, builder), builder, depth - 1) if is_float(children[0].expr.dtype) else None
        case "mul" | "div" | "add":
            left, right = children
            found = _step(term.expr.op, left, right, builder, depth)
            return found or (_step(term.expr.op, right, left, builder, depth) if term.expr.op != "div" else None)
        case "where":
            condition, yes, no = children
            return _chosen(condition, yes, no, builder, depth)
    return None


def _step(op: str, inner: Term, other: Term, builder: Builder, depth: int) -> Scores | None:
    """The scores `inner` scaled by, or plus, `other`."""
    factor = number(other, builder)
    if op != "add" and not factor:
        return None
    scores = _scores(inner, builder, depth - 1)
    if scores is None or scores.mask is not None:
        return None
    if op == "add":
        return dataclasses.replace(scores, mask=other)
    assert factor is not None
    return dataclasses.replace(scores, scale=scores.scale * factor if op == "mul" else scores.scale / factor)


def _chosen(condition: Term, yes: Term, no: Term, builder: Builder, depth: int) -> Scores | None:
    """Where(condition, scores, fill) or Where(condition, fill, scores)."""
    for inner, other, inverted in ((yes, no, False), (no, yes, True)):
        fill = number(other, builder)
        scores = _scores(inner, builder, depth - 1) if fill is not None else None
        if scores is not None and scores.mask is None and fill is not None:
            return dataclasses.replace(scores, mask=condition, fill=fill, inverted=inverted)
    return None


def _mask(term: Term, inverted: bool, builder: Builder) -> Value:
    """The mask as a value, before it is broadcast; a boolean one says which pairs attend."""
    value = term.value
    if value is None or inverted:
        root, inputs = tidy(~term.expr if inverted else term.expr, term.inputs)
        return builder.emit(Map(root), *inputs)
    node = builder.producer(value)
    return node.inputs[0] if node is not None and isinstance(node.op, Expand) else value


def _unscaled(value: Value, builder: Builder) -> tuple[Value, float]:
    """(x, c) of a value x * c or x / c, also from behind a Transpose or a Reshape."""
    node = builder.producer(value)
    if node is not None and isinstance(node.op, Transpose | Reshape):
        inner, factor = _unscaled(node.inputs[0], builder)
        return (value if factor == 1 else builder.emit(node.op, inner)), factor
    for op in ("mul", "div"):
        pair = operands(term_of(value), op, builder)
        for x, other in (pair, pair[::-1]) if op == "mul" and pair else (pair,) if pair else ():
            factor = number(other, builder) or 0.0
            if factor and x.value is not None and x.value.shape == value.shape:
                return x.value, factor if op == "mul" else 1 / factor
    return value, 1.0


def _untransposed(value: Value, builder: Builder) -> Value | None:
    """`value` with its last two axes exchanged where that costs nothing more, or None."""
    found = transposed(value, builder)
    return None if found is None else emit_transpose(found[0], swapped(found[1]), builder)


def _uncast(term: Term, builder: Builder) -> Term:
    """x for a term that converts a floating x: attention computes in a wide type whatever its operands are."""
    inner = operands(term, "cast", builder)
    return inner[0] if inner and is_float(inner[0].expr.dtype) and is_float(term.expr.dtype) else term
