"""Convolutions of float32 with constant weights, channels last: which kernel, which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np

from cpu_fallback.caches import caches
from cpu_fallback.calls import Native
from cpu_fallback.conv_choice import best_winograd
from cpu_fallback.conv_depthwise import DepthwiseKernel
from cpu_fallback.conv_direct import FLAT, GATED, IN_PLACE, PLANAR, WINDOWS, ConvKernel
from cpu_fallback.conv_tiles import TileShape, tile_shape
from cpu_fallback.conv_tiling import FIRST_NBYTES, LEAST
from cpu_fallback.conv_weights import Floats, aligned, depthwise_weights, is_balanced, tile_weights, winograd_weights
from cpu_fallback.conv_windows import SLACK, Geometry
from cpu_fallback.conv_winograd import WinogradKernel
from cpu_fallback.cores import usable_cores
from cpu_fallback.depthwise_driver import ROWS, window_of
from cpu_fallback.epilogues import Finish
from cpu_fallback.native import Target
from cpu_fallback.winograd_driver import room_for
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import UINT8
from gpu_engine.ir.ops import Conv, ConvTranspose
from gpu_engine.plan.axes import Shape
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word

AXES, LONGEST_AXIS = 3, 1 << 31
COPIES = 3
"""Tiles that would read behind the image at the end of rows of at least half a tile."""
LONGEST_RUN = 8
"""Kernel columns up to which planar windows get code of their own."""


class Operand(NamedTuple):
    """A buffer and its shape, channels last."""

    buffer: int
    shape: Shape


@dataclass(frozen=True)
class Layer:
    """A convolution to emit: from `x` to `out`, then `finish`. `planar`: x is [N, C, spatial...] after all."""

    lowering: Lowering
    target: Target
    x: Operand
    out: Operand
    finish: Finish
    planar: bool = False

    @property
    def shape(self) -> TileShape:
        return tile_shape(self.target)


def emit_conv(layer: Layer, op: Conv, weights: Floats) -> None:
    """The fastest form of `op`; `weights` are ONNX's."""
    if _is_depthwise(layer, op, weights.shape):
        emit_depthwise(layer, op, weights)
        return
    m = 0 if layer.planar else best_winograd(op, weights.shape, layer.x.shape, layer.out.shape, layer.target)
    if m and is_balanced(weights):
        emit_winograd(layer, op, weights, m)
    else:
        emit_direct(layer, op, weights)


def emit_direct(layer: Layer, op: Conv, weights: Floats) -> None:
    """By tiles, whatever `op` is."""
    unit = all(extent == 1 for extent in (*weights.shape[2:], *op.strides)) and not any((*op.before, *op.after))
    source = PLANAR if layer.planar else FLAT if unit else WINDOWS
    geometry = geometry_of(op, weights.shape, layer.x.shape, layer.out.shape, planar=layer.planar)
    _emit_tiles(layer, source, op.group, weights, geometry)


def _emit_tiles(layer: Layer, source: str, group: int, weights: Floats, geometry: Geometry, offset: Dim = 0) -> None:
    """`offset` in bytes is where the first result lies."""
    packed = layer.lowering.constant(tile_weights(weights, group, layer.shape, planar=layer.planar))
    run = weights.shape[-1] if layer.planar and weights.shape[-1] <= LONGEST_RUN else 0
    in_place = source in (FLAT, IN_PLACE)
    elements = geometry.channels * COPIES if in_place else prod(weights.shape[1:])
    nbytes = layer.shape.rows * elements * 4 + SLACK
    nbytes = nbytes if in_place else max(nbytes, caches().l2)
    kernel = ConvKernel(source, run, panel_vectors(geometry.group_outputs, layer.shape), layer.finish.epilogue)
    _emit(layer, kernel, packed, offset, (_lines(nbytes),), geometry)


def emit_gated(layer: Layer, op: Conv, weights: Floats, gate: int) -> None:
    """A 1x1 convolution without strides and pads, over two axes, of the image times `gate`, [N, 1, 1, C]."""
    packed = layer.lowering.constant(tile_weights(weights, 1, layer.shape))
    geometry = geometry_of(op, weights.shape, layer.x.shape, layer.out.shape)
    vectors, finish = panel_vectors(weights.shape[0], layer.shape), layer.finish
    kernel = ConvKernel(GATED, 0, vectors, finish.epilogue)
    nbytes = max(FIRST_NBYTES, LEAST * 4 * layer.shape.rows * weights.shape[1])
    operands, buffers = (Address(gate), *finish.words), (gate, *finish.buffers)
    inputs, out = (layer.x.buffer, packed), Address(layer.out.buffer)
    emit_kernel(layer.lowering, kernel, inputs, out, (_lines(nbytes),), geometry, operands, buffers)


def panel_vectors(outputs: int, shape: TileShape) -> tuple[int, ...]:
    """How many vectors the panels of so many results have."""
    return tuple(
        sorted({-(-min(shape.width, outputs - start) // shape.lanes) for start in range(0, outputs, shape.width)})
    )


def emit_winograd(layer: Layer, op: Conv, weights: Floats, m: int) -> None:
    """A 3 x 3 convolution of stride 1 by F(m x m, 3 x 3); it has at least as many channels as a vector lanes."""
    geometry = geometry_of(op, weights.shape, layer.x.shape, layer.out.shape)
    packed = layer.lowering.constant(winograd_weights(weights, m, layer.shape))
    room = room_for(m, weights.shape[1], weights.shape[0], layer.shape)
    _emit(layer, WinogradKernel(m, layer.finish.epilogue), packed, 0, room, geometry)


def _emit(
    layer: Layer, kernel: Any, packed: int, offset: Dim, room: Sequence[int], geometry: Geometry
) -> None:  # fmt: skip
    """See `emit_kernel`."""
    finish = layer.finish
    operands = finish.shifted(offset), finish.buffers
    emit_kernel(
        layer.lowering, kernel, (layer.x.buffer, packed), Address(layer.out.buffer, offset), room, geometry, *operands
    )


def emit_kernel(
    lowering: Lowering, kernel: Any, inputs: tuple[int, int], out: Address, room: Sequence[int], geometry: Geometry,
    operands: Sequence[Word], buffers: Sequence[int],
) -> None:  # fmt: skip
    """Append the step of a convolution of the image and the packed weights `inputs`; `room` begins with the bytes of
    scratch for a thread, `operands` are the epilogue's words and `buffers` what they read."""
    scratch = lowering.buffer(UINT8, (thread_limit() * room[0],))
    addresses = (*map(Address, inputs), out, Address(scratch))
    words = (*addresses, *room, thread_limit(), *geometry, *operands)
    lowering.emit(Native(kernel, words), (*inputs, *buffers), (out.buffer,), scratch=(scratch,))


@lru_cache(maxsize=1)
def thread_limit() -> int:
    """No stream has more threads than these."""
    return len(usable_cores().numbers)


def _lines(nbytes: int) -> int:
    """Whole cache lines."""
    return -(-nbytes // 64) * 64


def _is_depthwise(layer: Layer, op: Conv, weights: Sequence[int]) -> bool:
    """Every channel on its own, over at most two axes, in windows that the kernel has room to list the rows of."""
    rank = len(op.strides)
    if layer.planar or rank > 2 or weights[1] != 1 or op.group != weights[0]:
        return False
    high = (weights[2] - 1) * op.dilations[0] + 1 + op.strides[0] if rank == 2 else 1
    return high <= ROWS


def emit_depthwise(layer: Layer, op: Conv, weights: Floats) -> None:
    """A convolution over one or two axes in as many groups as there are channels and results."""
    lowering, finish = layer.lowering, layer.finish
    geometry = geometry_of(op, weights.shape, layer.x.shape, layer.out.shape)
    channels = weights.shape[0]
    window = window_of(geometry, channels, layer.shape.lanes, finite=bool(np.isfinite(weights).all()))
    kernel = DepthwiseKernel(window, finish.epilogue)
    packed = lowering.constant(depthwise_weights(weights))
    blank = lowering.constant(aligned(np.zeros(window.blank_elements(channels))))
    addresses = map(Address, (layer.x.buffer, packed, blank, layer.out.buffer))
    words = (*addresses, caches().l1 // 2, caches().l2 // 2, *geometry, *finish.words)
    lowering.emit(Native(kernel, words), (layer.x.buffer, packed, blank, *finish.buffers), (layer.out.buffer,))


def emit_transposed(layer: Layer, op: ConvTranspose, weights: Floats) -> None:
    """A transposed convolution that `has_phases`: each residue of the results' places modulo the strides is an ordinary
    convolution with some of the taps."""
    inside, outside = layer.x.shape[1:-1], layer.out.shape[1:-1]
    channels, outputs, *kernel = weights.shape
    by_group = weights.reshape(op.group, channels // op.group, outputs, *kernel)
    ordinary = np.moveaxis(by_group, 2, 1).reshape(op.group * outputs, channels // op.group, *kernel)
    for residues in product(*map(range, op.strides)):
        phases = [_phase(op, kernel, axis, residue) for axis, residue in enumerate(residues)]
        taps = np.ix_(range(ordinary.shape[0]), range(ordinary.shape[1]), *(phase.taps for phase in phases))
        part = Conv(
            (1,) * len(kernel), tuple(phase.before for phase in phases), (0,) * len(kernel),
            tuple(phase.dilation for phase in phases), op.group,
        )  # fmt: skip
        counts = tuple(
            dims.ceil_div(extent - residue, stride)
            for extent, residue, stride in zip(outside, residues, op.strides, strict=True)
        )
        first: Dim = 0
        for extent, residue in zip(outside, residues, strict=True):
            first = first * extent + residue
        chosen = np.ascontiguousarray(ordinary[taps])
        shape = (layer.out.shape[0], *counts, layer.out.shape[-1])
        geometry = geometry_of(part, chosen.shape, layer.x.shape, shape, steps=op.strides, full=outside)
        place = all(len(phase.taps) == 1 and phase.before == 0 for phase in phases)
        fits = all(_at_most(count, extent) for count, extent in zip(counts, inside, strict=True))
        source = IN_PLACE if place and fits else WINDOWS
        _emit_tiles(layer, source, op.group, chosen, geometry, first * (4 * layer.out.shape[-1]))


class _Phase(NamedTuple):
    """Along one axis: the taps that reach results of one residue, in the order of the inputs they read."""

    taps: list[int]
    before: int
    dilation: int


def _phase(op: ConvTranspose, kernel: Sequence[int], axis: int, residue: int) -> _Phase:
    stride, dilation, before = op.strides[axis], op.dilations[axis], dims.number(op.before[axis])
    taps = [k for k in range(kernel[axis]) if (residue + before - k * dilation) % stride == 0][::-1]
    first = (residue + before - taps[0] * dilation) // stride if taps else 0
    return _Phase(taps, -first, dilation // gcd(stride, dilation))


def has_phases(op: ConvTranspose, kernel: Sequence[int]) -> bool:
    """Whether `emit_transposed` knows how: pads are numbers, and every result has a tap."""
    fewer = any(stride > extent for stride, extent in zip(op.strides, kernel, strict=True))
    if fewer or not all(isinstance(pad, int) for pad in op.before):
        return False
    phases = [
        _phase(op, kernel, axis, residue) for axis, stride in enumerate(op.strides) for residue in range(stride)
    ]  # fmt: skip
    return all(phase.taps and phase.dilation == 1 for phase in phases)


def _at_most(count: Dim, extent: Dim) -> bool:
    try:
        return dims.less_equal(count, extent)
    except dims.Undecided:
        return False


def geometry_of(
    op: Conv, weights: Sequence[int], x: Shape, out: Shape, *, planar: bool = False,
    steps: Sequence[int] | None = None, full: Shape | None = None,
) -> Geometry:  # fmt: skip
    """What kernels ask for; missing axes in front have extent 1. Results lie `steps` apart in a tensor of `full`
    extents."""
    missing = AXES - len(op.strides)
    ones: Shape = (1,) * missing
    spatial = (x[2:] if planar else x[1:-1]), out[1:-1], tuple(weights[2:]), op.strides, op.dilations
    inside, outside, kernel, strides, dilations = (ones + tuple(axis) for axis in spatial)
    strides = tuple(_step(stride, extent) for stride, extent in zip(strides, outside, strict=True))
    dilations = tuple(_step(dilation, extent) for dilation, extent in zip(dilations, kernel, strict=True))
    pads = (0,) * missing + op.before
    words = (
        dims.product(out[:-1]),
        *outside,
        *inside,
        *kernel,
        *strides,
        *dilations,
        *(dims.maximum(pad, 0) for pad in pads),
        *(dims.maximum(-pad, 0) for pad in pads),
        *(ones + tuple(steps or (1,) * len(op.strides))),
        *(ones + tuple(full or out[1:-1])),
        x[1] if planar else x[-1],
        weights[1],
        op.group,
        weights[0],
        weights[0] // op.group,
    )
    return Geometry._make(words)


def _step(step: Any, count: Dim) -> Any:
    """A stride or dilation over `count` places. One alone takes no step, and none is longer than any axis: else offsets
    would not fit 64 bits."""
    return 1 if count == 1 else min(step, LONGEST_AXIS)
