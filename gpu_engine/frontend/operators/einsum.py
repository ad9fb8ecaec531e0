"""Einsum as transposes, reductions and matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Expand, Iota, MatMul, Reduce, Reshape, Transpose


@dataclass(frozen=True)
class Term:
    """A value and the label of each of its axes; the axes of an ellipsis are "0", "1", ... from the right."""

    value: Value
    labels: tuple[str, ...]

    def extent(self, label: str) -> Dim:
        return self.value.shape[self.labels.index(label)] if label in self.labels else 1


@operator("Einsum", since=12)
def einsum(b: Builder, *inputs: Value, equation: str) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Einsum.html"""
    terms, result = parse(equation.replace(" ", ""), inputs)
    terms = [without_repeats(b, term) for term in terms]
    while len(terms) > 1:
        first, second, *rest = terms
        kept = set(result).union(*(term.labels for term in rest))
        terms = [contracted(b, summed(b, first, kept | set(second.labels)), second, kept), *rest]
    only = summed(b, terms[0], set(result))
    return ordered(b, only, result).value


def parse(equation: str, inputs: tuple[Value, ...]) -> tuple[list[Term], tuple[str, ...]]:
    """The labelled operands and the labels of the result; InvalidModel where equation and operands disagree."""
    left, arrow, right = equation.partition("->")
    texts = left.split(",")
    if len(texts) != len(inputs):
        raise InvalidModel(f"{equation!r} names {len(texts)} operands, {len(inputs)} are given")
    terms = [Term(value, _labels(text, value)) for text, value in zip(texts, inputs, strict=True)]
    named = [label for term in terms for label in term.labels]
    ellipsis = tuple(sorted({label for label in named if label.isdigit()}, key=int, reverse=True))
    if arrow:
        head, dots, tail = right.partition("...")
        result = (*head, *ellipsis, *tail) if dots else tuple(right)
    else:
        once = sorted(label for label in set(named) if named.count(label) == 1 and not label.isdigit())
        result = (*ellipsis, *once)
    if len(set(result)) != len(result) or not set(result) <= set(named):
        raise InvalidModel(f"{equation!r} asks for {right!r}, which its operands do not give")
    return terms, result


def _labels(text: str, value: Value) -> tuple[str, ...]:
    head, dots, tail = text.partition("...")
    free = value.rank - len(head) - len(tail)
    if not all(label.isalpha() for label in head + tail) or free < 0 or (free and not dots):
        raise InvalidModel(f"the einsum term {text!r} does not fit {value.type}")
    return (*head, *(str(axis) for axis in reversed(range(free))), *tail)


def without_repeats(b: Builder, term: Term) -> Term:
    """The diagonal along labels that occur twice: everything off it is masked, then summed away."""
    for axis, label in enumerate(term.labels):
        other = term.labels.index(label)
        if other != axis:
            rows, columns = (position(b, term.value, place) for place in (other, axis))
            zero = expr.const(0, term.value.dtype)
            masked = emit_map(
                b, lambda x, i, j, zero=zero: expr.where(expr.equal(i, j), x, zero), term.value, rows, columns
            )
            value = b.emit(Reduce("sum", (axis,), False), masked)
            return without_repeats(b, Term(value, term.labels[:axis] + term.labels[axis + 1 :]))
    return term


def position(b: Builder, x: Value, axis: int) -> Value:
    """0, 1, 2, ... along one axis of x, shaped to broadcast with it."""
    shape = (x.shape[axis],) + (1,) * (x.rank - 1 - axis)
    return b.emit(Reshape(shape), b.emit(Iota(x.shape[axis], INT64)))


def summed(b: Builder, term: Term, kept: set[str]) -> Term:
    """The term summed over the labels that nothing else needs."""
    axes = tuple(axis for axis, label in enumerate(term.labels) if label not in kept)
    if not axes:
        return term
    return Term(b.emit(Reduce("sum", axes, False), term.value), tuple(x for x in term.labels if x in kept))


def ordered(b: Builder, term: Term, labels: tuple[str, ...]) -> Term:
    """The term with its axes in the order of `labels`; one that it lacks gets an axis of extent 1."""
    present = [label for label in labels if label in term.labels]
    perm = tuple(term.labels.index(label) for label in present)
    value = term.value if perm == tuple(range(len(perm))) else b.emit(Transpose(perm), term.value)
    shape = tuple(term.extent(label) for label in labels)
    return Term(value if value.shape == shape else b.emit(Reshape(shape), value), labels)


def contracted(b: Builder, first: Term, second: Term, kept: set[str]) -> Term:
    """The product of two terms, summed over the labels that both have and `kept` lacks: one batched matrix product."""
    second = summed(b, second, kept | set(first.labels))
    shared = [label for label in first.labels if label in second.labels]
    batch = tuple(label for label in shared if label in kept)
    inner = tuple(label for label in shared if label not in kept)
    rows = tuple(label for label in first.labels if label not in shared)
    columns = tuple(label for label in second.labels if label not in shared)
    extents = {label: dims.broadcast(first.extent(label), second.extent(label)) for label in batch + inner}
    left = grouped(b, first, (batch, rows, inner), extents)
    right = grouped(b, second, (batch, inner, columns), extents)
    product = b.emit(MatMul(), left, right)
    labels = batch + rows + columns
    sizes = [extents.get(label, first.extent(label) if label in rows else second.extent(label)) for label in labels]
    return Term(b.emit(Reshape(tuple(sizes)), product), labels)


def grouped(b: Builder, term: Term, groups: tuple[tuple[str, ...], ...], extents: dict[str, Dim]) -> Value:
    """The term with the labels of each group merged into one axis, shared axes broadcast to `extents` first."""
    labels = reduce(lambda a, c: a + c, groups)
    value = ordered(b, term, labels).value
    shape = tuple(extents.get(label, term.extent(label)) for label in labels)
    value = value if value.shape == shape else b.emit(Expand(shape), value)
    sizes = dict(zip(labels, shape, strict=True))
    merged = tuple(dims.product(sizes[label] for label in group) for group in groups)
    return value if value.shape == merged else b.emit(Reshape(merged), value)
