"""Deformable convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.convolution import kernel_extents, with_bias
from gpu_engine.frontend.operators.sampling import interpolate
from gpu_engine.frontend.registry import emit_array, operator
from gpu_engine.frontend.windows import windows
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.graph import Builder, TensorType, Value


@operator("DeformConv", since=19)
def deform_conv(
    b: Builder,
    x: Value,
    w: Value,
    offset: Value,
    bias: Value | None = None,
    mask: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    group: int = 1,
    offset_group: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__DeformConv.html: columns of samples times the weights"""
    found = windows(x.shape[2:], kernel_extents(w, kernel_shape), strides, dilations, pads)
    if any(not isinstance(size, int) for size in found.kernel):
        raise InvalidModel(f"the kernel's extents in {w.type} must be known")
    spatial = offset.shape[2:]
    taps = dims.product(found.kernel)
    columns = TensorType(x.dtype, (x.shape[0], x.shape[1] * taps, *spatial))
    attributes = {
        "windows": (found.kernel, found.strides, found.before, found.dilations),
        "groups": offset_group,
    }
    (sampled,) = emit_array(b, _sampled_columns, lambda *_, **__: columns, (x, offset, mask), attributes)
    depth = dims.floor_div(x.shape[1] * taps, group)
    left = b.emit(ops.Reshape((1, group, dims.floor_div(w.shape[0], group), depth)), w)
    right = b.emit(ops.Reshape((x.shape[0], group, depth, dims.product(spatial))), sampled)
    product = b.emit(ops.Reshape((x.shape[0], w.shape[0], *spatial)), b.emit(ops.MatMul(), left, right))
    return with_bias(b, product, bias)


def _sampled_columns(xp: Any, x: Any, offset: Any, mask: Any, *, windows: Any, groups: int) -> Any:
    """[N, C * taps, outputs...]: x at every tap of every window, moved by `offset`, times `mask`; 0 outside x."""
    kernel, strides, before, dilations = windows
    rank, taps, spatial = len(kernel), int(np.prod(kernel)), offset.shape[2:]
    wide = compute_dtype(x.dtype)
    moves = offset.astype(wide, copy=False).reshape(x.shape[0] * groups, taps, rank, *spatial)
    places = np.stack(np.meshgrid(*(np.arange(size) for size in kernel), indexing="ij")).reshape(rank, taps)
    positions = []
    for axis in range(rank):
        starts = np.arange(spatial[axis]) * strides[axis] - before[axis]
        at = places[axis][:, None] * dilations[axis] + starts
        shape = (taps, *(spatial[axis] if other == axis else 1 for other in range(rank)))
        positions.append(moves[:, :, axis] + xp.asarray(at.reshape(shape), wide))

    def place(index: Any, axis: int) -> tuple[Any, Any]:
        extent = x.shape[2 + axis]
        return xp.clip(index, 0, extent - 1), (index >= 0) & (index < extent)

    grouped = x.reshape(x.shape[0] * groups, -1, *x.shape[2:])
    sampled = interpolate(xp, grouped, positions, "linear", place)
    if mask is not None:
        sampled = sampled * mask.reshape(x.shape[0] * groups, 1, taps, *spatial)
    return sampled.reshape(x.shape[0], -1, *spatial)
