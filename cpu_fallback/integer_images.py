"""Images of int16 channels last: which convolutions take them, and channels in pairs."""

from __future__ import annotations

import numpy as np

from cpu_fallback.conv_lowering import AXES
from cpu_fallback.depthwise_driver import ROWS
from cpu_fallback.integer_planes import PairedPlanes, has_planes_form
from cpu_fallback.native import Target
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import INT8, INT16, INT32, UINT8
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Conv, Map, Pad

PAIR = 2
CENTRED = 255
"""The greatest magnitude of a byte less another."""
EXACT = 2**24


def has_integer_form(op: Conv, x: Value, w: Value, target: Target) -> bool:
    """Whether kernels of `integer_conv` compute this convolution."""
    known = w.constant is not None and w.constant.size > 0 and target.x86
    narrow = x.dtype == w.dtype == INT16 and op.accumulate == INT32
    fits = narrow and isinstance(x.shape[1], int) and 0 < len(op.strides) <= AXES
    return known and fits and ((op.group == 1 and x.shape[1] == w.shape[1]) or _is_depthwise(op, x, w))


def _is_depthwise(op: Conv, x: Value, w: Value) -> bool:
    """Every channel on its own, over at most two axes, in windows that the kernel has room to list the rows of, and
    with sums that float32 holds: elements of x are centred bytes."""
    rank, weights = len(op.strides), w.constant
    if rank > 2 or weights is None or weights.shape[1] != 1 or not op.group == weights.shape[0] == x.shape[1]:
        return False
    high = (weights.shape[2] - 1) * op.dilations[0] + 1 + op.strides[0] if rank == 2 else 1
    return high <= ROWS and is_exact_in_floats(x, w)


def is_exact_in_floats(x: Value, w: Value) -> bool:
    """Whether float32 holds all sums of products of bytes, perhaps centred, with these weights."""
    if w.constant is None or not w.constant.size or x.dtype not in (INT8, UINT8, INT16):
        return False
    sums = np.abs(w.constant.reshape(len(w.constant), -1).astype(np.int64)).sum(axis=1)
    return int(sums.max()) * CENTRED < EXACT


def paired_planes(x: Value, builder: Builder, target: Target) -> Value | None:
    """An image of a few planes, channels last and an even number of them; None if it has more, or lies otherwise."""
    made = builder.producer(x)
    root, source = expr.arg(0, x.dtype), x
    if made is not None and isinstance(made.op, Map) and len(made.inputs) == 1 and made.inputs[0].shape == x.shape:
        root, source = made.op.expr, made.inputs[0]
    return builder.emit(PairedPlanes(root), source) if has_planes_form(source.shape, root, target) else None


def paired_channels(x: Value, w: Value, builder: Builder) -> tuple[Value, Value]:
    """An image channels last and weights with an even number of channels, the last of them zero if need be."""
    assert w.constant is not None
    channels = x.shape[-1]
    assert isinstance(channels, int)
    if w.shape[1] == 1 != channels or (w.shape[1] == channels and channels % PAIR == 0):
        return x, w
    none = (0,) * (x.rank - 1)
    missing = w.constant.shape[1] % PAIR
    weights = np.pad(w.constant, [(0, 0), (0, missing), *[(0, 0)] * (w.rank - 2)])
    image = builder.emit(Pad((*none, 0), (*none, 1)), x) if channels % PAIR else x
    return image, builder.constant(weights)
