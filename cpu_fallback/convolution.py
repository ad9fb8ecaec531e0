"""Convolutions: columns and a matrix product, or for depthwise ones a native sum over the taps.

The columns of as many output rows as fit the cache are made at a time. A 1x1 convolution needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.linear import finish, product_buffer
from cpu_fallback.maps import Shape, Walked, contiguous_strides, walk_call
from cpu_fallback.movement import copy_inside, fill_borders
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Conv, ConvTranspose
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
COLUMNS = 1 << 18
"""Elements of the column buffer: 1 MiB of float32, half of a common second-level cache."""
TAP_LIMIT = 64


def lower_conv(lowering: Lowering, op: Conv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, w = node.inputs[:2]
    if x.dtype not in (FLOAT32, FLOAT64) or x.dtype != w.dtype or not _all_ints(w.shape):
        return False
    if _is_depthwise(op, w.shape) and _lower_depthwise(lowering, op, node, inputs, outputs):
        return True
    shape = node.outputs[0].shape
    product = product_buffer(lowering, op.epilogue, x.dtype, shape, outputs[0])
    if _is_pointwise(op, w.shape):
        lowering.emit(ArrayCall(convolve_pointwise, op), inputs[:2], (product,))
    else:
        padded = _padded_extents(op, x.shape[2:])
        row = dims.product((w.shape[1] * op.group, *w.shape[2:], *shape[3:]))
        scratch = (
            lowering.buffer(x.dtype, (x.shape[1], *padded)),
            lowering.buffer(x.dtype, (dims.maximum(dims.minimum(row * shape[2], COLUMNS), row),)),
        )
        lowering.emit(ArrayCall(convolve, op), inputs[:2], (product,), scratch=scratch)
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    finish(lowering, op.epilogue, product, extras, outputs[0], shape)
    return True


def _all_ints(shape: Shape) -> bool:
    return all(isinstance(extent, int) for extent in shape)


def _is_pointwise(op: Conv, kernel: Shape) -> bool:
    unit = all(extent == 1 for extent in (*kernel[2:], *op.strides))
    return unit and op.group == 1 and not any(pad != 0 for pad in (*op.before, *op.after))


def _is_depthwise(op: Conv, kernel: Shape) -> bool:
    return kernel[1] == 1 and kernel[0] == op.group and 0 < dims_product(kernel[2:]) <= TAP_LIMIT


def dims_product(extents: Shape) -> int:
    """The product of extents that are ints."""
    return math.prod(int(extent) for extent in extents)  # type: ignore[arg-type]


def _padded_extents(op: Conv, spatial: Shape) -> Shape:
    return tuple(a + extent + b for a, extent, b in zip(op.before, spatial, op.after, strict=True))


def _lower_depthwise(lowering: Lowering, op: Conv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """One native map over the taps of a padded copy; the epilogue is part of it."""
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    padded, source = (*x.shape[:2], *_padded_extents(op, x.shape[2:])), inputs[0]
    walks = _tap_walks(op, padded, w.shape)
    call = None
    if any(pad != 0 for pad in (*op.before, *op.after)):
        source = lowering.buffer(x.dtype, padded)
    operands = [Walked(source, x.dtype, strides, offset * x.dtype.itemsize) for strides, offset in walks[0]]
    operands += [Walked(inputs[1], w.dtype, strides, offset * w.dtype.itemsize) for strides, offset in walks[1]]
    total = _tap_sum(len(walks[0]), op, x.dtype.type, x.dtype)
    root, extras = _with_epilogue(op.epilogue, total, len(operands))
    for i in extras:
        value = node.inputs[1 + i]
        strides = tuple(dims.many(extent) * step for extent, step in _aligned(value.shape, out.shape))
        operands.append(Walked(inputs[1 + i], value.dtype, strides))
    call = walk_call(root, operands, Walked(outputs[0], out.dtype, contiguous_strides(out.shape)), out.shape)
    if call is None:
        return False
    if source != inputs[0]:
        lowering.emit(ArrayCall(pad_spatial, op), inputs[:1], (source,))
    lowering.emit(call, (source, *inputs[1:]), outputs)
    return True
