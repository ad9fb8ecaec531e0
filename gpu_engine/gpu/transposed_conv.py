"""Transposed convolutions as convolutions: one for every phase of the strides, each with the taps that reach it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from gpu_engine.gpu.conv import Walks, emit_windows, layer_of, step_for, wants_depth_innermost
from gpu_engine.gpu.conv_kernels import Windows
from gpu_engine.gpu.direct_conv import Layer
from gpu_engine.gpu.gemm import converted
from gpu_engine.gpu.maps import Walked, emit_walk
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.printing import is_printable, is_printable_dtype
from gpu_engine.gpu.windows import Axis, Image, pitches
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import is_float
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.channels_last import LastConvTranspose
from gpu_engine.plan.axes import Shape, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


def lower_last_conv_transpose(
    options: GpuOptions, lowering: Lowering, op: LastConvTranspose, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:
    """Append the kernels; False for weights that are no constants, symbolic or negative pads, groups or dilations with
    strides, and types that kernels do not compute."""
    x = node.inputs[0]
    layer = layer_of(op.epilogue, x.dtype, node, inputs, outputs[0])
    weights, strided = lowering.buffers[inputs[1]].constant, any(stride > 1 for stride in op.strides)
    if weights is None or not weights.size or not all(isinstance(pad, int) and pad >= 0 for pad in op.before):
        return False
    if not is_printable(layer.root) or not is_printable_dtype(x.dtype) or not is_float(x.dtype):
        return False
    if strided and (op.group > 1 or any(dilation > 1 for dilation in op.dilations)):
        return False
    image = _image(op, node, inputs[0])
    packed = _by_phases(weights, op) if strided else _by_groups(weights, op.group)
    step = step_for(options, lowering, layer, inputs[0], converted(lowering, inputs[1], options))
    if step is None:
        return False
    turned, depth = wants_depth_innermost(step), packed.shape[2]
    packed = np.ascontiguousarray(packed.transpose(0, 3, 1, 2)) if turned else packed
    known = converted(lowering, lowering.constant(packed), options)
    windows = Windows(image, known, depth, strided, turned)
    if not strided:
        rank = len(layer.shape)
        walked: Walks = ((), tuple(range(rank - 1)), (rank - 1,))
        if op.group > 1:
            layer = layer.parted(rank - 1, dims.floor_div(layer.shape[-1], op.group))
            walked = ((rank - 1,), tuple(range(rank - 1)), (rank,))
        emit_windows(options, lowering, layer, windows, walked, step)
        return True
    whole = all(dims.modulo(extent, stride) == 0 for extent, stride in zip(layer.shape[1:-1], op.strides, strict=True))
    target = layer if whole else _padded(lowering, layer, op.strides)
    emit_windows(options, lowering, *_phased(target, op.strides, windows), step)
    if not whole:
        _emit_cut(lowering, layer, target)
    return True


def _image(op: LastConvTranspose, node: Node, buffer: int) -> Image:
    x, w, result = (value.shape for value in (*node.inputs[:2], node.outputs[0]))
    batch, channel, pitch = pitches(x, planar=False)
    axes = []
    for i, (extent, step) in enumerate(zip(x[1:-1], pitch, strict=True)):
        stride, kernel = op.strides[i], dims.number(w[2 + i])
        count = dims.ceil_div(result[1 + i], stride)
        taps = -(-kernel // stride)
        axes.append(Axis(extent, step, count, taps, 1, op.before[i], -op.dilations[i], 0, extent,
                         phases=stride, kernel=kernel if stride > 1 else 0))  # fmt: skip
    return Image(buffer, x[0], batch, channel, tuple(axes))


def _by_groups(weights: Any, group: int) -> Any:
    """[groups, taps, channels, M of a group] of w [channels, M of a group, kernel...]."""
    parts = weights.reshape(group, weights.shape[0] // group, weights.shape[1], -1)
    return np.ascontiguousarray(parts.transpose(0, 3, 1, 2))


def _by_phases(weights: Any, op: LastConvTranspose) -> Any:
    """[phases, taps, channels, M]: of phase q the taps (q + before) % stride, and every stride-th behind."""
    kernel, strides = weights.shape[2:], op.strides
    taps = [-(-extent // stride) for extent, stride in zip(kernel, strides, strict=True)]
    padded = [count * stride - extent for count, stride, extent in zip(taps, strides, kernel, strict=True)]
    full = np.pad(weights, [(0, 0), (0, 0), *((0, extra) for extra in padded)])
    phases = []
    for phase in itertools.product(*map(range, strides)):
        part = full[(slice(None), slice(None), *(
            slice((q + dims.number(before)) % stride, None, stride)
            for q, before, stride in zip(phase, op.before, strides, strict=True)))]  # fmt: skip
        phases.append(part.reshape(*weights.shape[:2], -1).transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(phases))


def _phased(layer: Layer, strides: tuple[int, ...], windows: Windows) -> tuple[Layer, Windows, Walks]:
    """The result with every spatial axis as (windows, phases)."""
    batch: list[int] = []
    rows = [0]
    axis = 1
    for stride in strides:
        layer = layer.parted(axis, stride)
        rows.append(axis)
        batch.append(axis + 1)
        axis += 2
    return layer, windows, (tuple(batch), tuple(rows), (axis,))


def _padded(lowering: Lowering, layer: Layer, strides: tuple[int, ...]) -> Layer:
    """The sums alone, in memory of whole phases."""
    spatial = [
        dims.ceil_div(extent, stride) * stride for extent, stride in zip(layer.shape[1:-1], strides, strict=True)
    ]
    shape: Shape = (layer.shape[0], *spatial, layer.shape[-1])
    root = expr.arg(0, layer.dtype)
    return Layer(root, layer.dtype, (), shape, lowering.buffer(layer.dtype, shape))


def _emit_cut(lowering: Lowering, layer: Layer, sums: Layer) -> None:
    """Launch the epilogue over what of the sums is asked for."""
    operands = [Walked(sums.out, contiguous_strides(sums.shape)), *layer.operands]
    target = Walked(layer.out, contiguous_strides(layer.shape))
    emit_walk(lowering, "cut", layer.root, operands, target, layer.shape)
