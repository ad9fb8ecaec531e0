"""Sampling of tensors at positions between their elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import extents_of, told, unless_known, whole_numbers
from gpu_engine.frontend.registry import emit_array, operator
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.graph import Builder, TensorType, Value

MODES = {"bilinear": "linear", "bicubic": "cubic"}
Place = Callable[[Any, int], tuple[Any, Any]]
CUBIC_A = -0.75


@operator("GridSample", since=16)
def grid_sample(
    b: Builder,
    x: Value,
    grid: Value,
    *,
    mode: str = "linear",
    padding_mode: str = "zeros",
    align_corners: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GridSample.html; cubic sampling beyond a border repeats elements and
    keeps the position, as PyTorch's does"""
    mode = MODES.get(mode, mode)
    if mode not in ("nearest", "linear", "cubic") or padding_mode not in ("zeros", "border", "reflection"):
        raise InvalidModel(f"mode {mode!r}, padding_mode {padding_mode!r}")
    if x.rank != grid.rank:
        raise InvalidModel(f"{x.type} sampled at {grid.type}")
    kind = TensorType(x.dtype, (*x.shape[:2], *grid.shape[1:-1]))
    attributes = {"mode": mode, "padding": padding_mode, "align": bool(align_corners)}
    (result,) = emit_array(b, _grid_sample, lambda *_, **__: kind, (x, grid), attributes)
    return result


def _grid_sample(xp: Any, x: Any, grid: Any, *, mode: str, padding: str, align: bool) -> Any:
    spatial = x.shape[2:]
    wide = grid.astype(compute_dtype(grid.dtype), copy=False)
    half = wide.dtype.type(0.5)
    positions = []
    for axis, extent in enumerate(spatial):
        at = wide[..., len(spatial) - 1 - axis]
        at = (at + 1) * half * (extent - 1) if align else ((at + 1) * extent - 1) * half
        at = xp.rint(at) if mode == "nearest" else at
        moved = padding != "border" or mode != "cubic"
        positions.append(_inside(xp, at, extent, padding, align) if moved else at)

    def place(index: Any, axis: int) -> tuple[Any, Any]:
        extent = spatial[axis]
        if padding == "zeros":
            return xp.clip(index, 0, extent - 1), (index >= 0) & (index < extent)
        index = _inside(xp, index, extent, padding, align).astype(np.int64)
        return xp.clip(index, 0, extent - 1), None

    if 0 in x.shape:
        return xp.zeros((*x.shape[:2], *grid.shape[1:-1]), x.dtype)
    return interpolate(xp, x, positions, mode, place)


def _inside(xp: Any, at: Any, extent: int, padding: str, align: bool) -> Any:
    """Positions (or indices) brought back between the borders."""
    if padding == "border":
        return xp.clip(at, 0, extent - 1)
    if padding == "zeros":
        return at
    low, high = (0.0, extent - 1.0) if align else (-0.5, extent - 0.5)
    span = high - low
    if span == 0:
        return xp.zeros_like(at)
    beyond = xp.where(at < low, low - at, at - high)
    turns = xp.floor(beyond / span)
    rest = beyond - turns * span
    even = turns % 2 == 0
    reflected = xp.where((at < low) == even, low + rest, high - rest)
    return xp.where((at < low) | (at > high), reflected, at)


def interpolate(xp: Any, x: Any, positions: Sequence[Any], mode: str, place: Place) -> Any:
    """x [N, C, spatial...] at `positions` [N, outputs...] per spatial axis, as [N, C, outputs...].

    `place(indices, axis)` gives the indices to read and where these count (None: everywhere).
    """
    taps = [_taps(xp, at, mode) for at in positions]
    rows, channels = x.shape[:2]
    values = x.reshape(rows, channels, -1)
    wide = x.dtype if mode == "nearest" else compute_dtype(x.dtype)
    shape = (rows, 1, *positions[0].shape[1:])
    first = xp.arange(rows).reshape(rows, *(1,) * (len(shape) - 1))
    second = xp.arange(channels).reshape(1, channels, *(1,) * (len(shape) - 2))
    total = None
    for combination in itertools.product(*taps):
        flat, weight, counts = xp.zeros((), np.int64), None, None
        for axis, (index, share) in enumerate(combination):
            found, inside = place(index, axis)
            flat = flat * x.shape[2 + axis] + found
            weight = share if weight is None else weight if share is None else weight * share
            counts = inside if counts is None else counts if inside is None else counts & inside
        part = values[first, second, flat.reshape(shape)]
        part = part if counts is None else xp.where(counts.reshape(shape), part, xp.zeros((), x.dtype))
        part = part if weight is None else part.astype(wide, copy=False) * weight.reshape(shape).astype(wide)
        total = part if total is None else total + part
    assert total is not None
    return total.astype(x.dtype, copy=False)


def _taps(xp: Any, at: Any, mode: str) -> list[tuple[Any, Any]]:
    """(indices, weights) of every element that a position takes from; weights None for 1."""
    if mode == "nearest":
        return [(at.astype(np.int64), None)]
    base = xp.floor(at)
    ratio, index = at - base, base.astype(np.int64)
    if mode == "linear":
        return [(index, 1 - ratio), (index + 1, ratio)]
    return [(index + i, _cubic(xp, abs(ratio - i))) for i in (-1, 0, 1, 2)]


def _cubic(xp: Any, distance: Any) -> Any:
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance * distance + 1
    far = ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A
    return xp.where(distance <= 1, near, far)


@operator("AffineGrid", since=20)
def affine_grid(b: Builder, theta: Value, size: Value, *, align_corners: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__AffineGrid.html"""
    extents = extents_of(b, size, theta.shape[1] + 2 if isinstance(theta.shape[1], int) else None)
    if theta.rank != 3 or len(extents) not in (4, 5):
        raise InvalidModel(f"theta {theta.type} for a grid of {len(extents) - 2} axes")
    kind = TensorType(theta.dtype, (theta.shape[0], *extents[2:], len(extents) - 2))
    attributes = {"align": bool(align_corners), "extents": told(size)}
    (grid,) = emit_array(b, _affine_grid, lambda *_, **__: kind, (theta, unless_known(size)), attributes)
    return grid


def _affine_grid(xp: Any, theta: Any, size: Any, *, align: bool, extents: Any) -> Any:
    spatial = (whole_numbers(extents, size) or ())[2:]
    axes = []
    for extent in spatial:
        steps = xp.arange(extent, dtype=theta.dtype)
        if align:
            axes.append(steps * (2 / (extent - 1)) - 1 if extent > 1 else steps)
        else:
            axes.append((2 * steps + 1) / max(extent, 1) - 1)
    grids = xp.meshgrid(*axes, indexing="ij")[::-1]
    base = xp.stack([*grids, xp.ones(spatial, theta.dtype)], axis=-1)
    flat = base.reshape(1, -1, len(spatial) + 1).astype(theta.dtype)
    return xp.matmul(flat, theta.swapaxes(1, 2)).reshape(theta.shape[0], *spatial, len(spatial))
