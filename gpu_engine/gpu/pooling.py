"""Pools: lanes are channels, or windows of images channels first, and taps are folded one by one."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from gpu_engine.gpu.direct_conv import UNROLLED, tile_extents, write_tile
from gpu_engine.gpu.printing import NAN, computing, is_printable_dtype, literal
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.windows import Axis, Image, Walked, never_outside, pitches, scaled, sum_of, valid, walk
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, DType, is_float, limits
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Pool
from gpu_engine.ir.ops.channels_last import LastPool
from gpu_engine.plan.axes import Shape
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


def lower_pool(lowering: Lowering, op: Pool, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """Every channel of every image is an image of its own."""
    x, result = node.inputs[0].shape, node.outputs[0].shape
    image = replace(_image(op, inputs[0], x, result[2:], planar=True), batch=dims.product(x[:2]), channel_pitch=0)
    image = replace(image, batch_pitch=dims.product(x[2:]))
    return _emit(lowering, op, image, 1, outputs[0], node)


def lower_last_pool(lowering: Lowering, op: LastPool, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, result = node.inputs[0].shape, node.outputs[0].shape
    image = _image(op.form, inputs[0], x, result[1:-1], planar=False)
    return _emit(lowering, op.form, image, x[-1], outputs[0], node)


def _image(op: Pool, buffer: int, x: Shape, counts: Shape, *, planar: bool) -> Image:
    batch, channel, pitch = pitches(x, planar=planar)
    axes = [
        Axis(extent, step, count, kernel, stride, before, dilation, *valid(extent, before, after),
             inside=never_outside(before, after) and not op.ceil_mode)
        for extent, step, count, kernel, stride, before, after, dilation in zip(
            x[2:] if planar else x[1:-1], pitch, counts, op.kernel, op.strides, op.before, op.after, op.dilations,
            strict=True)
    ]  # fmt: skip
    return Image(buffer, x[0], batch, channel, tuple(axes))


def _emit(lowering: Lowering, op: Pool, image: Image, channels: Dim, out: int, node: Node) -> bool:
    """False for types that kernels do not fold, and for averages of integers."""
    dtype = node.inputs[0].dtype
    if not is_printable_dtype(dtype) or dtype == BOOL or not (is_float(dtype) or op.kind != "average"):
        return False
    text = KernelText(lowering, f"pool_{op.kind}")
    rows = dims.product(image.counts)
    height, width = tile_extents(rows, channels, dtype.itemsize)
    programs = write_tile(text, rows, channels, height, width)
    walked = walk(text, image, "rows")
    first = np.asarray(_first(op, dtype), dtype)
    text.line(f"sums = tl.full(({height}, {width}), 0, {computing(dtype)}) + {literal(first, dtype)}")
    taps = prod(op.kernel)
    with text.block(f"for tap in {'tl.static_range' if taps <= UNROLLED else 'range'}({taps}):"):
        terms, masks = walked.tap(text, "tap")
        lanes = sum_of(scaled(text, "columns", image.channel_pitch))
        at = f"({walked.place} + {terms})[:, None]" + (f" + ({lanes})[None, :]" if lanes != "0" else "")
        there = " & ".join(["inside", *(f"({mask})[:, None]" for mask in masks)])
        raw = text.load(image.buffer, f"{at} + tl.zeros(({height}, {width}), tl.int32)", there, "0")
        x = text.let("x", f"tl.where({there}, {raw}, {literal(first, dtype)})")
        text.line(f"sums = {_folded(op, dtype, x)}")
    if op.kind == "average":
        text.line(f"sums = {_quotient(text, op, walked, node, computing(dtype))}")
    at = f"rows[:, None] * {text.number(channels)} + columns[None, :]"
    text.store(out, at, "sums", "inside")
    text.launch([programs], (image.buffer,), (out,))
    return True


def _first(op: Pool, dtype: DType) -> float | int:
    if op.kind != "max":
        return 0
    return -np.inf if is_float(dtype) else int(limits(dtype)[0])


def _folded(op: Pool, dtype: DType, x: str) -> str:
    if op.kind != "max":
        return f"(sums + {x}).to({computing(dtype)})"
    return f"tl.maximum(sums, {x}, {NAN})" if is_float(dtype) else f"tl.maximum(sums, {x})"


def _quotient(text: KernelText, op: Pool, walked: Walked, node: Node, kind: str) -> str:
    """The sums over how many elements of a window count, 1 at least."""
    counts = [
        _count(text, op, i, axis, origin)
        for i, (axis, origin) in enumerate(zip(walked.image.axes, walked.origins, strict=True))
    ]
    size = text.let("size", " * ".join(f"({count})" for count in counts))
    divide = "sums / {}" if kind == "tl.float64" else "tl.div_rn(sums, {})"
    divisor = f"(tl.maximum({size}, 1) + tl.zeros_like(rows))[:, None].to({kind})"
    return divide.format(f"tl.broadcast_to({divisor}, sums.shape)")


def _count(text: KernelText, op: Pool, i: int, axis: Axis, origin: str) -> str:
    """How many taps of an axis lie inside."""
    if axis.inside:
        return str(axis.taps)
    before, after = op.before[i], op.after[i]
    low, high = (-before, axis.extent + after) if op.count_include_pad else (axis.low, axis.high)
    ends = [_taps_before(text, axis, origin, bound) for bound in (high, low)]
    return f"tl.maximum({ends[0]} - {ends[1]}, 0)"


def _taps_before(text: KernelText, axis: Axis, origin: str, bound: Dim) -> str:
    """How many taps lie before an element."""
    reach = f"tl.maximum({text.number(bound)} - {origin}, 0)"
    return f"tl.minimum(({reach} + {axis.step - 1}) // {axis.step}, {axis.taps})"
