"""Products with one-hot rows are look-ups: exporters write an embedding as Cast(Equal(ids, 0..n-1)) times the table."""

from __future__ import annotations

import numpy as np

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import INT64, is_float, is_integer
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Gather, Map, MatMul, Reshape
from gpu_engine.passes.operands import strip
from gpu_engine.passes.terms import operands, term_of

TABLE_LIMIT_NBYTES = 64 << 20


def gather_one_hot(graph: Graph) -> Graph:
    """The graph with constant tables gathered instead of multiplied; an id outside the table gives a row of zeros."""
    return rewrite(graph, _gathered)


def _gathered(node: Node, builder: Builder) -> tuple[Value] | None:
    if node.op != MatMul():
        return None
    rows, table = node.inputs
    weights, ids = table.constant, one_hot_ids(rows, builder)
    if ids is None or weights is None or weights.ndim != 2 or not is_float(table.dtype):
        return None
    if weights.nbytes > TABLE_LIMIT_NBYTES or not np.isfinite(weights).all():
        return None
    count = weights.shape[0]
    padded = builder.constant(np.concatenate([weights, np.zeros_like(weights[:1])]))
    given = expr.arg(0, ids.dtype)
    place = expr.cast(expr.where((given >= 0) & (given < count), given, count), INT64)
    places = builder.emit(Map(place), builder.emit(Reshape(node.outputs[0].shape[:-1]), ids))
    return (builder.emit(Gather(0), padded, places),)


def one_hot_ids(value: Value, builder: Builder) -> Value | None:
    """ids [..., 1] of a value [..., n] that is 1 where they equal 0..n-1, else 0."""
    converted = operands(term_of(value), "cast", builder)
    pair = operands(converted[0], "eq", builder) if converted else ()
    for given, counted in (pair, pair[::-1]) if pair else ():
        ids, numbers = given.value, counted.value
        if ids is None or numbers is None or not counts(numbers, value):
            continue
        if is_integer(ids.dtype) and ids.shape == (*value.shape[:-1], 1):
            return ids
    return None


def counts(value: Value, like: Value) -> bool:
    """Whether `value` is the constant 0..n-1 along the last axis of `like`."""
    array, extent = value.constant, like.shape[-1]
    if array is None or not isinstance(extent, int) or strip(value.shape) != (extent,):
        return False
    fits = extent <= np.iinfo(array.dtype).max
    return fits and bool((array.ravel() == np.arange(extent)).all())
