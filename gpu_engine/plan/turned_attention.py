"""Attention that reads and writes its tensors where they are: transposes and slices around it vanish.

Projections leave the heads of a token side by side, [batch, tokens, heads, features], often those of queries, keys and
values too, and take the result in the same order. The kernel walks rows with strides of its own, so it needs no copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, rewrite, use_counts
from gpu_engine.ir.ops import Attention, Reshape, Slice, Transpose
from gpu_engine.plan.axes import Shape

Perm = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A tensor of `shape` inside another: its axis i is axis `axes[i]` of that, from element `starts[axes[i]]` on.
    Along axes that are not named it has the element at the start only."""

    shape: Shape
    axes: Perm
    starts: Shape

    def of(self, array: Any) -> Any:
        extents = dict(zip(self.axes, self.shape, strict=True))
        part = array[tuple(slice(start, start + extents.get(i, 1)) for i, start in enumerate(self.starts))]
        rest = [axis for axis in range(array.ndim) if axis not in self.axes]
        return part.transpose(*rest, *self.axes).reshape(self.shape)


@dataclass(frozen=True)
class TurnedAttention:
    """`attention` of views of its first three operands, its result permuted by `out`.

    The last axis of a view is the last of its operand, and that of the result stays last. A mask is taken as it is.
    """

    attention: Attention
    views: tuple[View, ...]
    out: Perm

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        factors = [TensorType(kind.dtype, view.shape) for kind, view in zip(inputs, self.views, strict=False)]
        (result,) = self.attention.infer(*factors, *inputs[3:])
        return (TensorType(result.dtype, tuple(result.shape[axis] for axis in self.out)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        factors = [view.of(array) for array, view in zip(arrays, self.views, strict=False)]
        (result,) = self.attention.evaluate(xp, *factors, *arrays[3:])
        return (result.transpose(self.out),)


def straight(op: Attention, kinds: Sequence[TensorType], rank: int) -> TurnedAttention:
    """Attention of whole operands as they are."""
    views = tuple(View(kind.shape, tuple(range(kind.rank)), (0,) * kind.rank) for kind in kinds[:3])
    return TurnedAttention(op, views, tuple(range(rank)))


def turn_attention(graph: Graph, has_kernel: Callable[[Node], bool]) -> Graph:
    """The graph with attention in place of attention between transposes and slices, wherever it has a kernel."""
    uses = use_counts(graph)

    def rule(node: Node, builder: Builder) -> tuple[Value] | None:
        match node.op:
            case Attention() as op if has_kernel(node):
                result = _before(op, node, builder)
                uses[result] = uses[node.outputs[0]]
                return (result,)
            case Transpose(perm=perm) if uses.get(node.inputs[0]) == 1:
                return _behind(perm, node.inputs[0], builder)
        return None

    return rewrite(graph, rule)


def _before(op: Attention, node: Node, builder: Builder) -> Value:
    """The attention of a node with what only moves its operands taken in."""
    found = [_source(value, builder) for value in node.inputs[:3]]
    turned = TurnedAttention(op, tuple(view for _, view in found), tuple(range(node.outputs[0].rank)))
    return builder.emit(turned, *(source for source, _ in found), *node.inputs[3:])


def _source(value: Value, builder: Builder) -> tuple[Value, View]:
    """(tensor, the view of it that `value` is) as far back as only elements move."""
    shape, axes = value.shape, list(range(value.rank))
    starts: list[Dim] = [0] * value.rank
    best = value, View(shape, tuple(axes), tuple(starts))
    while (made := builder.producer(value)) is not None:
        source = made.inputs[0] if made.inputs else value
        match made.op:
            case Transpose(perm=perm):
                moved = list(perm)
            case Slice(steps=steps, starts=first) if all(step == 1 for step in steps):
                moved = list(range(value.rank))
                starts = [start + more for start, more in zip(starts, first, strict=True)]
            case Reshape() if (found := _unshaped(source, value.shape, builder)) is not None:
                source, moved = found
            case _:
                break
        before, starts = starts, [0] * source.rank
        for axis, start in zip(moved, before, strict=True):
            starts[axis] = start
        axes, value = [moved[axis] for axis in axes], source
        if axes[-1] == source.rank - 1:
            best = source, View(shape, tuple(axes), tuple(starts))
    return best


def _unshaped(source: Value, shape: Shape, builder: Builder) -> tuple[Value, list[int]] | None:
    """(tensor, its axes that are those of `shape`) if a Reshape of `source`, or it and the one before it, only drop
    extents of 1."""
    made = builder.producer(source)
    before = made.inputs if made is not None and isinstance(made.op, Reshape) else ()
    for value in (source, *before):
        kept = _unit_axes(value.shape, shape)
        if kept is not None:
            return value, kept
    return None


def _unit_axes(before: Shape, after: Shape) -> list[int] | None:
    """The axes of `before` that are those of `after`, if a Reshape only drops extents of 1."""
    kept: list[int] = []
    for axis, extent in enumerate(before):
        if len(kept) < len(after) and extent == after[len(kept)]:
            kept.append(axis)
        elif extent != 1:
            return None
    return kept if len(kept) == len(after) else None


def _behind(perm: Perm, value: Value, builder: Builder) -> tuple[Value] | None:
    """The attention that only a transpose uses with that transpose taken in."""
    made = builder.producer(value)
    if made is None or not isinstance(made.op, TurnedAttention) or perm[-1] != len(perm) - 1:
        return None
    if made.op.out != tuple(range(len(perm))):
        return None
    return (builder.emit(dataclasses.replace(made.op, out=perm), *made.inputs),)
