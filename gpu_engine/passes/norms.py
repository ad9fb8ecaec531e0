"""Recognition of layer normalisation and RMS normalisation in the forms that exporters write.

d / sqrt(v + eps), d * (1 / sqrt(v + eps)), d * (v + eps) ** -0.5, each times a scale before or after, plus a bias,
with d = x - mean(x) and v = mean(d * d) or mean(x * x) - mean(x) ** 2; or d = x and v = mean(x * x).
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import is_float
from gpu_engine.ir.graph import Builder, Graph, Node, Value
from gpu_engine.ir.ops import LayerNorm, Map, Reshape
from gpu_engine.ir.ops.pointwise import broadcast_shapes
from gpu_engine.passes.counting import Uses, only_user, rewrite_counting
from gpu_engine.passes.operands import strip
from gpu_engine.passes.terms import Term, factors, mean, number, operands, same, without_bound


@dataclass(frozen=True)
class Statistics:
    """The variance of `x` over `axes`, or with `centered` False its mean square."""

    axes: tuple[int, ...]
    shape: tuple[Dim, ...]
    x: Term
    centered: bool


def recognize_norms(graph: Graph) -> Graph:
    """The graph with norms over trailing axes as LayerNorm."""
    return rewrite_counting(graph, _recognized)


def _recognized(node: Node, builder: Builder, uses: Uses) -> tuple[Value] | None:
    if not isinstance(node.op, Map) or node.op.expr.op not in ("mul", "div", "add") or not is_float(node.op.expr.dtype):
        return None
    result = _affine(node, builder, uses) or (_normalized(node, builder) if node.op.expr.op != "add" else None)
    return None if result is None else (result,)


def _normalized(node: Node, builder: Builder) -> Value | None:
    assert isinstance(node.op, Map)
    above, below = factors(Term(node.op.expr, node.inputs), builder)
    found = _inverse_root(above, below, builder)
    if found is None:
        return None
    radicand, above, below = found
    spread, epsilon = _with_epsilon(radicand, builder)
    statistics = variance(spread, builder)
    if statistics is None or epsilon is None or below:
        return None
    axes, value = statistics.axes, statistics.x.value
    if value is None or not value.shape == node.outputs[0].shape == statistics.shape:
        return None
    if axes != tuple(range(axes[0], value.rank)):
        return None
    rest = _without_deviation(above, statistics, builder)
    scales = None if rest is None else [part for part in rest if number(part, builder) != 1]
    if scales is None or len(scales) > 1 or any(part.value is None for part in scales):
        return None
    op = LayerNorm(axes[0], epsilon, statistics.centered)
    scale = scales[0].value if scales else None
    if scale is None:
        return builder.emit(op, value)
    fitted = fitting(scale, value, op.axis, builder)
    return None if fitted is None else builder.emit(op, value, fitted)


def _inverse_root(above: list[Term], below: list[Term], builder: Builder) -> tuple[Term, list[Term], list[Term]] | None:
    """(radicand, numerators, denominators) of a product with one factor 1 / sqrt(radicand)."""
    for i, part in enumerate(below):
        if root := operands(part, "sqrt", builder):
            return root[0], above, below[:i] + below[i + 1 :]
    for i, part in enumerate(above):
        power = operands(part, "pow", builder)
        if power and number(power[1], builder) == -0.5:
            return power[0], above[:i] + above[i + 1 :], below
    return None


def _with_epsilon(radicand: Term, builder: Builder) -> tuple[Term, float | None]:
    """(variance, epsilon) of a radicand."""
    pair = operands(radicand, "add", builder)
    for spread, constant in (pair, pair[::-1]) if pair else ():
        epsilon = number(constant, builder)
        if epsilon is not None:
            return spread, epsilon
    return radicand, None if pair else 0.0


def variance(term: Term, builder: Builder) -> Statistics | None:
    """What `term` is the variance or the mean square of."""
    term = without_bound(term, "max", 0.0, builder)
    if pair := operands(term, "sub", builder):
        return _variance_of_moments(pair, builder)
    fold = mean(term, builder)
    root = None if fold is None else square_root(fold.term, builder)
    if fold is None or root is None:
        return None
    x = centre(root, fold.axes, fold.shape, builder)
    return Statistics(fold.axes, fold.shape, root if x is None else x, x is not None)


def _variance_of_moments(pair: tuple[Term, ...], builder: Builder) -> Statistics | None:
    """mean(x * x) - mean(x) ** 2."""
    second, first = mean(pair[0], builder), square_root(pair[1], builder)
    moment = None if first is None else mean(first, builder)
    if second is None or moment is None or (second.axes, second.shape) != (moment.axes, moment.shape):
        return None
    root = square_root(second.term, builder)
    if root is None or not same(root, moment.term, builder):
        return None
    return Statistics(moment.axes, moment.shape, moment.term, True)


def square_root(term: Term, builder: Builder) -> Term | None:
    """x of x * x or x ** 2."""
    if pair := operands(term, "mul", builder):
        return pair[0] if same(pair[0], pair[1], builder) else None
    power = operands(term, "pow", builder)
    return power[0] if power and number(power[1], builder) == 2 else None


def centre(term: Term, axes: tuple[int, ...], shape: tuple[Dim, ...], builder: Builder) -> Term | None:
    """x of x - mean(x) over `axes`, for x of `shape`."""
    pair = operands(term, "sub", builder)
    fold = mean(pair[1], builder) if pair else None
    if fold is None or (fold.axes, fold.shape) != (axes, shape) or not same(pair[0], fold.term, builder):
        return None
    return pair[0]


def _without_deviation(above: list[Term], found: Statistics, builder: Builder) -> list[Term] | None:
    """The numerators but the one that the statistics are about; None if there is none."""
    for i, part in enumerate(above):
        deviation = centre(part, found.axes, found.shape, builder) if found.centered else part
        if deviation is not None and same(deviation, found.x, builder):
            return above[:i] + above[i + 1 :]
    return None


def _affine(node: Node, builder: Builder, uses: Uses) -> Value | None:
    """LayerNorm(x) * scale and LayerNorm(x, scale) + bias as one operation."""
    assert isinstance(node.op, Map)
    kind = node.op.expr.op
    if len(node.inputs) != 2 or kind == "div" or any(child.op != "arg" for child in node.op.expr.args):
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        made = builder.producer(value)
        if made is None or not isinstance(made.op, LayerNorm) or not only_user(value, node, uses):
            continue
        if len(made.inputs) != (1 if kind == "mul" else 2):
            continue
        operand = fitting(other, value, made.op.axis, builder)
        if operand is not None:
            return builder.emit(made.op, *made.inputs, operand)
    return None


def fitting(operand: Value, x: Value, axis: int, builder: Builder) -> Value | None:
    """`operand` without leading extents of 1 if it broadcasts to x and varies along the axes from `axis` only."""
    shape = strip(operand.shape)
    if operand.dtype != x.dtype or len(shape) > x.rank - axis or broadcast_shapes(x.shape, shape) != x.shape:
        return None
    return operand if shape == operand.shape else builder.emit(Reshape(shape), operand)
