"""Terms: a view of the graph in which pointwise nodes have no borders, for rules that look for a formula.

However an exporter cuts `(x - mean) / sqrt(var + eps)` into nodes, the formula read through terms is the same.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim, product
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Expand, Map, Reduce
from gpu_engine.passes.operands import literal, operand_shape


@dataclass(frozen=True)
class Term:
    """An expression over values, read element by element under broadcasting."""

    expr: Expr
    inputs: tuple[Value, ...]

    @property
    def value(self) -> Value | None:
        """The value that the term is, before looking into what makes it."""
        return self.inputs[self.expr.value] if self.expr.op == "arg" else None


def term_of(value: Value) -> Term:
    return Term(expr.arg(0, value.dtype), (value,))


def head(term: Term, builder: Builder) -> Term:
    """The term with the Maps and Expands at its root opened, until an operation or a value made by neither."""
    while (value := term.value) is not None:
        node = builder.producer(value)
        if node is not None and isinstance(node.op, Map):
            term = Term(node.op.expr, node.inputs)
        elif node is not None and isinstance(node.op, Expand):
            term = term_of(node.inputs[0])
        else:
            constant = literal(value)
            return Term(constant, ()) if constant is not None else term
    return term


def operands(term: Term, op: str, builder: Builder) -> tuple[Term, ...]:
    """The operands of the term's root if that is `op`, else ()."""
    opened = head(term, builder)
    return tuple(Term(child, opened.inputs) for child in opened.expr.args) if opened.expr.op == op else ()


def number(term: Term, builder: Builder) -> float | None:
    """The constant that the term is, or None."""
    opened = head(term, builder)
    return float(opened.expr.value) if opened.expr.op == "const" else None


def same(a: Term, b: Term, builder: Builder, depth: int = 6) -> bool:
    """Whether both terms are the same formula of the same values; False where that takes too long to tell."""
    if a == b or (a.value is not None and a.value is b.value):
        return True
    a, b = head(a, builder), head(b, builder)
    if a.value is not None or b.value is not None:
        return a.value is b.value
    if (a.expr.op, a.expr.dtype, len(a.expr.args)) != (b.expr.op, b.expr.dtype, len(b.expr.args)) or depth == 0:
        return False
    if not a.expr.args:
        return a.expr is b.expr
    return a.expr.value == b.expr.value and all(
        same(Term(x, a.inputs), Term(y, b.inputs), builder, depth - 1)
        for x, y in zip(a.expr.args, b.expr.args, strict=True)
    )


def factors(term: Term, builder: Builder) -> tuple[list[Term], list[Term]]:
    """(numerators, denominators) of the product that the term is; at most some ten."""
    above: list[Term] = []
    below: list[Term] = []
    stack = [(term, True)]
    while stack:
        part, up = stack.pop()
        room = len(above) + len(below) + len(stack) < 10
        if room and (pair := operands(part, "mul", builder)):
            stack += [(pair[1], up), (pair[0], up)]
        elif room and (pair := operands(part, "div", builder)):
            stack += [(pair[1], not up), (pair[0], up)]
        else:
            (above if up else below).append(part)
    return above, below


@dataclass(frozen=True)
class Fold:
    """A reduction of `term`, whose elements have `shape`, over `axes`, which stay with extent 1."""

    kind: str
    axes: tuple[int, ...]
    shape: tuple[Dim, ...]
    term: Term


def reduction(term: Term, builder: Builder) -> Fold | None:
    """What the term folds if it is a Reduce that keeps its axes and maps nothing afterwards."""
    value = head(term, builder).value
    node = None if value is None else builder.producer(value)
    if node is None or not isinstance(node.op, Reduce) or node.op.after is not None or not node.op.keepdims:
        return None
    folded = Term(node.op.before or expr.arg(0, node.inputs[0].dtype), node.inputs)
    return Fold(node.op.kind, node.op.axes, operand_shape(node.inputs), folded)


def mean(term: Term, builder: Builder) -> Fold | None:
    """What the term is the mean of, be it a sum times the reciprocal of the count."""
    above, below = factors(term, builder)
    constants = [number(part, builder) for part in above]
    divisors = [number(part, builder) for part in below]
    parts = [part for part, constant in zip(above, constants, strict=True) if constant is None]
    fold = reduction(parts[0], builder) if len(parts) == 1 else None
    if fold is None or not fold.axes or not all(divisors):
        return None
    scale = math.prod(c for c in constants if c is not None) / math.prod(d for d in divisors if d)
    if fold.kind == "mean" and scale == 1:
        return fold
    count = product(fold.shape[axis] for axis in fold.axes)
    summed = fold.kind == "sum" and isinstance(count, int) and abs(scale * count - 1) < 1e-6
    return dataclasses.replace(fold, kind="mean") if summed else None


def without_bound(term: Term, op: str, bound: float, builder: Builder) -> Term:
    """x for a term `op`(x, bound), in either order, that never cuts anything off; else the term."""
    pair = operands(term, op, builder)
    for x, limit in (pair, pair[::-1]) if pair else ():
        if number(limit, builder) == bound:
            return x
    return term
