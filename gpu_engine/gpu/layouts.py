"""Layout assignment on the GPU: every convolution and the pools behind them take images channels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gpu_engine.gpu.printing import is_printable
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Graph, Node, Value
from gpu_engine.ir.ops import Conv, ConvTranspose, Map, Pool
from gpu_engine.ir.ops.channels_last import LastConv, LastConvTranspose, LastPool
from gpu_engine.plan import layouts
from gpu_engine.plan.layouts import Images

FEW_CHANNELS = 4
"""An image with no more channels than these is read as it is: elements of a window are gathered one by one anyway."""


def assign_layouts(graph: Graph) -> Graph:
    """The graph with its images channels last wherever that saves more than it costs."""
    return layouts.assign_layouts(graph, _begun)


def _begun(images: Images, node: Node) -> Value | None:
    if node.outputs[0].rank < 3:
        return None
    match node.op:
        case Conv():
            return _convolved(images, node, node.op)
        case ConvTranspose():
            return _convolved_back(images, node, node.op)
        case Pool():
            return _pooled(images, node, node.op)
    return None


def _convolved(images: Images, node: Node, op: Conv) -> Value:
    x, w, *extras = node.inputs
    planar = images.source(x) is None and x.shape[1] in range(FEW_CHANNELS + 1)
    plain = LastConv(op.strides, op.before, op.after, op.dilations, op.group, None, planar, op.accumulate)
    return _finished(images, plain, op.epilogue, x if planar else images.last(x), w, extras)


def _convolved_back(images: Images, node: Node, op: ConvTranspose) -> Value:
    x, w, *extras = node.inputs
    plain = LastConvTranspose(op.strides, op.before, op.after, op.dilations, op.output_padding, op.group, None)
    return _finished(images, plain, op.epilogue, images.last(x), w, extras)


def _finished(
    images: Images,
    plain: LastConv | LastConvTranspose,
    epilogue: Expr | None,
    x: Value,
    w: Value,
    extras: Sequence[Value],
) -> Value:
    """With the epilogue inside if kernels can compute it, else as a map behind."""
    operands = [images.operand(value, x.rank) for value in extras]
    if epilogue is None or is_printable(epilogue):
        return images.first(images.builder.emit(dataclasses.replace(plain, epilogue=epilogue), x, w, *operands))
    return images.first(images.builder.emit(Map(epilogue), images.builder.emit(plain, x, w), *operands))


def _pooled(images: Images, node: Node, op: Pool) -> Value | None:
    image = images.source(node.inputs[0])
    if image is None:
        return None
    fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
    return images.first(images.builder.emit(LastPool(**fields), image))
