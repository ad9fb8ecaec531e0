"""Operations that move elements: native strided copies where shapes alone say what goes where, else array functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_fallback.borders import lower_borders
from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.copies import Padding, emit_copy, emit_pad
from cpu_fallback.gathers import lower_blocks
from cpu_fallback.scalars import lower_pick
from cpu_fallback.transposition import SCALARS, as_matrices, transpose_call
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import STRING, can_copy
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Concat, Expand, Gather, Pad, Slice, Transpose
from gpu_engine.plan.axes import broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


def lower_transpose(lowering: Lowering, op: Transpose, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    shape, before = node.outputs[0].shape, node.inputs[0].shape
    matrices = as_matrices(before, op.perm)
    if matrices is not None and node.outputs[0].dtype.itemsize in SCALARS:
        call = transpose_call(inputs[0], outputs[0], *matrices, node.outputs[0].dtype.itemsize)
        lowering.emit(call, inputs, outputs)
        return True
    own = contiguous_strides(before)
    emit_copy(lowering, inputs[0], outputs[0], shape, (tuple(own[axis] for axis in op.perm), contiguous_strides(shape)))
    return True


def lower_expand(lowering: Lowering, op: Expand, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    shape = node.outputs[0].shape
    strides = (broadcast_strides(node.inputs[0].shape, shape), contiguous_strides(shape))
    emit_copy(lowering, inputs[0], outputs[0], shape, strides)
    return True


def lower_slice(lowering: Lowering, op: Slice, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    own, shape = contiguous_strides(node.inputs[0].shape), node.outputs[0].shape
    offset: Dim = sum((start * stride for start, stride in zip(op.starts, own, strict=True)), 0)
    strides = tuple(step * stride for step, stride in zip(op.steps, own, strict=True))
    if any(step < 0 and not isinstance(stride, int) for step, stride in zip(op.steps, own, strict=True)):
        return False  # a symbolic word cannot be negative
    emit_copy(lowering, inputs[0], outputs[0], shape, (strides, contiguous_strides(shape)), (offset, 0))
    return True


def lower_concat(lowering: Lowering, op: Concat, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not can_copy(node.outputs[0].dtype):
        return False
    steps = contiguous_strides(node.outputs[0].shape)
    start: Dim = 0
    for buffer, value in zip(inputs, node.inputs, strict=True):
        offset = start * steps[op.axis]
        emit_copy(lowering, buffer, outputs[0], value.shape, (contiguous_strides(value.shape), steps), (0, offset))
        start = start + value.shape[op.axis]
    return True


def lower_gather(lowering: Lowering, op: Gather, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not any(lower(lowering, op, node, inputs, outputs) for lower in (lower_pick, lower_blocks)):
        lowering.emit(ArrayCall(gather_into, op), inputs, outputs)
    return True


def lower_pad(lowering: Lowering, op: Pad, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x = node.inputs[0]
    if op.mode != "constant":
        return lower_borders(lowering, op, node, inputs, outputs)
    if x.dtype == STRING:
        return False
    value = inputs[1] if len(inputs) > 1 else lowering.constant(np.zeros((), x.dtype))
    emit_pad(lowering, inputs[0], value, outputs[0], x.shape, Padding(op.before, op.after))
    return True


def gather_into(op: Gather, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    """IndexError for an index outside the axis."""
    x, indices = inputs
    extent = x.shape[op.axis]
    if indices.size and (indices.min() < -extent or indices.max() >= extent):
        raise IndexError(f"an index outside [{-extent}, {extent - 1}]")
    places = np.where(indices < 0, indices + extent, indices).astype(np.intp, copy=False)
    if indices.size and x.size:
        np.take(x, places, axis=op.axis, out=outputs[0], mode="clip")
