"""Convolutions of int16 with constant weights, channels last: exact sums of pairs of channels in int32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.caches import caches
from cpu_fallback.calls import Native
from cpu_fallback.code import Code
from cpu_fallback.conv_direct import FLAT, PARAMETERS, WINDOWS, write_driver
from cpu_fallback.conv_lowering import COPIES, emit_kernel, geometry_of
from cpu_fallback.conv_tiles import TileShape, tile_shape
from cpu_fallback.conv_weights import depthwise_weights, tile_weights
from cpu_fallback.conv_windows import SLACK
from cpu_fallback.depthwise_driver import window_of
from cpu_fallback.image_lowering import lower_last_conv
from cpu_fallback.integer_conv_tiles import TERMS, define_integer_table
from cpu_fallback.integer_depthwise import IntegerDepthwiseKernel
from cpu_fallback.integer_epilogues import IntegerEpilogue, IntegerFinish, integer_finish
from cpu_fallback.integer_winograd import IntegerWinogradKernel
from cpu_fallback.integer_winograd_choice import best_integer_winograd
from cpu_fallback.integer_winograd_transforms import packed_integers
from cpu_fallback.loops import BLOCK, THREAD, THREADS
from cpu_fallback.native import Target, attributes, host
from cpu_fallback.winograd_driver import room_for
from gpu_engine.ir.dtypes import INT16
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Conv
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.axes import Shape
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
Integers = NDArray[np.int16]


@dataclass(frozen=True)
class IntegerConvKernel:
    """`conv_direct.ConvKernel` for images of pairs of int16, with the same words."""

    source: str
    vectors: tuple[int, ...]
    epilogue: IntegerEpilogue

    def write(self, code: Code, target: Target) -> None:
        name = f"convolve_{self.source.replace(' ', '_')}_{target.vector_nbytes}"
        code.define(name, PARAMETERS, attributes(target), lambda inner: write_driver(inner, target, self.source))
        table = define_integer_table(code, target, self.vectors, self.epilogue)
        code.do(f"call void @{name}({BLOCK}, {THREAD}, {THREADS}, ptr @{table})")


def lower_image_conv(lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A convolution of an image channels last, of integers or of float32."""
    lower = lower_last_conv if op.accumulate is None else emit_integer_conv
    return lower(lowering, op, node, inputs, outputs)


def emit_integer_conv(
    lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers, target: Target | None = None,
    m: int | None = None,
) -> bool:  # fmt: skip
    """Append the step of a convolution of int16 that `integer_images.has_integer_form`; False if it has none. By tiles
    if `m` is 0, by Winograd's F(m x m, 3 x 3) if it is 2 or 4, as is fastest if it is not given."""
    target, weights = target or host(), node.inputs[1].constant
    finish = _finish(op, node, inputs, target)
    if finish is None or weights is None:
        return False
    layer = _Layer(lowering, target, op, node, inputs[0], outputs[0], finish)
    if op.group > 1:
        _emit_depthwise(layer, weights)
    elif is_paired(node.inputs[0].shape, weights.shape, op.group):
        if m is None:
            m = best_integer_winograd(op.form, weights, node.inputs[0].shape, node.outputs[0].shape, target)
        if m:
            _emit_winograd(layer, weights, m)
        else:
            _emit(layer, weights)
    else:
        return False
    return True


def is_paired(x: Sequence[Any], weights: Sequence[int], group: int) -> bool:
    """Whether channels come in pairs."""
    return weights[1] == x[-1] and weights[1] % TERMS == 0 and group == 1 and prod(weights) > 0


def _finish(op: LastConv, node: Node, inputs: Buffers, target: Target) -> IntegerFinish | None:
    extras = [(buffer, value.shape, value.dtype) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    return integer_finish(op.epilogue, extras, node.outputs[0].shape, target)


@dataclass(frozen=True)
class _Layer:
    """A convolution to emit."""

    lowering: Lowering
    target: Target
    op: LastConv
    node: Node
    x: int
    out: int
    finish: IntegerFinish


def _emit(layer: _Layer, weights: Integers) -> None:
    x, out = layer.node.inputs[0].shape, layer.node.outputs[0].shape
    emit_tiles(layer.lowering, layer.target, layer.op.form, (layer.x, x), (layer.out, out), weights, layer.finish)


def emit_tiles(
    lowering: Lowering, target: Target, op: Conv, x: tuple[int, Shape], out: tuple[int, Shape], weights: Integers,
    finish: IntegerFinish,
) -> None:  # fmt: skip
    """Append a convolution of images (buffer, shape [N, spatial..., C]) that `is_paired`, whatever else it is."""
    shape, pairs = tile_shape(target), pair_weights(weights)
    flat = all(extent == 1 for extent in (*pairs.shape[2:], *op.strides)) and not any((*op.before, *op.after))
    geometry = geometry_of(op, pairs.shape, (*x[1][:-1], pairs.shape[1]), out[1])
    packed = lowering.constant(tile_weights(pairs, 1, shape))
    elements = geometry.channels * COPIES if flat else prod(pairs.shape[1:])
    nbytes = shape.rows * elements * 4 + SLACK
    nbytes = -(-(nbytes if flat else max(nbytes, caches().l2)) // 64) * 64
    kernel = IntegerConvKernel(FLAT if flat else WINDOWS, _panel_vectors(pairs.shape[0], shape), finish.epilogue)
    emit_kernel(lowering, kernel, (x[0], packed), Address(out[0]), (nbytes,), geometry, finish.words, finish.buffers)


def _emit_winograd(layer: _Layer, weights: Integers, m: int) -> None:
    """A 3 x 3 convolution of stride 1 by F(m x m, 3 x 3)."""
    shape = tile_shape(layer.target)
    x, out = layer.node.inputs[0].shape, layer.node.outputs[0].shape
    pairs = (weights.shape[0], weights.shape[1] // TERMS, *weights.shape[2:])
    geometry = geometry_of(layer.op.form, pairs, (*x[:-1], pairs[1]), out)
    packed = layer.lowering.constant(packed_integers(weights, m, shape))
    room = room_for(m, pairs[1], pairs[0], shape)
    kernel = IntegerWinogradKernel(m, layer.finish.epilogue)
    place, operands = Address(layer.out), (layer.finish.words, layer.finish.buffers)
    emit_kernel(layer.lowering, kernel, (layer.x, packed), place, room, geometry, *operands)


def _emit_depthwise(layer: _Layer, weights: Integers) -> None:
    """A convolution in as many groups as there are channels and results: see `integer_images.has_integer_form`."""
    op, lowering = layer.op, layer.lowering
    x, out = layer.node.inputs[0].shape, layer.node.outputs[0].shape
    geometry = geometry_of(op.form, weights.shape, x, out)
    channels = weights.shape[0]
    epilogue, real = layer.finish.epilogue.of_floats()
    window = window_of(geometry, channels, tile_shape(layer.target).lanes, finite=True)
    kernel = IntegerDepthwiseKernel(window, epilogue, real)
    packed = lowering.constant(depthwise_weights(weights.astype(np.float32)))
    blank = lowering.constant(np.zeros(window.blank_elements(channels), np.float32))
    addresses = map(Address, (layer.x, packed, blank, layer.out))
    words = (*addresses, caches().l1 // 2, caches().l2 // 2, *geometry, *layer.finish.words)
    lowering.emit(Native(kernel, words), (layer.x, packed, blank, *layer.finish.buffers), (layer.out,))


def pair_weights(weights: Integers) -> NDArray[np.float32]:
    """ONNX's [outputs, channels, kernel...] as [outputs, pairs, kernel...], each pair the bits of a float32."""
    last = np.ascontiguousarray(np.moveaxis(weights, 1, -1)).astype(INT16, copy=False)
    return np.moveaxis(last.view(np.float32), -1, 1)


def _panel_vectors(outputs: int, shape: TileShape) -> tuple[int, ...]:
    """How many vectors the panels of so many results have."""
    starts = range(0, outputs, shape.width)
    return tuple(sorted({-(-min(shape.width, outputs - start) // shape.lanes) for start in starts}))
