"""Queries, keys and values by one product: what attention reads of one tensor is projected in one launch.

The products' weights lie side by side, and attention reads its three factors from the joint result where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.gpu.narrow_products import NarrowMatMul
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, Node, Op, Value, rewrite, use_counts
from gpu_engine.ir.ops import Attention, MatMul, Reshape, Slice, Transpose


def join_projections(graph: Graph) -> Graph:
    """The graph with the products of constants that feed one attention joined, where they have the same first factor
    and the same epilogue."""
    makers = {value: node for node in graph.nodes for value in node.outputs}
    uses = use_counts(graph)
    groups: dict[Value, tuple[Projection, ...]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Attention):
            found = [_projection(value, makers, uses) for value in node.inputs[:3]]
            group = tuple(projection for projection in found if projection is not None)
            if len(group) == 3 and _fit(group):
                groups |= dict.fromkeys((projection.result for projection in group), group)
    made: dict[Value, Value] = {}

    def rule(node: Node, builder: Builder) -> Sequence[Value] | None:
        group = groups.get(node.outputs[0])
        if group is None:
            return None
        if node.outputs[0] not in made:
            parts = _joined(group, node.inputs[0], builder)
            made.update(zip((projection.result for projection in group), parts, strict=True))
        return (made[node.outputs[0]],)

    return rewrite(graph, rule) if groups else graph


@dataclass(frozen=True)
class Projection:
    """A product with constant weights whose columns are parted into [heads, features] behind it."""

    node: Node
    heads: tuple[Dim, ...]

    @property
    def result(self) -> Value:
        return self.node.outputs[0]

    @property
    def weights(self) -> tuple[Value, ...]:
        """Constants: the second factor, or the parts of a narrow one."""
        op = self.node.op
        return self.node.inputs[1 : 1 + op.parts] if isinstance(op, NarrowMatMul) else self.node.inputs[1:2]

    @property
    def extras(self) -> tuple[Value, ...]:
        """Operands of the epilogue."""
        return self.node.inputs[1 + len(self.weights) :]

    @property
    def axis(self) -> int:
        """That of the weights' columns."""
        return 0 if isinstance(self.node.op, NarrowMatMul) and self.node.op.product.transpose_b else 1

    @property
    def columns(self) -> Dim:
        return self.weights[0].shape[self.axis]


def _projection(value: Value, makers: Mapping[Value, Node], uses: Mapping[Value, int]) -> Projection | None:
    """What attention reads through transposes and reshapes alone."""
    node, parted = makers.get(value), value.shape
    while node is not None and uses[value] == 1 and isinstance(node.op, Reshape | Transpose):
        value, parted = node.inputs[0], value.shape
        node = makers.get(value)
    if node is None or uses[value] != 1 or not _has_columns(node.op):
        return None
    weights = node.inputs[1]
    if weights.constant is None or weights.rank != 2 or parted[:-2] != value.shape[:-1]:
        return None
    return Projection(node, parted[-2:])


def _has_columns(op: Op) -> bool:
    """Whether weights have columns that others may lie beside."""
    if isinstance(op, NarrowMatMul):
        along_n = 0 if op.product.transpose_b else 1
        return not op.weights.block or op.weights.axis != along_n
    return isinstance(op, MatMul) and not op.transpose_b


def _fit(group: Sequence[Projection]) -> bool:
    """Whether one product can take the place of all."""
    first = group[0]
    return len({projection.result for projection in group}) == len(group) and all(
        other.node.inputs[0] is first.node.inputs[0]
        and other.node.op == first.node.op
        and other.heads == first.heads
        and [value.type for value in other.weights] == [value.type for value in first.weights]
        and len(other.extras) == len(first.extras)
        and all(_is_row(value, other.columns) for value in other.extras)
        for other in group
    )


def _is_row(value: Value, columns: object) -> bool:
    """Whether an operand of the epilogue is one constant for each column."""
    return value.constant is not None and value.constant.size == columns == value.shape[-1]


def _joined(group: Sequence[Projection], x: Value, builder: Builder) -> list[Value]:
    """The results of all products of a group: slices of [..., products, heads, features]."""
    first = group[0]
    weights = [
        builder.constant(np.concatenate([_beside(value.constant, first) for value in parts], axis=first.axis))
        for parts in zip(*(projection.weights for projection in group), strict=True)
    ]
    rows = [
        builder.constant(np.concatenate([np.ravel(value.constant) for value in operands]))
        for operands in zip(*(projection.extras for projection in group), strict=True)
    ]
    whole = builder.emit(first.node.op, x, *weights, *rows)
    lead, heads = whole.shape[:-1], first.heads
    parted = builder.emit(Reshape((*lead, len(group), *heads)), whole)
    steps = (1,) * parted.rank
    parts = []
    for i, projection in enumerate(group):
        starts = (*(0,) * len(lead), i, *(0,) * len(heads))
        part = builder.emit(Slice(starts, steps, (*lead, 1, *heads)), parted)
        parts.append(builder.emit(Reshape(projection.result.shape), part))
    return parts


def _beside(part: Any, projection: Projection) -> Any:
    """Weights, or scales or zero points of such, with an element for every column."""
    matrix = part.reshape((1,) * (2 - part.ndim) + part.shape)
    shape = list(matrix.shape)
    shape[projection.axis] = projection.columns
    return np.broadcast_to(matrix, shape)
