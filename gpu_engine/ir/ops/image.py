"""Resize: resampling along axes by tables of positions and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, compute_dtype, is_float, limits
from gpu_engine.ir.graph import TensorType

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Resize:
    """https://onnx.ai/onnx/operators/onnx__Resize.html with the extent of every axis already found.

    `extents` are the output's. `scales` holds a float per axis, or None where it is the quotient of the extents.
    `mode` is "nearest", "linear" or "cubic", and each axis is resampled on its own, with positions in float32.
    `nearest_mode` knows "simple" (floor where an axis grows, else ceil) besides ONNX's. `roi` is (start, end) per
    axis, for `coordinates` "tf_crop_and_resize" only.
    """

    extents: tuple[Dim, ...]
    scales: tuple[float | None, ...]
    mode: str
    coordinates: str
    nearest_mode: str = "round_prefer_floor"
    cubic_coeff_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation_value: float = 0.0
    roi: tuple[tuple[float, float], ...] = ()

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        if x.rank != len(self.extents) or x.rank != len(self.scales):
            raise InvalidModel(f"a resize of {x} to {len(self.extents)} extents by {len(self.scales)} scales")
        return (TensorType(x.dtype, self.extents),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        (x,) = arrays
        if 0 in self.extents:
            return (xp.zeros(self.extents, x.dtype),)
        if 0 in x.shape:
            raise ValueError(f"a resize of an empty {list(x.shape)} to {list(self.extents)}")
        result = x if self.mode == "nearest" else x.astype(_wide(x.dtype), copy=False)
        for axis in range(x.ndim):
            if not keeps_axis(self, axis, x.shape[axis]):
                result = _resize_axis(xp, self, result, axis)
        if self.mode != "nearest" and not is_float(x.dtype):
            result = xp.clip(xp.rint(result), *limits(x.dtype))
        return (result.astype(x.dtype, copy=False),)


@dataclass(frozen=True)
class Table:
    """Along one axis: output i is the sum over taps of weights[i] times the inputs at places[i], or the extrapolation
    value where `outside`; without weights there is one tap."""

    places: NDArray[np.int64]
    weights: Floats | None
    outside: NDArray[np.bool_] | None


def keeps_axis(op: Resize, axis: int, extent: Dim) -> bool:
    """Whether the output has the input's own elements along `axis`, extent for extent."""
    whole = not op.roi or op.coordinates != "tf_crop_and_resize" or op.roi[axis] == (0.0, 1.0)
    return op.extents[axis] == extent and op.scales[axis] in (None, 1.0) and whole


def resize_table(op: Resize, axis: int, extent: int) -> Table:
    """The table of `axis`, which has `extent` elements; all extents of `op` are ints."""
    count = op.extents[axis]
    assert isinstance(count, int)
    scale = np.float32(op.scales[axis] if op.scales[axis] is not None else count / extent)
    positions = _positions(op, axis, extent, count, scale)
    outside = None
    if op.coordinates == "tf_crop_and_resize":
        outside = (positions < 0) | (positions > extent - 1)
    if op.mode == "nearest":
        places = np.clip(_nearest(positions, op.nearest_mode, scale), 0, extent - 1).astype(np.int64)
        return Table(places[:, None], None, outside)
    base = np.floor(positions)
    first, weights = _weights(op, positions - base, float(scale))
    places = base.astype(np.int64)[:, None] + np.arange(first, first + weights.shape[1])
    if op.exclude_outside:
        weights = np.where((places < 0) | (places >= extent), 0, weights)
        weights = weights / weights.sum(axis=1, keepdims=True)
    return Table(np.clip(places, 0, extent - 1), weights.astype(np.float32), outside)


def _resize_axis(xp: Any, op: Resize, x: Any, axis: int) -> Any:
    table = resize_table(op, axis, x.shape[axis])
    shape = (-1, *(1,) * (x.ndim - axis - 1))
    result = xp.take(x, xp.asarray(table.places[:, 0]), axis=axis)
    if table.weights is not None:
        weights = table.weights.astype(x.dtype)
        result = result * xp.asarray(weights[:, 0]).reshape(shape)
        for tap in range(1, weights.shape[1]):
            part = xp.take(x, xp.asarray(table.places[:, tap]), axis=axis)
            result = result + part * xp.asarray(weights[:, tap]).reshape(shape)
    if table.outside is not None and table.outside.any():
        value = np.asarray(op.extrapolation_value).astype(x.dtype)
        result = xp.where(xp.asarray(table.outside).reshape(shape), value, result)
    return result


def _positions(op: Resize, axis: int, extent: int, count: int, scale: np.float32) -> Any:
    """Where in the input each output element lies."""
    i, half = np.arange(count, dtype=np.float32), np.float32(0.5)
    match op.coordinates:
        case "half_pixel":
            return (i + half) / scale - half
        case "half_pixel_symmetric":
            adjustment = np.float32(count / (float(scale) * extent))
            return np.float32(extent / 2) * (1 - adjustment) + (i + half) / scale - half
        case "pytorch_half_pixel":
            return (i + half) / scale - half if count > 1 else np.zeros_like(i)
        case "tf_half_pixel_for_nn":
            return (i + half) / scale
        case "asymmetric":
            return i / scale
        case "align_corners":
            return i * np.float32(extent - 1) / np.float32(count - 1) if count > 1 else np.zeros_like(i)
        case "tf_crop_and_resize":
            start, end = op.roi[axis]
            last = np.float32(extent - 1)
            if count == 1:
                return np.full(1, 0.5 * (start + end), np.float32) * last
            return np.float32(start) * last + i * np.float32(end - start) * last / np.float32(count - 1)
    raise InvalidModel(f"coordinate_transformation_mode {op.coordinates!r} is not known")


def _nearest(positions: Any, mode: str, scale: np.float32) -> Any:
    half = np.float32(0.5)
    match mode:
        case "round_prefer_floor":
            return np.ceil(positions - half)
        case "round_prefer_ceil":
            return np.floor(positions + half)
        case "floor":
            return np.floor(positions)
        case "ceil":
            return np.ceil(positions)
        case "simple":
            return np.floor(positions) if scale >= 1 else np.ceil(positions)
    raise InvalidModel(f"nearest_mode {mode!r} is not known")


def _weights(op: Resize, ratio: Floats, scale: float) -> tuple[int, NDArray[np.float64]]:
    """(the first tap's distance from the floor of the position, weights [positions, taps])."""
    narrow = min(scale, 1.0) if op.antialias else 1.0
    reach = 1 if op.mode == "linear" else 2
    first = int(np.floor(-reach / narrow)) + 1
    distance = np.abs((np.arange(first, 2 - first) - ratio[:, None].astype(np.float64)) * narrow)
    if op.mode == "linear":
        weights = np.clip(1 - distance, 0, 1)
    else:
        a = op.cubic_coeff_a
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return first, weights / weights.sum(axis=1, keepdims=True) if op.antialias else weights


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if is_float(dtype):
        return compute_dtype(dtype)
    return FLOAT32 if dtype.itemsize < 4 else FLOAT64
