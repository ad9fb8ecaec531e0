"""Queries, keys and values by one product: what attention reads of one tensor is projected in one launch.

The products' weights lie side by side, and attention reads its three factors from the joint result where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite, use_counts
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
    def weights(self) -> Value:
        return self.node.inputs[1]


def _projection(value: Value, makers: Mapping[Value, Node], uses: Mapping[Value, int]) -> Projection | None:
    """What attention reads through transposes and reshapes alone."""
    node, parted = makers.get(value), value.shape
    while node is not None and uses[value] == 1 and isinstance(node.op, Reshape | Transpose):
        value, parted = node.inputs[0], value.shape
        node = makers.get(value)
    if node is None or uses[value] != 1 or not isinstance(node.op, MatMul) or node.op.transpose_b:
        return None
    weights = node.inputs[1]
    if weights.constant is None or weights.rank != 2 or parted[:-2] != value.shape[:-1]:
        return None
    return Projection(node, parted[-2:])


def _fit(group: Sequence[Projection]) -> bool:
    """Whether one product can take the place of all."""
    first = group[0]
    return len({projection.result for projection in group}) == len(group) and all(
        other.node.inputs[0] is first.node.inputs[0]
        and other.node.op == first.node.op
        and other.heads == first.heads
        and other.weights.shape == first.weights.shape
        and len(other.node.inputs) == len(first.node.inputs)
        and all(_is_row(value, other.weights.shape[1]) for value in other.node.inputs[2:])
        for other in group
    )


def _is_row(value: Value, columns: object) -> bool:
    """Whether an operand of the epilogue is one constant for each column."""
    return value.constant is not None and value.constant.size == columns == value.shape[-1]


def _joined(group: Sequence[Projection], x: Value, builder: Builder) -> list[Value]:
    """The results of all products of a group: slices of [..., products, heads, features]."""
    weights = builder.constant(np.concatenate([projection.weights.constant for projection in group], axis=1))
    rows = [
        builder.constant(np.concatenate([np.ravel(value.constant) for value in operands]))
        for operands in zip(*(projection.node.inputs[2:] for projection in group), strict=True)
    ]
    whole = builder.emit(group[0].node.op, x, weights, *rows)
    lead, heads = whole.shape[:-1], group[0].heads
    parted = builder.emit(Reshape((*lead, len(group), *heads)), whole)
    steps = (1,) * parted.rank
    parts = []
    for i, projection in enumerate(group):
        starts = (*(0,) * len(lead), i, *(0,) * len(heads))
        part = builder.emit(Slice(starts, steps, (*lead, 1, *heads)), parted)
        parts.append(builder.emit(Reshape(projection.result.shape), part))
    return parts
