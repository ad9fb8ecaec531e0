"""Convolutions of images channels last: products over windows, plain products where a window is one element, and
direct sums where groups are small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gpu_engine.gpu.conv_kernels import Windows
from gpu_engine.gpu.direct_conv import Layer, emit_direct
from gpu_engine.gpu.epilogues import is_heavy
from gpu_engine.gpu.float8 import FLOAT8
from gpu_engine.gpu.gemm import FEW, K_FIRST, converted, step_of
from gpu_engine.gpu.gemm_kernels import Factor, Product, emit_product
from gpu_engine.gpu.gemm_steps import Step
from gpu_engine.gpu.maps import Walked, emit_copy
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.persistent_gemm import emit_chosen, walking_epilogue
from gpu_engine.gpu.printing import is_printable, is_printable_dtype
from gpu_engine.gpu.tiles import Extents, choose
from gpu_engine.gpu.windows import Axis, Image, never_outside, pitches, valid
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node, Value
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
SMALL_GROUP = 8
"""Channels of a group up to which sums are direct: matrix instructions want 16 at least."""


def layer_of(epilogue: Expr | None, dtype: DType, node: Node, inputs: Buffers, out: int) -> Layer:
    shape = node.outputs[0].shape
    extras = zip(inputs[2:], node.inputs[2:], strict=True)
    operands = tuple(Walked(buffer, broadcast_strides(value.shape, shape)) for buffer, value in extras)
    return Layer(epilogue or expr.arg(0, dtype), dtype, operands, shape, out)


def lower_last_conv(
    options: GpuOptions, lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    """Append the kernels of a convolution; False for types that kernels do not compute and windows of symbolic size."""
    w = node.inputs[1]
    layer = layer_of(op.epilogue, op.accumulate or node.inputs[0].dtype, node, inputs, outputs[0])
    dtypes = [value.dtype for value in node.inputs[:2]]
    if not is_printable(layer.root) or not all(
        is_printable_dtype(dtype) or dtype in FLOAT8 for dtype in (layer.dtype, *dtypes)
    ):
        return False
    if not all(isinstance(extent, int) and extent > 0 for extent in w.shape[2:]):
        return False
    image = conv_image(op, node, inputs[0])
    depth = w.shape[1]
    if op.group > 1 and isinstance(depth, int) and depth <= SMALL_GROUP:
        weights = _packed(lowering, inputs[1], w, op.group, direct=True)
        emit_direct(lowering, image, weights, depth, op.group, layer)
        return True
    step = step_for(options, lowering, layer, inputs[0], converted(lowering, inputs[1], options))
    if step is None:
        return False
    turned = wants_depth_innermost(step)
    weights = converted(lowering, _packed(lowering, inputs[1], w, op.group, turned=turned), options)
    if op.group == 1 and is_dense(op, node):
        return _emit_dense(options, lowering, layer, (inputs[0], weights), depth, step, turned=turned)
    rank = len(layer.shape)
    walked: Walks = ((), tuple(range(rank - 1)), (rank - 1,))
    if op.group > 1:
        layer = layer.parted(rank - 1, dims.floor_div(w.shape[0], op.group))
        walked = ((rank - 1,), tuple(range(rank - 1)), (rank,))
    emit_windows(options, lowering, layer, Windows(image, weights, depth, turned=turned), walked, step)
    return True


Walks = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Chosen = tuple[str, Step]


def conv_image(op: LastConv, node: Node, buffer: int) -> Image:
    x, w, result = node.inputs[0].shape, node.inputs[1].shape, node.outputs[0].shape
    batch, channel, pitch = pitches(x, planar=op.planar)
    extents = x[2:] if op.planar else x[1:-1]
    axes = [
        Axis(extent, step, count, dims.number(kernel), stride, before, dilation, *valid(extent, before, after),
             inside=never_outside(before, after))
        for extent, step, count, kernel, stride, before, after, dilation in zip(
            extents, pitch, result[1:-1], w[2:], op.strides, op.before, op.after, op.dilations, strict=True)
    ]  # fmt: skip
    return Image(buffer, x[0], batch, channel, tuple(axes))


def step_for(
    options: GpuOptions, lowering: Lowering, layer: Layer, image: int, weights: int
) -> Chosen | None:  # fmt: skip
    columns = layer.shape[-1]
    few = isinstance(columns, int) and columns <= FEW
    return step_of(lowering, layer.dtype, (image, weights), options, few=few)


def wants_depth_innermost(step: Chosen) -> bool:
    """Whether matrix instructions want what is summed over innermost in both factors, as all but those for 16 bits."""
    return step[0] in K_FIRST


def is_dense(op: LastConv, node: Node) -> bool:
    """Whether the rows of the image, a pixel each, are those of a matrix."""
    unit = all(extent == 1 for extent in (*node.inputs[1].shape[2:], *op.strides))
    return unit and not op.planar and all(pad == 0 for pad in (*op.before, *op.after))


def _emit_dense(
    options: GpuOptions, lowering: Lowering, layer: Layer, factors: Buffers, depth: Dim, step: Chosen, *, turned: bool
) -> bool:  # fmt: skip
    columns = layer.shape[-1]
    a, b = Factor(factors[0], (), depth, 1), Factor(factors[1], (), *((depth, 1) if turned else (1, columns)))
    rows = dims.product(layer.shape[:-1])
    product = Product(
        a, b, rows, columns, depth, layer.shape, len(layer.shape) - 1,
        layer.root, layer.operands, layer.out, layer.dtype,
    )  # fmt: skip
    nbytes = lowering.buffers[factors[0]].dtype.itemsize
    extents = Extents(1, rows, columns, depth, nbytes)
    persistent = walking_epilogue(lowering, product, step[0], options.arch)
    choices = choose(step[0], extents, options.arch, heavy=is_heavy(layer.root), persistent=persistent)
    emit_chosen(lowering, product, step[1], choices, options.arch)
    return True


def emit_windows(
    options: GpuOptions, lowering: Lowering, layer: Layer, windows: Windows, walked: Walks, step: Chosen
) -> None:  # fmt: skip
    """Launch a product over windows; `walked` are the axes of the result that the batch, rows and columns count."""
    batch, rows, columns = (dims.product(layer.shape[axis] for axis in axes) for axes in walked)
    unused = Factor(windows.weights, (), 0, 0)
    depth = windows.taps * windows.depth
    nbytes = lowering.buffers[windows.image.buffer].dtype.itemsize
    extents = Extents(batch, rows, columns, depth, nbytes)
    for choice in choose(step[0], extents, options.arch, heavy=is_heavy(layer.root), kind="conv"):
        product = Product(
            replace(unused, buffer=windows.image.buffer), unused, rows, columns, windows.steps(choice.tile.block_k),
            layer.shape, 0, layer.root, layer.operands, layer.out, layer.dtype, walked, windows.write_loop, "conv",
        )  # fmt: skip
        emit_product(lowering, product, step[1], choice)


def _packed(
    lowering: Lowering, buffer: int, w: Value, group: int, *, direct: bool = False, turned: bool = False
) -> int:
    """Weights [groups, taps, channels, M of a group] of w [M, channels, kernel...]; [taps, channels, M] if `direct`,
    [groups, M of a group, taps, channels] if `turned`."""
    shape = (group, dims.floor_div(w.shape[0], group), *w.shape[1:])
    kernel = tuple(range(3, len(shape)))
    order = (*kernel, 2, 0, 1) if direct else (0, 1, *kernel, 2) if turned else (0, *kernel, 2, 1)
    return repacked(lowering, buffer, shape, order)


def repacked(lowering: Lowering, buffer: int, shape: Shape, order: Sequence[int]) -> int:
    """A buffer seen as `shape` with its axes in another order: a constant now, else by a copy each time."""
    constant = lowering.buffers[buffer].constant
    if constant is not None:
        return lowering.constant(np.ascontiguousarray(constant.reshape(shape).transpose(order)))
    extents, strides = (tuple(each[axis] for axis in order) for each in (shape, contiguous_strides(shape)))
    result = lowering.buffer(lowering.buffers[buffer].dtype, extents)
    emit_copy(lowering, Walked(buffer, strides), Walked(result, contiguous_strides(extents)), extents)
    return result
