"""Attention that reads and writes its tensors where they are: transposes and slices around it vanish.

Projections leave the heads of a token side by side, [batch, tokens, heads, features], often those of queries, keys and
values too, and take the result in the same order. The kernel walks rows with strides of its own, so it needs no copies.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cpu_fallback.lanes import is_supported
from cpu_fallback.native import Target
from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, compute_dtype
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, rewrite, use_counts
from gpu_engine.ir.ops import Attention, Reshape, Slice, Transpose

Shape = tuple[Dim, ...]
Perm = tuple[int, ...]


@dataclass(frozen=True)
class TurnedAttention:
    """`attention` of parts of its operands, its result permuted by `out`.

    Axis i of factor j is axis `axes[j][i]` of operand j, `shapes[j][i]` elements from `starts[j]` on; of operand axes
    that are not named only the element at the start is taken. The last axis stays last. A mask is taken as it is.
    """

    attention: Attention
    shapes: tuple[Shape, ...]
    axes: tuple[Perm, ...]
    starts: tuple[Shape, ...]
    out: Perm

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        factors = [TensorType(kind.dtype, shape) for kind, shape in zip(inputs, self.shapes, strict=False)]
        (result,) = self.attention.infer(*factors, *inputs[3:])
        return (TensorType(result.dtype, tuple(result.shape[axis] for axis in self.out)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        factors = []
        for array, shape, axes, starts in zip(arrays, self.shapes, self.axes, self.starts, strict=False):
            extents = dict(zip(axes, shape, strict=True))
            part = array[tuple(slice(start, start + extents.get(i, 1)) for i, start in enumerate(starts))]
            rest = [axis for axis in range(array.ndim) if axis not in axes]
            factors.append(part.transpose(*rest, *axes).reshape(shape))
        (result,) = self.attention.evaluate(xp, *factors, *arrays[3:])
        return (result.transpose(self.out),)


def straight(op: Attention, kinds: list[TensorType], rank: int) -> TurnedAttention:
    """Attention of whole operands as they are."""
    shapes = tuple(kind.shape for kind in kinds[:3])
    axes = tuple(tuple(range(len(shape))) for shape in shapes)
    return TurnedAttention(op, shapes, axes, tuple((0,) * len(shape) for shape in shapes), tuple(range(rank)))


def turn_attention(graph: Graph, target: Target) -> Graph:
    """The graph with attention in place of attention between transposes and slices, wherever it has a native form."""
    uses = use_counts(graph)

    def rule(node: Node, builder: Builder) -> tuple[Value] | None:
        match node.op:
            case Attention() as op if has_kernel(node.outputs[0].type, [value.type for value in node.inputs], target):
                result = _before(op, node, builder)
                uses[result] = uses[node.outputs[0]]
                return (result,)
            case Transpose(perm=perm) if uses.get(node.inputs[0]) == 1:
                return _behind(perm, node.inputs[0], builder)
        return None

    return rewrite(graph, rule)


def has_kernel(result: TensorType, operands: list[TensorType], target: Target) -> bool:
    """Whether attention of these operands runs natively: in float32, with conversions that the processor can do."""
    casts = [expr.cast(expr.arg(0, kind.dtype), FLOAT32) for kind in operands]
    casts.append(expr.cast(expr.arg(0, FLOAT32), result.dtype))
    return compute_dtype(result.dtype) == FLOAT32 and all(is_supported(cast, target) for cast in casts)


def _before(op: Attention, node: Node, builder: Builder) -> Value:
    """The attention of a node with what only moves its operands taken in."""
    turned = straight(op, [value.type for value in node.inputs], node.outputs[0].rank)
    sources, axes, starts = [], [], []
    for value in node.inputs[:3]:
        source, own, first = _source(value, builder)
        sources.append(source)
        axes.append(own)
        starts.append(first)
    turned = dataclasses.replace(turned, axes=tuple(axes), starts=tuple(starts))
    return builder.emit(turned, *sources, *node.inputs[3:])


def _source(value: Value, builder: Builder) -> tuple[Value, Perm, Shape]:
    """(tensor, its axes that are those of `value`, where they start) as far back as only elements move."""
    axes, starts = list(range(value.rank)), [0] * value.rank  # type: tuple[list[int], list[Dim]]
    best = value, tuple(axes), tuple(starts)
    while (made := builder.producer(value)) is not None:
        source = made.inputs[0] if made.inputs else value
        match made.op:
            case Transpose(perm=perm):
                moved = list(perm)
            case Slice(steps=steps, starts=first) if all(step == 1 for step in steps):
                moved = list(range(value.rank))
                starts = [start + more for start, more in zip(starts, first, strict=True)]
            case Reshape() if (kept := _unit_axes(source.shape, value.shape)) is not None:
                moved = kept
            case _:
                break
        before = starts
        starts = [0] * source.rank
        for axis, start in zip(moved, before, strict=True):
            starts[axis] = start
        axes = [moved[axis] for axis in axes]
        value = source
        if axes[-1] == source.rank - 1:
            best = source, tuple(axes), tuple(starts)
    return best


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
