"""Transpose, Expand, Slice and Concat: copies between two walks of memory, elements moved as bits."""

from __future__ import annotations

from gpu_engine.gpu.maps import Copy, Walked, emit_copies, emit_copy
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import can_copy
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Concat, Expand, Slice, Transpose
from gpu_engine.plan.axes import broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
TOGETHER = 8
"""Operands of a Concat that one launch copies."""


def lower_transpose(lowering: Lowering, op: Transpose, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    shape, own = node.outputs[0].shape, contiguous_strides(node.inputs[0].shape)
    source = Walked(inputs[0], tuple(own[axis] for axis in op.perm))
    emit_copy(lowering, source, Walked(outputs[0], contiguous_strides(shape)), shape)
    return True


def lower_expand(lowering: Lowering, op: Expand, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    shape = node.outputs[0].shape
    source = Walked(inputs[0], broadcast_strides(node.inputs[0].shape, shape))
    emit_copy(lowering, source, Walked(outputs[0], contiguous_strides(shape)), shape)
    return True


def lower_slice(lowering: Lowering, op: Slice, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    own, shape = contiguous_strides(node.inputs[0].shape), node.outputs[0].shape
    offset: Dim = sum((start * stride for start, stride in zip(op.starts, own, strict=True)), 0)
    source = Walked(inputs[0], tuple(step * stride for step, stride in zip(op.steps, own, strict=True)), offset)
    emit_copy(lowering, source, Walked(outputs[0], contiguous_strides(shape)), shape)
    return True


def lower_concat(lowering: Lowering, op: Concat, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    steps = contiguous_strides(node.outputs[0].shape)
    copies: list[Copy] = []
    start: Dim = 0
    for buffer, value in zip(inputs, node.inputs, strict=True):
        source = Walked(buffer, contiguous_strides(value.shape))
        if value.shape[op.axis] != 0:
            copies.append(Copy(source, Walked(outputs[0], steps, start * steps[op.axis]), value.shape))
        start = start + value.shape[op.axis]
    copies = copies or [Copy(source, Walked(outputs[0], steps), node.outputs[0].shape)]
    for i in range(0, len(copies), TOGETHER):
        emit_copies(lowering, copies[i : i + TOGETHER])
    return True
