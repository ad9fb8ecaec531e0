"""1x1 convolutions of images whose channels are scaled first, as squeeze-and-excitation does, as one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpu_fallback.conv_lowering import Layer, Operand, emit_gated
from cpu_fallback.epilogues import finish_of
from cpu_fallback.image_lowering import is_product
from cpu_fallback.native import Target, host
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, rewrite, use_counts
from gpu_engine.ir.ops import Map
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
PRODUCT = expr.arg(0, FLOAT32) * expr.arg(1, FLOAT32)


@dataclass(frozen=True)
class GatedConv:
    """`conv` of x [N, H, W, C] times a gate [N, 1, 1, C]. Inputs: x, the weights, the gate, the epilogue's operands."""

    conv: LastConv

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, w, gate, *extras = inputs
        return self.conv.infer(*Map(PRODUCT).infer(x, gate), w, *extras)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, w, gate, *extras = arrays
        return self.conv.evaluate(xp, *Map(PRODUCT).evaluate(xp, x, gate), w, *extras)


def join_gates(graph: Graph, target: Target) -> Graph:
    """The graph with such products and convolutions as one where a kernel scales pixels while it reads them."""
    uses = use_counts(graph)

    def rule(node: Node, builder: Builder) -> tuple[Value] | None:
        made = builder.producer(node.inputs[0]) if node.inputs else None
        if made is None or uses.get(node.inputs[0]) != 1 or not _is_direct(node, target):
            return None
        found = _gated(made)
        if found is None:
            return None
        assert isinstance(node.op, LastConv)
        return (builder.emit(GatedConv(node.op), found[0], node.inputs[1], found[1], *node.inputs[2:]),)

    return rewrite(graph, rule)


def _gated(node: Node) -> tuple[Value, Value] | None:
    """(image, gate) of a product of both."""
    if not isinstance(node.op, Map) or len(node.inputs) != 2 or node.outputs[0].dtype != FLOAT32:
        return None
    if node.op.expr is not PRODUCT and node.op.expr is not expr.arg(1, FLOAT32) * expr.arg(0, FLOAT32):
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        wanted = (x.shape[0], 1, 1, x.shape[-1]) if x.rank == 4 else ()
        if x.shape == node.outputs[0].shape and gate.shape == wanted and x.constant is None:
            return x, gate
    return None


def _is_direct(node: Node, target: Target) -> bool:
    """Whether this is a 1x1 convolution that reads pixels in place."""
    op = node.op
    if not isinstance(op, LastConv) or op.planar or op.group != 1 or op.accumulate is not None:
        return False
    w = node.inputs[1]
    unit = all(extent == 1 for extent in (*w.shape[2:], *op.strides)) and not any((*op.before, *op.after))
    known = w.constant is not None and w.dtype == FLOAT32 and len(op.strides) == 2
    if not (unit and known) or is_product(op, node):
        return False
    extras = [(0, value.shape) for value in node.inputs[2:]]
    return finish_of(op.epilogue, extras, node.outputs[0].shape, target) is not None


def lower_gated_conv(
    lowering: Lowering, op: GatedConv, node: Node, inputs: Buffers, outputs: Buffers, target: Target | None = None
) -> bool:
    target = target or host()
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[3:], node.inputs[3:], strict=True)]
    result, weights = node.outputs[0].shape, node.inputs[1].constant
    finish = finish_of(op.conv.epilogue, extras, result, target)
    if finish is None or weights is None:
        return False
    x, out = Operand(inputs[0], node.inputs[0].shape), Operand(outputs[0], result)
    emit_gated(Layer(lowering, target, x, out, finish), op.conv.form, weights, inputs[2])
    return True
