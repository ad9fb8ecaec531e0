"""Layout assignment on the CPU: which convolutions and pools have kernels for images channels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod

from cpu_fallback.conv_lowering import AXES, has_phases
from cpu_fallback.epilogues import finish_of
from cpu_fallback.integer_epilogues import integer_finish
from cpu_fallback.integer_images import has_integer_form, is_exact_in_floats, paired_channels, paired_planes
from cpu_fallback.native import Target
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT16, INT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Graph, Node, Value
from gpu_engine.ir.ops import Conv, ConvTranspose, Map, Pool
from gpu_engine.ir.ops.channels_last import LastConv, LastConvTranspose, LastPool
from gpu_engine.plan import layouts
from gpu_engine.plan.layouts import Images

FEW_CHANNELS = 4
"""An image with no more channels than these is read as it is: its windows are cut out of every plane."""


def assign_layouts(graph: Graph, target: Target) -> Graph:
    """The graph with its images channels last wherever that saves more than it costs."""
    return layouts.assign_layouts(graph, lambda images, node: _Rule(images, target).begun(node))


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What becomes of one node that has a form channels last."""

    images: Images
    target: Target

    def begun(self, node: Node) -> Value | None:
        match node.op:
            case Conv():
                return self._convolved(node, node.op)
            case ConvTranspose():
                return self._convolved_back(node, node.op)
            case Pool():
                return self._pooled(node, node.op)
        return None

    def _convolved(self, node: Node, op: Conv) -> Value | None:
        x, w, *extras = node.inputs
        if op.accumulate is not None:
            return self._convolved_integers(node, op)
        if not _fits(x, w, len(op.strides)) or x.shape[1] != w.shape[1] * op.group:
            return None
        planar = self.images.source(x) is None and x.shape[1] in range(FEW_CHANNELS + 1) and op.group == 1
        image = x if planar else self.images.last(x)
        plain = LastConv(op.strides, op.before, op.after, op.dilations, op.group, None, planar)
        return self._finished(plain, op.epilogue, image, w, extras)

    def _convolved_integers(self, node: Node, op: Conv) -> Value | None:
        x, w, *extras = node.inputs
        if not has_integer_form(op, x, w, self.target):
            return self._as_floats(node, op)
        last = LastConv(
            op.strides, op.before, op.after, op.dilations, op.group, op.epilogue, False, op.accumulate
        )  # fmt: skip
        planes = (
            paired_planes(x, self.images.builder, self.target)
            if op.group == 1 and self.images.source(x) is None
            else None
        )
        image, weights = paired_channels(planes or self.images.last(x), w, self.images.builder)
        operands = [self.images.operand(value, x.rank) for value in extras]
        return self.images.first(self._emitted_integers(last, image, weights, operands))

    def _as_floats(self, node: Node, op: Conv) -> Value | None:
        """The convolution of the integers as floats, where those hold every sum, or nothing multiplies integers."""
        x, w, *extras = node.inputs
        if not is_exact_in_floats(x, w) and (self.target.x86 or x.dtype != INT16):
            return None
        root = op.epilogue or expr.arg(0, INT32)
        epilogue = expr.substitute(root, {0: expr.cast(expr.arg(0, FLOAT32), INT32)})
        factors = [
            self.images.builder.emit(Map(expr.cast(expr.arg(0, value.dtype), FLOAT32)), value) for value in (x, w)
        ]
        plain = dataclasses.replace(op, accumulate=None, epilogue=epilogue)
        return self._convolved(dataclasses.replace(node, op=plain, inputs=(*factors, *extras)), plain)

    def _emitted_integers(self, op: LastConv, image: Value, weights: Value, operands: Sequence[Value]) -> Value:
        """With the epilogue inside if tiles can compute it, else as a map behind."""
        plain = dataclasses.replace(op, epilogue=None)
        (product,) = plain.infer(image.type, weights.type)
        given = [(0, value.shape, value.dtype) for value in operands]
        if op.epilogue is None or integer_finish(op.epilogue, given, product.shape, self.target) is not None:
            return self.images.builder.emit(op, image, weights, *operands)
        return self.images.builder.emit(Map(op.epilogue), self.images.builder.emit(plain, image, weights), *operands)

    def _convolved_back(self, node: Node, op: ConvTranspose) -> Value | None:
        x, w, *extras = node.inputs
        kernel = [extent for extent in w.shape[2:] if isinstance(extent, int)]
        if not _fits(x, w, len(op.strides)) or x.shape[1] != w.shape[0] or not has_phases(op, kernel):
            return None
        plain = LastConvTranspose(
            op.strides, op.before, op.after, op.dilations, op.output_padding, op.group, None
        )  # fmt: skip
        return self._finished(plain, op.epilogue, self.images.last(x), w, extras)

    def _finished(
        self, plain: LastConv | LastConvTranspose, epilogue: Expr | None, x: Value, w: Value, extras: Sequence[Value]
    ) -> Value:
        """With the epilogue inside if tiles can compute it, else as a map behind."""
        operands = [self.images.operand(value, x.rank) for value in extras]
        (product,) = plain.infer(x.type, w.type)
        if finish_of(epilogue, [(0, value.shape) for value in operands], product.shape, self.target) is not None:
            whole = dataclasses.replace(plain, epilogue=epilogue)
            return self.images.first(self.images.builder.emit(whole, x, w, *operands))
        assert epilogue is not None
        return self.images.first(
            self.images.builder.emit(Map(epilogue), self.images.builder.emit(plain, x, w), *operands)
        )

    def _pooled(self, node: Node, op: Pool) -> Value | None:
        (x,) = node.inputs
        image = self.images.source(x)
        native = x.dtype == FLOAT32 or (x.dtype == INT16 and op.kind == "max")
        if image is None or not native or len(op.kernel) > AXES:
            return None
        if not isinstance(x.shape[1], int) or not x.shape[1] or not prod(op.kernel):
            return None
        fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
        return self.images.first(self.images.builder.emit(LastPool(**fields), image))


def _fits(x: Value, w: Value, axes: int) -> bool:
    """Float32 with constant weights over at most three axes."""
    known = w.constant is not None and w.dtype == FLOAT32 and w.constant.size > 0
    return known and x.dtype == FLOAT32 and 0 < axes <= AXES
