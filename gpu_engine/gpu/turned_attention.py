"""Attention that reads and writes its tensors where they are: transposes and slices around it vanish.

Projections leave the heads of a token side by side, [batch, tokens, heads, features], often those of queries, keys and
values too, and take the result in the same order. The kernel walks rows with strides of its own, so it needs no copies.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gpu_engine.gpu.attention import Factors, emit_attention, has_kernel
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, rewrite, use_counts
from gpu_engine.ir.ops import Attention, Reshape, Slice, Transpose
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

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


def turn_attention(graph: Graph) -> Graph:
    """The graph with attention in place of attention between transposes and slices, wherever it has a kernel."""
    uses = use_counts(graph)

    def rule(node: Node, builder: Builder) -> tuple[Value] | None:
        match node.op:
            case Attention() as op if _has_kernel(node):
                result = _before(op, node, builder)
                uses[result] = uses[node.outputs[0]]
                return (result,)
            case Transpose(perm=perm) if uses.get(node.inputs[0]) == 1:
                return _behind(perm, node.inputs[0], builder)
        return None

    return rewrite(graph, rule)


def lower_turned_attention(
    options: GpuOptions,
    lowering: Lowering,
    op: TurnedAttention,
    node: Node,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> bool:
    back = tuple(map(op.out.index, range(len(op.out))))
    result = tuple(node.outputs[0].shape[axis] for axis in back)
    (queries, depth), (keys, width), lead = op.views[0].shape[-2:], op.views[2].shape[-2:], result[:-2]
    views = [*op.views, View(result, back, (0,) * len(back))]
    stored = [*(value.shape for value in node.inputs[:3]), node.outputs[0].shape]
    buffers = (*inputs[:3], outputs[0])
    walks = [_walked(buffer, shape, view, lead) for buffer, shape, view in zip(buffers, stored, views, strict=True)]
    for buffer, value in zip(inputs[3:], node.inputs[3:], strict=True):
        walks.append(Walked(buffer, broadcast_strides(value.shape, (*lead, queries, keys))))
    assert isinstance(depth, int) and isinstance(width, int)
    emit_attention(options, lowering, op.attention, Factors(tuple(walks), lead, queries, keys, depth, width))
    return True


def _walked(buffer: int, stored: Shape, view: View, lead: Shape) -> Walked:
    """A view of a buffer as the kernel walks it, with stride 0 along the axes of `lead` that it is broadcast over."""
    steps = contiguous_strides(stored)
    offset: Dim = sum((start * step for start, step in zip(view.starts, steps, strict=True)), 0)
    own = [steps[axis] for axis in view.axes]
    missing = len(lead) + 2 - len(own)
    strides = [0] * missing + [
        step if extent == whole else dims.many(extent) * step
        for extent, step, whole in zip(view.shape[:-2], own, lead[missing:], strict=False)
    ]
    return Walked(buffer, (*strides, *own[-2:]), offset)


def _has_kernel(node: Node) -> bool:
    q, _, v, *_ = node.inputs
    return has_kernel(q.dtype, node.inputs[1].shape[-1], v.shape[-1])


def _before(op: Attention, node: Node, builder: Builder) -> Value:
    """The attention of a node with what only moves its operands taken in."""
    found = [_source(value, builder) for value in node.inputs[:3]]
    turned = TurnedAttention(op, tuple(view for _, view in found), tuple(range(node.outputs[0].rank)))
    return builder.emit(turned, *(source for source, _ in found), *node.inputs[3:])


def _source(value: Value, builder: Builder) -> tuple[Value, View]:
    """(tensor, the view of it that `value` is) as far back as only elements move."""
    shape, axes, starts = value.shape, list(range(value.rank)), [0] * value.rank  # type: Shape, list[int], list[Dim]
    best = value, View(shape, tuple(axes), tuple(starts))
    while (made := builder.producer(value)) is not None:
        source = made.inputs[0] if made.inputs else value
        before = builder.producer(source)
        if isinstance(made.op, Reshape) and before is not None and isinstance(before.op, Reshape):
            source = before.inputs[0]
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
        moving, starts = starts, [0] * source.rank
        for axis, start in zip(moved, moving, strict=True):
            starts[axis] = start
        axes, value = [moved[axis] for axis in axes], source
        if axes[-1] == source.rank - 1:
            best = source, View(shape, tuple(axes), tuple(starts))
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
