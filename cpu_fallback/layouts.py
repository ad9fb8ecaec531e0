"""Layout assignment: images keep their channels last from the first convolution to the last operation that can.

A convolution, pool or resize of an image is written as a transpose to channels last, its form there, and a transpose
back. Pointwise maps, concatenations, reductions and other operations that can take any order of axes move such
transposes behind themselves, where they meet the next operation's and vanish. Vectors then lie along channels, whose
number does not depend on the input.

`CpuDevice.lower` does not call it yet: with the native convolutions the PP-OCR recognizer is 1.1e-4 from float64, with
BLAS 1e-5. Their sums must come closer first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import Any

from cpu_fallback.channels_last import LastConv, LastConvTranspose, LastPool, Shape, permuted, to_first, to_last
from cpu_fallback.conv_lowering import AXES, has_phases
from cpu_fallback.epilogues import finish_of
from cpu_fallback.integer_epilogues import integer_finish
from cpu_fallback.integer_images import has_integer_form, is_exact_in_floats, paired_channels, paired_planes
from cpu_fallback.native import Target
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32, INT16, INT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import (
    Concat,
    Conv,
    ConvTranspose,
    LocalResponseNorm,
    Map,
    Pad,
    Pool,
    Reduce,
    Reshape,
    Resize,
    Slice,
    Softmax,
    Transpose,
)

FEW_CHANNELS = 4
"""An image with no more channels than these is read as it is: its windows are cut out of every plane."""
Perm = tuple[int, ...]


def assign_layouts(graph: Graph, target: Target) -> Graph:
    """The graph with its images channels last wherever that saves more than it costs."""
    known: dict[Value, Value] = {}
    return rewrite(graph, lambda node, builder: _Rule(builder, target, known).rewritten(node))


def is_relabelling(shape: Shape, perm: Perm) -> bool:
    """Whether a transpose leaves the elements where they are: axes that count keep their order."""
    counting = [axis for axis in perm if shape[axis] != 1]
    return counting == sorted(counting)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What becomes of one node; `known` are transposes made before."""

    builder: Builder
    target: Target
    known: dict[Value, Value]

    def rewritten(self, node: Node) -> tuple[Value] | None:
        if len(node.outputs) != 1:
            return None
        match node.op:
            case Conv():
                result = self._convolved(node, node.op)
            case ConvTranspose():
                result = self._convolved_back(node, node.op)
            case Pool():
                result = self._pooled(node, node.op)
            case Map():
                result = self._mapped(node)
            case Reduce():
                result = self._reduced(node, node.op)
            case Resize() | Concat() | Softmax() | LocalResponseNorm() | Slice() | Pad():
                result = self._moved(node)
            case Transpose(perm=perm):
                result = self._composed(node.inputs[0], perm)
            case Reshape():
                result = self._reshaped(node)
            case _:
                result = None
        return None if result is None else (result,)

    def _source(self, value: Value) -> Value | None:
        """`value` channels last, if it was made from that, or if that is the same memory."""
        if value.rank < 3:
            return None
        node = self.builder.producer(value)
        if node is not None and isinstance(node.op, Transpose) and node.op.perm == to_first(value.rank):
            return node.inputs[0]
        perm = to_last(value.rank)
        return self._permuted(value, perm) if is_relabelling(value.shape, perm) else None

    def _permuted(self, value: Value, perm: Perm) -> Value:
        if perm == tuple(range(value.rank)):
            return value
        if is_relabelling(value.shape, perm):
            return self.builder.emit(Reshape(permuted(value.shape, perm)), value)
        return self.builder.emit(Transpose(perm), value)

    def _last(self, value: Value) -> Value:
        """`value` channels last, transposed if need be."""
        found = self._source(value) or self.known.get(value)
        if found is None:
            found = self.known[value] = self._permuted(value, to_last(value.rank))
        return found

    def _first(self, value: Value) -> Value:
        return self._permuted(value, to_first(value.rank))

    def _operand(self, value: Value, rank: int) -> Value:
        """An operand that broadcasts to images of `rank` axes, channels last."""
        if all(extent == 1 for extent in value.shape):
            return value
        if value.rank < rank:
            value = self.builder.emit(Reshape((1,) * (rank - value.rank) + value.shape), value)
        return self._last(value)

    def _convolved(self, node: Node, op: Conv) -> Value | None:
        x, w, *extras = node.inputs
        if op.accumulate is not None:
            return self._convolved_integers(node, op)
        if not _fits(x, w, len(op.strides)) or x.shape[1] != w.shape[1] * op.group:
            return None
        planar = self._source(x) is None and x.shape[1] in range(FEW_CHANNELS + 1) and op.group == 1
        image = x if planar else self._last(x)
        plain = LastConv(op.strides, op.before, op.after, op.dilations, op.group, None, planar)
        return self._finished(plain, op.epilogue, image, w, extras)

    def _convolved_integers(self, node: Node, op: Conv) -> Value | None:
        x, w, *extras = node.inputs
        if not has_integer_form(op, x, w, self.target):
            return self._as_floats(node, op)
        last = LastConv(
            op.strides, op.before, op.after, op.dilations, op.group, op.epilogue, False, op.accumulate
        )  # fmt: skip
        planes = paired_planes(x, self.builder, self.target) if op.group == 1 and self._source(x) is None else None
        image, weights = paired_channels(planes or self._last(x), w, self.builder)
        operands = [self._operand(value, x.rank) for value in extras]
        return self._first(self._emitted_integers(last, image, weights, operands))

    def _as_floats(self, node: Node, op: Conv) -> Value | None:
        """The convolution of the integers as floats, where those hold every sum, or nothing multiplies integers."""
        x, w, *extras = node.inputs
        if not is_exact_in_floats(x, w) and (self.target.x86 or x.dtype != INT16):
            return None
        root = op.epilogue or expr.arg(0, INT32)
        epilogue = expr.substitute(root, {0: expr.cast(expr.arg(0, FLOAT32), INT32)})
        factors = [self.builder.emit(Map(expr.cast(expr.arg(0, value.dtype), FLOAT32)), value) for value in (x, w)]
        plain = dataclasses.replace(op, accumulate=None, epilogue=epilogue)
        return self._convolved(dataclasses.replace(node, op=plain, inputs=(*factors, *extras)), plain)

    def _emitted_integers(self, op: LastConv, image: Value, weights: Value, operands: Sequence[Value]) -> Value:
        """With the epilogue inside if tiles can compute it, else as a map behind."""
        plain = dataclasses.replace(op, epilogue=None)
        (product,) = plain.infer(image.type, weights.type)
        given = [(0, value.shape, value.dtype) for value in operands]
        if op.epilogue is None or integer_finish(op.epilogue, given, product.shape, self.target) is not None:
            return self.builder.emit(op, image, weights, *operands)
        return self.builder.emit(Map(op.epilogue), self.builder.emit(plain, image, weights), *operands)

    def _convolved_back(self, node: Node, op: ConvTranspose) -> Value | None:
        x, w, *extras = node.inputs
        kernel = [extent for extent in w.shape[2:] if isinstance(extent, int)]
        if not _fits(x, w, len(op.strides)) or x.shape[1] != w.shape[0] or not has_phases(op, kernel):
            return None
        plain = LastConvTranspose(
            op.strides, op.before, op.after, op.dilations, op.output_padding, op.group, None
        )  # fmt: skip
        return self._finished(plain, op.epilogue, self._last(x), w, extras)

    def _finished(
        self, plain: LastConv | LastConvTranspose, epilogue: Expr | None, x: Value, w: Value, extras: Sequence[Value]
    ) -> Value:
        """With the epilogue inside if tiles can compute it, else as a map behind."""
        operands = [self._operand(value, x.rank) for value in extras]
        (product,) = plain.infer(x.type, w.type)
        if finish_of(epilogue, [(0, value.shape) for value in operands], product.shape, self.target) is not None:
            whole = dataclasses.replace(plain, epilogue=epilogue)
            return self._first(self.builder.emit(whole, x, w, *operands))
        assert epilogue is not None
        return self._first(self.builder.emit(Map(epilogue), self.builder.emit(plain, x, w), *operands))

    def _pooled(self, node: Node, op: Pool) -> Value | None:
        (x,) = node.inputs
        image = self._source(x)
        native = x.dtype == FLOAT32 or (x.dtype == INT16 and op.kind == "max")
        if image is None or not native or len(op.kernel) > AXES:
            return None
        if not isinstance(x.shape[1], int) or not x.shape[1] or not prod(op.kernel):
            return None
        fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
        return self._first(self.builder.emit(LastPool(**fields), image))

    def _mapped(self, node: Node) -> Value | None:
        """The map of operands channels last, if more of them come that way than have to be brought there."""
        rank = node.outputs[0].rank
        operands = self._operands(node.inputs, rank)
        if operands is None:
            return None
        return self._first(self.builder.emit(node.op, *operands))

    def _operands(self, values: Sequence[Value], rank: int) -> list[Value] | None:
        ready = dear = 0
        for value in values:
            if value.constant is not None or all(extent == 1 for extent in value.shape):
                continue
            found = self._source(value) if value.rank == rank else None
            if found is None:
                dear += value.rank < rank or value not in self.known
            else:
                ready += not is_relabelling(value.shape, to_last(rank))
        if rank < 3 or not ready or dear >= ready:
            return None
        return [self._operand(value, rank) for value in values]

    def _reduced(self, node: Node, op: Reduce) -> Value | None:
        rank = max(value.rank for value in node.inputs)
        operands = self._operands(node.inputs, rank)
        if operands is None:
            return None
        order = to_last(rank)
        axes = tuple(sorted(order.index(axis) for axis in op.axes))
        result = self.builder.emit(dataclasses.replace(op, axes=axes), *operands)
        if op.keepdims:
            return self._first(result)
        left = [axis for axis in order if axis not in op.axes]
        return self._permuted(result, tuple(left.index(axis) for axis in sorted(left)))

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
        return self._first(self.builder.emit(op, *found, *node.inputs[len(images) :]))

    def _composed(self, value: Value, perm: Perm) -> Value | None:
        """A transpose of an image that comes channels last, from there."""
        source = self._source(value)
        if source is None:
            return None
        return self._permuted(source, tuple(to_first(value.rank)[axis] for axis in perm))

    def _reshaped(self, node: Node) -> Value | None:
        """Spatial axes merged, parted, dropped or added while the image stays channels last."""
        (x,), shape = node.inputs, node.outputs[0].shape
        source = self._source(x)
        if source is None or shape[:2] != x.shape[:2] or is_relabelling(x.shape, to_last(x.rank)):
            return None
        if dims.product(shape[2:]) != dims.product(x.shape[2:]):
            return None
        return self._first(self.builder.emit(Reshape((shape[0], *shape[2:], shape[1])), source))


def _fits(x: Value, w: Value, axes: int) -> bool:
    """Float32 with constant weights over at most three axes."""
    known = w.constant is not None and w.dtype == FLOAT32 and w.constant.size > 0
    return known and x.dtype == FLOAT32 and 0 < axes <= AXES


def _ordered(values: tuple[Any, ...], order: Perm) -> tuple[Any, ...]:
    return tuple(values[axis] for axis in order)
