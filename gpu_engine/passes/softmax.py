"""Recognition of softmax and its logarithm: exp(x - max(x)) / sum(exp(x - max(x))) and (x - max) - log(sum(exp))."""

from __future__ import annotations

import math

from gpu_engine.ir.dtypes import is_float
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Map, Softmax
from gpu_engine.passes.terms import Term, factors, number, operands, reduction, same, without_bound


def recognize_softmax(graph: Graph) -> Graph:
    """The graph with decomposed softmax over one axis as Softmax."""
    return rewrite(graph, _recognized)


def _recognized(node: Node, builder: Builder) -> tuple[Value] | None:
    if not isinstance(node.op, Map) or not is_float(node.op.expr.dtype):
        return None
    term = Term(node.op.expr, node.inputs)
    match node.op.expr.op:
        case "div" | "mul":
            found, log = _quotient(term, builder), False
        case "sub":
            found, log = _difference(term, builder), True
        case _:
            return None
    if found is None or found[0].shape != node.outputs[0].shape:
        return None
    x, axis = found
    return (builder.emit(Softmax(axis, log), x),)


def _quotient(term: Term, builder: Builder) -> tuple[Value, int] | None:
    above, below = factors(term, builder)
    above = [part for part in above if number(part, builder) != 1]
    if len(above) != 1 or len(below) != 1:
        return None
    inner = operands(above[0], "exp", builder)
    return _shifted(inner[0], below[0], builder) if inner else None


def _difference(term: Term, builder: Builder) -> tuple[Value, int] | None:
    shifted, logarithm = operands(term, "sub", builder)
    inner = operands(logarithm, "log", builder)
    return _shifted(shifted, inner[0], builder) if inner else None


def _shifted(shifted: Term, total: Term, builder: Builder) -> tuple[Value, int] | None:
    """(x, axis) if `shifted` is x less its maximum along one axis and `total` is the sum of its exponentials."""
    pair, summed = operands(shifted, "sub", builder), reduction(total, builder)
    if not pair or summed is None or summed.kind != "sum" or len(summed.axes) != 1:
        return None
    exponential, x = operands(summed.term, "exp", builder), pair[0].value
    largest = reduction(without_bound(pair[1], "max", -math.inf, builder), builder)
    if not exponential or largest is None or x is None:
        return None
    if (largest.kind, largest.axes, largest.shape, summed.shape) != ("max", summed.axes, x.shape, x.shape):
        return None
    alike = same(exponential[0], shifted, builder) and same(largest.term, pair[0], builder)
    return (x, summed.axes[0]) if alike else None
