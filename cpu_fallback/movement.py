"""Operations that move elements: native strided copies where shapes alone say what goes where, else array functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.maps import Walked, broadcast_strides, contiguous_strides, walk_call
from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import UINT8, UINT16, UINT32, UINT64, DType
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Concat, Expand, Gather, Pad, Slice, Transpose
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
Shape = tuple[Dim, ...]
BITS = {1: UINT8, 2: UINT16, 4: UINT32, 8: UINT64}


def emit_copy(
    lowering: Lowering, source: int, target: int, extents: Shape, strides: tuple[Shape, Shape],
    offsets: tuple[Dim, Dim] = (0, 0),
) -> None:  # fmt: skip
    """Copy `extents` elements between two walks (strides and offsets in elements, of source and target)."""
    dtype = bits_of(lowering.buffers[source].dtype)
    size = dtype.itemsize
    walks = (
        Walked(buffer, dtype, steps, offset * size)
        for buffer, steps, offset in zip((source, target), strides, offsets, strict=True)
    )
    call = walk_call(expr.arg(0, dtype), [next(walks)], next(walks), extents)
    assert call is not None
    lowering.emit(call, (source,), (target,))


def bits_of(dtype: DType) -> DType:
    """An unsigned integer as wide as the dtype: copies do not interpret."""
    return BITS[dtype.itemsize]


def copies(node: Node) -> bool:
    """Whether elements of this type can be copied natively."""
    dtype = node.outputs[0].dtype
    return not dtype.hasobject and dtype.itemsize in BITS


def lower_transpose(lowering: Lowering, op: Transpose, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not copies(node):
        return False
    shape = node.outputs[0].shape
    own = contiguous_strides(node.inputs[0].shape)
    emit_copy(lowering, inputs[0], outputs[0], shape, (tuple(own[axis] for axis in op.perm), contiguous_strides(shape)))
    return True


def lower_expand(lowering: Lowering, op: Expand, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not copies(node):
        return False
    shape = node.outputs[0].shape
    strides = (broadcast_strides(node.inputs[0].shape, shape), contiguous_strides(shape))
    emit_copy(lowering, inputs[0], outputs[0], shape, strides)
    return True


def lower_slice(lowering: Lowering, op: Slice, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not copies(node):
        return False
    own, shape = contiguous_strides(node.inputs[0].shape), node.outputs[0].shape
    offset: Dim = sum((start * stride for start, stride in zip(op.starts, own, strict=True)), 0)
    strides = tuple(step * stride for step, stride in zip(op.steps, own, strict=True))
    if any(step < 0 and not isinstance(stride, int) for step, stride in zip(op.steps, own, strict=True)):
        return False  # a symbolic word cannot be negative
    emit_copy(lowering, inputs[0], outputs[0], shape, (strides, contiguous_strides(shape)), (offset, 0))
    return True


def lower_concat(lowering: Lowering, op: Concat, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not copies(node):
        return False
    steps = contiguous_strides(node.outputs[0].shape)
    start: Dim = 0
    for buffer, value in zip(inputs, node.inputs, strict=True):
        offset = start * steps[op.axis]
        emit_copy(lowering, buffer, outputs[0], value.shape, (contiguous_strides(value.shape), steps), (0, offset))
        start = start + value.shape[op.axis]
    return True


def lower_gather(lowering: Lowering, op: Gather, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    lowering.emit(ArrayCall(gather_into, op), inputs, outputs)
    return True


def lower_pad(lowering: Lowering, op: Pad, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if op.mode != "constant":
        return False
    lowering.emit(ArrayCall(pad_into, op), inputs, outputs)
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


def pad_into(op: Pad, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    """Fill the borders, then copy what stays of x."""
    x, out = inputs[0], outputs[0]
    value = inputs[1].reshape(()) if len(inputs) > 1 else x.dtype.type(0)
    fill_borders(out, [int(n) for n in op.before], [int(n) for n in op.after], value)  # type: ignore[arg-type]
    copy_inside(x, out, [int(n) for n in op.before], [int(n) for n in op.after])  # type: ignore[arg-type]


def fill_borders(out: Array, before: Sequence[int], after: Sequence[int], value: Any) -> None:
    """`value` where a padded array lies outside of what it pads."""
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        lead = (slice(None),) * axis
        if low > 0:
            out[(*lead, slice(0, low))] = value
        if high > 0:
            out[(*lead, slice(max(0, out.shape[axis] - high), None))] = value


def copy_inside(x: Array, out: Array, before: Sequence[int], after: Sequence[int]) -> None:
    """x, cropped where a pad is negative, into the middle of `out`."""
    pads = list(zip(before, after, strict=True))
    source = tuple(
        slice(max(0, -low), extent - max(0, -high)) for (low, high), extent in zip(pads, x.shape, strict=True)
    )
    target = tuple(
        slice(max(0, low), extent - max(0, high)) for (low, high), extent in zip(pads, out.shape, strict=True)
    )
    out[target] = x[source]
