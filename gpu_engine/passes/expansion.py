"""Expansion: operations that a device has no kernel for, as the smaller operations that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BOOL, INT64
from gpu_engine.ir.graph import Builder, Graph, Node, Op, Value, rewrite
from gpu_engine.ir.ops import Attention, Iota, Map, MatMul, Reshape, Softmax


def expand(graph: Graph, declined: Callable[[Op], bool]) -> Graph:
    """The graph with every operation that `declined` names in smaller ones, as far as it has such a form."""
    return rewrite(graph, lambda node, builder: expanded(node, builder) if declined(node.op) else None)


def expanded(node: Node, builder: Builder) -> tuple[Value] | None:
    """What stands for the node in smaller operations, or None."""
    match node.op:
        case Attention():
            return (_attention(node.op, node.inputs, builder),)
    return None


def _attention(op: Attention, inputs: tuple[Value, ...], builder: Builder) -> Value:
    q, k, v, *masks = inputs
    score = expr.arg(0, q.dtype) * op.scale
    operands = [builder.emit(MatMul(transpose_b=True), q, k)]
    for mask in masks:
        shown = expr.arg(len(operands), mask.dtype)
        score = expr.where(shown, score, op.fill) if mask.dtype == BOOL else score + shown
        operands.append(mask)
    if op.causal:
        score = expr.where(expr.arg(len(operands), BOOL), score, -math.inf)
        operands.append(_visible(q, k, builder))
    weights = builder.emit(Map(score), *operands)
    weights = builder.emit(Softmax(weights.rank - 1), weights)
    if op.zero_nan:
        weight = expr.arg(0, weights.dtype)
        weights = builder.emit(Map(expr.where(expr.isnan(weight), 0, weight)), weights)
    return builder.emit(MatMul(), weights, v)


def _visible(q: Value, k: Value, builder: Builder) -> Value:
    """[S, T]: whether key j is not later than query i."""
    rows, keys = q.shape[-2], k.shape[-2]
    queries = builder.emit(Reshape((rows, 1)), builder.emit(Iota(rows, INT64)))
    return builder.emit(Map(expr.arg(0, INT64) <= expr.arg(1, INT64)), builder.emit(Iota(keys, INT64)), queries)
