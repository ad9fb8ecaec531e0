"""Convolutions: columns and a matrix product; depthwise ones are native maps over their taps.

The columns of as many output rows as fit the cache are made at a time. A 1x1 convolution needs none. This is the door
for native kernels, as in linear.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.copies import copy_inside, fill_borders
from cpu_fallback.linear import finish, product_buffer
from cpu_fallback.taps import lower_depthwise
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Conv, ConvTranspose
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
COLUMNS = 1 << 18
"""Elements of the column buffer: 1 MiB of float32, half of a common second-level cache."""


def lower_conv(lowering: Lowering, op: Conv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, w = node.inputs[:2]
    if not _supported(node):
        return False
    if lower_depthwise(lowering, op, node, inputs, outputs):
        return True
    shape = node.outputs[0].shape
    product = product_buffer(lowering, op.epilogue, x.dtype, shape, outputs[0])
    if _is_pointwise(op, w.shape):
        lowering.emit(ArrayCall(convolve_pointwise, op), inputs[:2], (product,))
    else:
        padded = tuple(a + extent + b for a, extent, b in zip(op.before, x.shape[2:], op.after, strict=True))
        row = dims.product((w.shape[1] * op.group, *w.shape[2:], *shape[3:]))
        count = dims.maximum(dims.minimum(row * shape[2], COLUMNS), row)
        scratch = (lowering.buffer(x.dtype, (x.shape[1], *padded)), lowering.buffer(x.dtype, (count,)))
        lowering.emit(ArrayCall(convolve, op), inputs[:2], (product,), scratch=scratch)
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    finish(lowering, op.epilogue, product, extras, outputs[0], shape)
    return True


def _supported(node: Node) -> bool:
    x, w = node.inputs[:2]
    return x.dtype in (FLOAT32, FLOAT64) and x.dtype == w.dtype and all(isinstance(e, int) for e in w.shape)


def _is_pointwise(op: Conv, kernel: tuple[dims.Dim, ...]) -> bool:
    unit = all(extent == 1 for extent in (*kernel[2:], *op.strides))
    return unit and op.group == 1 and all(pad == 0 for pad in (*op.before, *op.after))


def convolve_pointwise(op: Conv, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    """Every position's channels times the weights."""
    x, w, out = *inputs, outputs[0]
    count = math.prod(x.shape[2:])
    np.matmul(
        w.reshape(w.shape[0], -1), x.reshape(*x.shape[:2], count), out=out.reshape(*out.shape[:2], count)
    )  # fmt: skip


def convolve(op: Conv, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
    """Some output rows at a time: their columns, then a product with the weights of every group."""
    x, w, out = *inputs, outputs[0]
    padded, columns = scratch
    if out.size == 0 or w.size == 0:
        out[...] = 0
        return
    before, after = ([0, *map(int, side)] for side in (op.before, op.after))  # type: ignore[arg-type]
    grown = any(before) or any(after)
    if grown:
        fill_borders(padded, before, after, 0)
    weights = w.reshape(op.group, w.shape[0] // op.group, -1)
    for image, result in zip(x, out, strict=True):
        if grown:
            copy_inside(image, padded, before, after)
        windows = _windows(op, padded if grown else image, w.shape[2:], out.shape[2:])
        _convolve_image(weights, windows, columns, result, len(w.shape) - 1)


def _windows(op: Conv, x: Array, kernel: tuple[int, ...], counts: tuple[int, ...]) -> Array:
    """[C, kernel..., windows...] as a view of a padded image."""
    steps = x.strides[1:]
    strides = (
        x.strides[0],
        *(a * b for a, b in zip(steps, op.dilations, strict=True)),
        *(a * b for a, b in zip(steps, op.strides, strict=True)),
    )
    return np.lib.stride_tricks.as_strided(x, (x.shape[0], *kernel, *counts), strides)


def _convolve_image(weights: Array, windows: Array, columns: Array, out: Array, axis: int) -> None:
    """`axis` is the first window axis of `windows`."""
    group, channels, depth = weights.shape
    height, row = windows.shape[axis], math.prod(windows.shape[axis + 1 :])
    rows = min(height, max(1, columns.size // (group * depth * row)))
    result = out.reshape(group, channels, height * row)
    for start in range(0, height, rows):
        part = windows[(slice(None),) * axis + (slice(start, start + rows),)]
        some = columns[: part.size].reshape(part.shape)
        np.copyto(some, part)
        stop = min(start + rows, height)
        target = result[:, :, start * row : stop * row]
        if group == 1:
            np.matmul(weights[0], some.reshape(depth, -1), out=target[0])
        else:
            np.matmul(weights, some.reshape(group, depth, -1), out=target)


def lower_conv_transpose(lowering: Lowering, op: ConvTranspose, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, w = node.inputs[:2]
    if not _supported(node):
        return False
    shape = node.outputs[0].shape
    product = product_buffer(lowering, op.epilogue, x.dtype, shape, outputs[0])
    taps = lowering.buffer(x.dtype, (dims.product((*w.shape[1:], op.group, *x.shape[2:])),))
    lowering.emit(ArrayCall(convolve_transposed, op), inputs[:2], (product,), scratch=(taps,))
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    finish(lowering, op.epilogue, product, extras, outputs[0], shape)
    return True


def convolve_transposed(
    op: ConvTranspose, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]
) -> None:
    """All taps of an image by one product, then every tap added where it belongs."""
    x, w, out = *inputs, outputs[0]
    channels, kernel, spatial = w.shape[0] // op.group, w.shape[2:], x.shape[2:]
    weights = w.reshape(op.group, channels, -1).swapaxes(-1, -2)
    out[...] = 0
    if not x.size or not w.size:
        return
    places = [_tap_places(op, tap, spatial, out.shape[2:]) for tap in np.ndindex(*kernel)]
    for image, result in zip(x, out, strict=True):
        taps = scratch[0].reshape(op.group, weights.shape[1], -1)
        np.matmul(weights, image.reshape(op.group, channels, -1), out=taps)
        each = taps.reshape(out.shape[1], -1, *spatial)
        for i, (source, target) in enumerate(places):
            result[(slice(None), *target)] += each[(slice(None), i, *source)]


def _tap_places(op: ConvTranspose, tap: tuple[int, ...], spatial: tuple[int, ...], full: tuple[int, ...]) -> Any:
    """(which inputs of this tap land inside the output, where)."""
    source, target = [], []
    for i, k in enumerate(tap):
        shift = k * op.dilations[i] - int(op.before[i])  # type: ignore[arg-type]
        stride = op.strides[i]
        first = max(0, -(shift // stride))
        last = min(spatial[i], (full[i] - 1 - shift) // stride + 1)
        count = max(0, last - first)
        start = first * stride + shift
        source.append(slice(first, first + count))
        target.append(slice(start, start + (count - 1) * stride + 1, stride) if count else slice(0, 0))
    return tuple(source), tuple(target)
