"""Layout assignment, the part that every device shares: what happens to images whose channels a device puts last.

An operation of the device's own is written as a transpose to channels last, its form there, and a transpose back.
Pointwise maps, concatenations, reductions and other operations that can take any order of axes move such transposes
behind themselves, where they meet the next operation's and vanish. Vectors then lie along channels, whose number does
not depend on the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gpu_engine.ir import dims
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Concat, LocalResponseNorm, Map, Pad, Reduce, Reshape, Resize, Slice, Softmax, Transpose
from gpu_engine.ir.ops.channels_last import Shape, permuted, to_first, to_last

Perm = tuple[int, ...]


def assign_layouts(graph: Graph, begin: Callable[[Images, Node], Value | None]) -> Graph:
    """The graph with its images channels last wherever that saves more than it costs.

    `begin(images, node)` gives what stands for the output of a node that the device has a form of its own for, channels
    last; None for all others.
    """
    known: dict[Value, Value] = {}

    def rule(node: Node, builder: Builder) -> tuple[Value] | None:
        if len(node.outputs) != 1:
            return None
        images = Images(builder, known)
        result = begin(images, node)
        result = images.moved(node) if result is None else result
        return None if result is None else (result,)

    return rewrite(graph, rule)


def is_relabelling(shape: Shape, perm: Perm) -> bool:
    """Whether a transpose leaves the elements where they are: axes that count keep their order."""
    counting = [axis for axis in perm if shape[axis] != 1]
    return counting == sorted(counting)


@dataclasses.dataclass(frozen=True)
class Images:
    """Values of a graph while it is rewritten, channels last and back; `known` are transposes made before."""

    builder: Builder
    known: dict[Value, Value]

    def moved(self, node: Node) -> Value | None:
        """What stands for the output of a node that takes its operands channels last; None if it keeps them."""
        match node.op:
            case Map():
                return self._mapped(node)
            case Reduce():
                return self._reduced(node, node.op)
            case Resize() | Concat() | Softmax() | LocalResponseNorm() | Slice() | Pad():
                return self._moved(node)
            case Transpose(perm=perm):
                return self._composed(node.inputs[0], perm)
            case Reshape():
                return self._reshaped(node)
        return None

    def source(self, value: Value) -> Value | None:
        """`value` channels last, if it was made from that, or if that is the same memory."""
        if value.rank < 3:
            return None
        node = self.builder.producer(value)
        if node is not None and isinstance(node.op, Transpose) and node.op.perm == to_first(value.rank):
            return node.inputs[0]
        perm = to_last(value.rank)
        return self.permuted(value, perm) if is_relabelling(value.shape, perm) else None

    def permuted(self, value: Value, perm: Perm) -> Value:
        if perm == tuple(range(value.rank)):
            return value
        if is_relabelling(value.shape, perm):
            return self.builder.emit(Reshape(permuted(value.shape, perm)), value)
        return self.builder.emit(Transpose(perm), value)

    def last(self, value: Value) -> Value:
        """`value` channels last, transposed if need be."""
        found = self.source(value) or self.known.get(value)
        if found is None:
            found = self.known[value] = self.permuted(value, to_last(value.rank))
        return found

    def first(self, value: Value) -> Value:
        return self.permuted(value, to_first(value.rank))

    def operand(self, value: Value, rank: int) -> Value:
        """An operand that broadcasts to images of `rank` axes, channels last."""
        if all(extent == 1 for extent in value.shape):
            return value
        if value.rank < rank:
            value = self.builder.emit(Reshape((1,) * (rank - value.rank) + value.shape), value)
        return self.last(value)

    def _operands(self, values: Sequence[Value], rank: int) -> list[Value] | None:
        ready = dear = 0
        for value in values:
            if value.constant is not None or all(extent == 1 for extent in value.shape):
                continue
            found = self.source(value) if value.rank == rank else None
            if found is None:
                dear += value.rank < rank or value not in self.known
            else:
                ready += not is_relabelling(value.shape, to_last(rank))
        if rank < 3 or not ready or dear >= ready:
            return None
        return [self.operand(value, rank) for value in values]

    def _mapped(self, node: Node) -> Value | None:
        """The map of operands channels last, if more of them come that way than have to be brought there."""
        rank = node.outputs[0].rank
        operands = self._operands(node.inputs, rank)
        if operands is None:
            return None
        return self.first(self.builder.emit(node.op, *operands))

    def _reduced(self, node: Node, op: Reduce) -> Value | None:
        rank = max(value.rank for value in node.inputs)
        operands = self._operands(node.inputs, rank)
        if operands is None:
            return None
        order = to_last(rank)
        axes = tuple(sorted(order.index(axis) for axis in op.axes))
        result = self.builder.emit(dataclasses.replace(op, axes=axes), *operands)
        if op.keepdims:
            return self.first(result)
        left = [axis for axis in order if axis not in op.axes]
        return self.permuted(result, tuple(left.index(axis) for axis in sorted(left)))

    def _moved(self, node: Node) -> Value | None:
        """An operation whose parameters belong to axes, on images channels last."""
        images = node.inputs if isinstance(node.op, Concat) else node.inputs[:1]
        rank = node.outputs[0].rank
        found = self._operands(images, rank)
        if found is None:
            return None
        order, op = to_last(rank), node.op
        match op:
            case Concat(axis=axis) | Softmax(axis=axis) | LocalResponseNorm(axis=axis):
                op = dataclasses.replace(op, axis=order.index(axis))
            case Slice():
                op = Slice(permuted(op.starts, order), _ordered(op.steps, order), permuted(op.extents, order))
            case Pad():
                op = Pad(permuted(op.before, order), permuted(op.after, order), op.mode)
            case Resize():
                roi = _ordered(op.roi, order) if op.roi else ()
                op = dataclasses.replace(
                    op, extents=permuted(op.extents, order), scales=_ordered(op.scales, order), roi=roi
                )  # fmt: skip
        return self.first(self.builder.emit(op, *found, *node.inputs[len(images) :]))

    def _composed(self, value: Value, perm: Perm) -> Value | None:
        """A transpose of an image that comes channels last, from there."""
        source = self.source(value)
        if source is None:
            return None
        return self.permuted(source, tuple(to_first(value.rank)[axis] for axis in perm))

    def _reshaped(self, node: Node) -> Value | None:
        """Spatial axes merged, parted, dropped or added while the image stays channels last."""
        (x,), shape = node.inputs, node.outputs[0].shape
        source = self.source(x)
        if source is None or shape[:2] != x.shape[:2] or is_relabelling(x.shape, to_last(x.rank)):
            return None
        if dims.product(shape[2:]) != dims.product(x.shape[2:]):
            return None
        return self.first(self.builder.emit(Reshape((shape[0], *shape[2:], shape[1])), source))


def _ordered(values: tuple[Any, ...], order: Perm) -> tuple[Any, ...]:
    return tuple(values[axis] for axis in order)
