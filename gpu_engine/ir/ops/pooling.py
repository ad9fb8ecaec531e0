"""Pool: every window of the spatial axes folded to one element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import compute_dtype, is_float, limits
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.linear import window_count


@dataclass(frozen=True)
class Pool:
    """Every window of x [N, C, spatial...] folded with kind "max", "sum" or "average"; a window's elements lie
    `dilations` apart.

    `before` / `after` pad each spatial axis (negative crops): padding never wins a maximum and adds 0 to a sum. An
    average divides by how many elements of the window lie inside x, or inside the padded x with `count_include_pad`.
    With `ceil_mode` a last window that reaches over the padded end is kept if it starts inside x or the padding before
    it; what lies over the end counts nowhere. Floats narrower than float32 are summed in float32.
    """

    kind: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        if x.rank != len(self.kernel) + 2:
            raise InvalidModel(f"a pool of {x} over {len(self.kernel)} spatial axes")
        return (TensorType(x.dtype, (*x.shape[:2], *pool_counts(self, x.shape[2:]))),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        (x,) = arrays
        dtype = x.dtype
        lowest = -np.inf if is_float(dtype) else limits(dtype)[0]
        fill = lowest if self.kind == "max" else 0
        fold = xp.maximum if self.kind == "max" else xp.add
        counts = pool_counts(self, x.shape[2:])
        result = x.astype(compute_dtype(dtype), copy=False)
        for i, count in enumerate(counts):
            assert isinstance(count, int)
            result = fold_axis(xp, self, result, i, count, fold, fill)
        if self.kind == "average":
            result = result / xp.asarray(window_sizes(self, x.shape[2:], counts), result.dtype)
        return (result.astype(dtype, copy=False),)


def pool_counts(op: Pool, spatial: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """How many windows each spatial axis holds."""
    return tuple(_axis_count(op, i, extent) for i, extent in enumerate(spatial))


def _axis_count(op: Pool, i: int, extent: Dim) -> Dim:
    kernel, stride, before, after = op.kernel[i], op.strides[i], op.before[i], op.after[i]
    if not op.ceil_mode:
        return window_count(extent, kernel, stride, before, after, op.dilations[i])
    covered = (kernel - 1) * op.dilations[i] + 1
    count = dims.ceil_div(extent + before + after - covered, stride) + 1
    count = dims.minimum(count, dims.ceil_div(extent + before, stride))
    return max(count, 0) if isinstance(count, int) else count


def fold_axis(xp: Any, op: Pool, x: Any, i: int, count: int, fold: Any, fill: Any) -> Any:
    """x with spatial axis i replaced by its windows' folds: a pool is separable."""
    axis, stride, dilation = i + 2, op.strides[i], op.dilations[i]
    before, after = int(op.before[i]), int(op.after[i])  # type: ignore[arg-type]
    needed = (count - 1) * stride + (op.kernel[i] - 1) * dilation + 1 if count else 0
    start = max(0, -before)
    stop = min(x.shape[axis] - max(0, -after), max(0, needed - before))
    x = _along(x, axis, slice(start, max(start, stop)))
    pads = [(0, 0)] * x.ndim
    pads[axis] = (max(0, before), max(0, needed - max(0, before) - x.shape[axis]))
    x = xp.pad(x, pads, constant_values=fill) if any(pads[axis]) else x
    result = None
    for tap in range(op.kernel[i]):
        part = _along(x, axis, slice(tap * dilation, tap * dilation + (count - 1) * stride + 1 if count else 0, stride))
        result = part if result is None else fold(result, part)
    return result


def _along(x: Any, axis: int, part: slice) -> Any:
    return x[(slice(None),) * axis + (part,)]


def window_sizes(op: Pool, spatial: tuple[int, ...], counts: tuple[Dim, ...]) -> Any:
    """What an average divides by, [windows...]."""
    sizes = np.ones((), np.int64)
    for i, (extent, count) in enumerate(zip(spatial, counts, strict=True)):
        before, after = int(op.before[i]), int(op.after[i])  # type: ignore[arg-type]
        low, high = (-before, extent + after) if op.count_include_pad else (max(0, -before), extent - max(0, -after))
        starts = np.arange(int(count)) * op.strides[i] - before  # type: ignore[arg-type]
        places = starts[:, None] + np.arange(op.kernel[i]) * op.dilations[i]
        sizes = sizes[..., None] * ((places >= low) & (places < high)).sum(1)
    return np.maximum(sizes, 1)
