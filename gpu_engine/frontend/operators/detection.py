"""Regions of interest and the selection of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import array_operator, emit_array, operator
from gpu_engine.ir.dtypes import INT64, compute_dtype
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.selection import non_max_suppression


def _selected_type(b: Builder, *_: Value | None, **__: Any) -> TensorType:
    return TensorType(INT64, (b.fresh_dim(), 3))


array_operator("NonMaxSuppression", since=10, infer=_selected_type, host=True)(non_max_suppression)


@operator("RoiAlign", since=10)
def roi_align_10(
    b: Builder,
    x: Value,
    rois: Value,
    batch_indices: Value,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RoiAlign.html of opset 10"""
    size = (output_height, output_width)
    return _roi_align(b, x, rois, batch_indices, mode, size, sampling_ratio, spatial_scale, shifted=False)


@operator("RoiAlign", since=16)
def roi_align(
    b: Builder,
    x: Value,
    rois: Value,
    batch_indices: Value,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RoiAlign.html"""
    if coordinate_transformation_mode not in ("half_pixel", "output_half_pixel"):
        raise InvalidModel(f"coordinate_transformation_mode {coordinate_transformation_mode!r}")
    shifted = coordinate_transformation_mode == "half_pixel"
    size = (output_height, output_width)
    return _roi_align(b, x, rois, batch_indices, mode, size, sampling_ratio, spatial_scale, shifted=shifted)


def _roi_align(
    b: Builder,
    x: Value,
    rois: Value,
    batch_indices: Value,
    mode: str,
    size: tuple[int, int],
    samples: int,
    scale: float,
    *,
    shifted: bool,
) -> Value:
    if mode not in ("avg", "max") or x.rank != 4:
        raise InvalidModel(f"mode {mode!r} over {x.type}")
    kind = TensorType(x.dtype, (rois.shape[0], x.shape[1], *size))
    attributes = {"mode": mode, "size": size, "samples": samples, "scale": scale, "shifted": shifted}
    (result,) = emit_array(b, _align_rois, lambda *_, **__: kind, (x, rois, batch_indices), attributes, host=True)
    return result


def _align_rois(
    xp: Any,
    x: Any,
    rois: Any,
    batch_indices: Any,
    *,
    mode: str,
    size: tuple[int, int],
    samples: int,
    scale: float,
    shifted: bool,
) -> Any:
    wide = compute_dtype(x.dtype)
    result = np.zeros((rois.shape[0], x.shape[1], *size), wide)
    bounds = rois.astype(wide) * wide.type(scale) - wide.type(0.5 if shifted else 0)
    for n, (left, top, right, bottom) in enumerate(bounds):
        image = x[batch_indices[n]].astype(wide, copy=False)
        rows = _roi_taps(top, bottom, size[0], samples, image.shape[1], shifted)
        columns = _roi_taps(left, right, size[1], samples, image.shape[2], shifted)
        counts = (len(rows[0][0]) // size[0], len(columns[0][0]) // size[1])
        if 0 in counts:
            continue
        parts = [
            image[:, index_y[:, None], index_x] * (weight_y[:, None] * weight_x)
            for index_y, weight_y in rows
            for index_x, weight_x in columns
        ]
        folded = np.maximum.reduce(parts) if mode == "max" else sum(parts)
        cells = folded.reshape(image.shape[0], size[0], counts[0], size[1], counts[1])
        result[n] = cells.max(axis=(2, 4)) if mode == "max" else cells.mean(axis=(2, 4))
    return result


def _roi_taps(start: Any, end: Any, cells: int, samples: int, extent: int, shifted: bool) -> list[tuple[Any, Any]]:
    """Two (indices, weights) for the sampled positions of all cells along one axis; weight 0 outside the image."""
    length = end - start if shifted else max(end - start, type(start)(1))
    cell = length / cells
    count = samples if samples > 0 else max(int(np.ceil(length / cells)), 0)
    at = start + np.arange(cells)[:, None] * cell + (np.arange(count) + 0.5) * (cell / max(count, 1))
    at = at.ravel()
    inside = (at >= -1) & (at <= extent)
    at = np.clip(at, 0, extent - 1)
    low = np.minimum(at.astype(np.int64), extent - 1)
    ratio = np.where(low >= extent - 1, 0, at - low)
    high = np.minimum(low + 1, extent - 1)
    return [(low, np.where(inside, 1 - ratio, 0)), (high, np.where(inside, ratio, 0))]


@operator("MaxRoiPool", since=1)
def max_roi_pool(
    b: Builder, x: Value, rois: Value, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__MaxRoiPool.html; corners are rounded, as in Fast R-CNN's own"""
    if x.rank != 4 or len(pooled_shape) != 2:
        raise InvalidModel(f"a pool of {x.type} to {list(pooled_shape)}")
    kind = TensorType(x.dtype, (rois.shape[0], x.shape[1], *pooled_shape))
    attributes = {"size": tuple(pooled_shape), "scale": spatial_scale}
    (result,) = emit_array(b, _pool_rois, lambda *_, **__: kind, (x, rois), attributes, host=True)
    return result


def _pool_rois(xp: Any, x: Any, rois: Any, *, size: tuple[int, int], scale: float) -> Any:
    result = np.zeros((rois.shape[0], x.shape[1], *size), x.dtype)
    bounds = np.floor(rois[:, 1:].astype(np.float64) * scale + 0.5).astype(np.int64)
    for n, (left, top, right, bottom) in enumerate(bounds):
        image = x[int(rois[n, 0])]
        rows = _cell_bounds(top, bottom, size[0], image.shape[1])
        columns = _cell_bounds(left, right, size[1], image.shape[2])
        for i, (y, y_end) in enumerate(rows):
            for j, (z, z_end) in enumerate(columns):
                if y_end > y and z_end > z:
                    result[n, :, i, j] = image[:, y:y_end, z:z_end].max(axis=(1, 2))
    return result


def _cell_bounds(start: int, end: int, cells: int, extent: int) -> list[tuple[int, int]]:
    cell = max(end - start + 1, 1) / cells
    edges = [(int(np.floor(i * cell)) + start, int(np.ceil((i + 1) * cell)) + start) for i in range(cells)]
    return [(min(max(low, 0), extent), min(max(high, 0), extent)) for low, high in edges]
