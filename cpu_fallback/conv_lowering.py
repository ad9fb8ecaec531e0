"""Convolutions of float32 with constant weights, channels last: which kernel, packed weights, argument words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.caches import caches
from cpu_fallback.calls import Address, Native
from cpu_fallback.conv_depthwise import DepthwiseKernel
from cpu_fallback.conv_direct import IN_PLACE, PLANAR, WINDOWS, ConvKernel
from cpu_fallback.conv_tiles import TileShape, tile_shape
from cpu_fallback.conv_windows import SLACK, Geometry
from cpu_fallback.conv_winograd import WinogradKernel, points, scratch_nbytes, transformed_weights
from cpu_fallback.cores import usable_cores
from cpu_fallback.epilogues import Epilogue
from cpu_fallback.native import Target
from cpu_fallback.pages import PAGES
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import UINT8
from gpu_engine.ir.ops import Conv
from gpu_engine.plan.lower import Lowering

Shape = tuple[Dim, ...]
Floats = NDArray[np.float32]
AXES = 3
SCRATCH = 512 << 10
"""Bytes of windows for a thread: what the second cache has room for beside weights."""
LONGEST_RUN = 8
"""Kernel columns up to which planar windows get code of their own."""
SLOTS = 16
"""No more threads than this share a convolution."""


class Operand(NamedTuple):
    """A buffer and its shape, channels last."""

    buffer: int
    shape: Shape


def emit_direct(
    lowering: Lowering,
    op: Conv,
    weights: Floats,
    x: Operand,
    out: Operand,
    extras: Sequence[Operand],
    epilogue: Epilogue,
    target: Target,
    *,
    planar: bool = False,
) -> None:
    """The convolution `op` without Winograd; `weights` are ONNX's, x is [N, C, ...] if `planar`."""
    source = PLANAR if planar else IN_PLACE if _is_pointwise(op, weights.shape[2:]) else WINDOWS
    geometry = geometry_of(op, weights.shape, x.shape, out.shape, planar=planar)
    shape = tile_shape(target)
    packed = lowering.constant(packed_weights(weights, op.group, shape, planar=planar))
    run = weights.shape[-1] if planar and weights.shape[-1] <= LONGEST_RUN else 0
    nbytes = _scratch_nbytes(source, shape, weights.shape, op.group)
    scratch, slots = thread_scratch(lowering, nbytes)
    buffers = (x.buffer, packed, out.buffer, *(extra.buffer for extra in extras), scratch)
    words = (*map(Address, buffers), nbytes, slots, *geometry)
    inputs = (x.buffer, packed, *(extra.buffer for extra in extras))
    lowering.emit(Native(ConvKernel(source, run, epilogue), words), inputs, (out.buffer,), scratch=(scratch,))


def emit_winograd(
    lowering: Lowering,
    op: Conv,
    weights: Floats,
    x: Operand,
    out: Operand,
    extras: Sequence[Operand],
    epilogue: Epilogue,
    target: Target,
    m: int,
) -> None:
    """The 3 x 3 convolution `op` of stride 1 by F(m x m, 3 x 3); it has at least as many channels as a vector lanes."""
    shape = tile_shape(target)
    geometry = geometry_of(op, weights.shape, x.shape, out.shape)
    cut = [panels(matrix, shape) for matrix in transformed_weights(weights, m)]
    packed = lowering.constant(aligned(np.concatenate([part.ravel() for panel in zip(*cut, strict=True) for part in panel])))
    nbytes = -(-scratch_nbytes(m, weights.shape[1], shape, caches().l2 // 2) // 64) * 64
    scratch, slots = thread_scratch(lowering, nbytes)
    buffers = (x.buffer, packed, out.buffer, *(extra.buffer for extra in extras), scratch)
    words = (*map(Address, buffers), nbytes, slots, *geometry)
    inputs = (x.buffer, packed, *(extra.buffer for extra in extras))
    lowering.emit(Native(WinogradKernel(m, epilogue), words), inputs, (out.buffer,), scratch=(scratch,))


def emit_depthwise(
    lowering: Lowering,
    op: Conv,
    weights: Floats,
    x: Operand,
    out: Operand,
    extras: Sequence[Operand],
    epilogue: Epilogue,
    target: Target,
) -> None:
    """The convolution `op` over one or two axes, in as many groups as there are channels and results."""
    geometry = geometry_of(op, weights.shape, x.shape, out.shape)
    channels = weights.shape[0]
    packed = lowering.constant(aligned(weights.reshape(channels, -1).T))
    lanes = min(target.vector_nbytes // 4, 1 << (channels.bit_length() - 1))
    rows = 1 if geometry.out_h == 1 else 2
    height = geometry.kernel_h if geometry.kernel_h <= 3 else 0
    kernel = DepthwiseKernel(weights.shape[-1], height, op.dilations[-1], op.strides[-1], rows, lanes, epilogue)
    blank = lowering.constant(aligned(np.zeros(kernel.blank_elements(channels))))
    buffers = (x.buffer, packed, blank, out.buffer, *(extra.buffer for extra in extras))
    words = (*map(Address, buffers), caches().l1 // 2, caches().l2 // 2, *geometry)
    inputs = (x.buffer, packed, blank, *(extra.buffer for extra in extras))
    lowering.emit(Native(kernel, words), inputs, (out.buffer,))


def thread_scratch(lowering: Lowering, nbytes: int) -> tuple[int, int]:
    """(a buffer of `nbytes` for every thread, how many threads that are)."""
    slots = min(SLOTS, len(usable_cores().numbers))
    return lowering.buffer(UINT8, (slots * nbytes,)), slots


def _scratch_nbytes(source: str, shape: TileShape, weights: Sequence[int], group: int) -> int:
    """Room for the windows of a tile at least, a multiple of a cache line."""
    elements = weights[1] * group if source == IN_PLACE else int(np.prod(weights[1:]))
    nbytes = shape.rows * elements * 4 + SLACK
    return -(-(nbytes if source == IN_PLACE else max(nbytes, SCRATCH)) // 64) * 64


def _is_pointwise(op: Conv, kernel: Sequence[int]) -> bool:
    unit = all(extent == 1 for extent in (*kernel, *op.strides))
    return unit and all(pad == 0 for pad in (*op.before, *op.after))


def geometry_of(op: Conv, weights: Sequence[int], x: Shape, out: Shape, *, planar: bool = False) -> Geometry:
    """What kernels ask for; missing axes in front have extent 1."""
    missing = AXES - len(op.strides)
    spatial = (x[2:] if planar else x[1:-1]), out[1:-1], weights[2:], op.strides, op.dilations
    inside, outside, kernel, strides, dilations = ((1,) * missing + tuple(axis) for axis in spatial)
    pads = (0,) * missing + op.before
    return Geometry(
        dims.product(out[:-1]),
        *outside,
        *inside,
        *kernel,
        *strides,
        *dilations,
        *(dims.maximum(pad, 0) for pad in pads),
        *(dims.maximum(-pad, 0) for pad in pads),
        *(1, 1, 1),
        *outside,
        x[1] if planar else x[-1],
        weights[1],
        op.group,
        weights[0],
        weights[0] // op.group,
    )


def packed_weights(weights: Floats, group: int, shape: TileShape, *, planar: bool = False) -> Floats:
    """For every group panels of the channels in as many vectors as they need, [depth, width] each, aligned.

    The depth goes as windows do: kernel then channels, or channels then kernel if `planar`.
    """
    outputs, channels, *kernel = weights.shape
    rank = len(kernel)
    parts = weights.reshape(group, outputs // group, channels, *kernel)
    order = (0, 2, *range(3, 3 + rank), 1) if planar else (0, *range(3, 3 + rank), 2, 1)
    matrices = parts.transpose(order).reshape(group, -1, outputs // group)
    return aligned(np.concatenate([part.ravel() for matrix in matrices for part in panels(matrix, shape)]))


def panels(matrix: Floats, shape: TileShape) -> list[Floats]:
    """[depth, channels] cut into panels, the last one padded to whole vectors."""
    found = []
    for start in range(0, matrix.shape[1], shape.width):
        part = matrix[:, start : start + shape.width]
        width = shape.panel_width(part.shape[1])
        found.append(np.pad(part, ((0, 0), (0, width - part.shape[1]))))
    return found


def aligned(array: Any) -> Floats:
    """A float32 copy that starts on a cache line, in large pages."""
    result: Floats = PAGES.zeros(array.shape, np.float32)
    result[...] = array
    return result
