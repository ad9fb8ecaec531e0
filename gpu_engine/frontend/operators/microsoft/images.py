"""Sampling of images."""

from __future__ import annotations

from typing import Any

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import extents_of, told, unless_known, whole_numbers
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.sampling import grid_sample
from gpu_engine.frontend.registry import emit_array, operator
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.graph import Builder, TensorType, Value


@operator("GridSample", since=1, domain=MICROSOFT)
def microsoft_grid_sample(
    b: Builder,
    x: Value,
    grid: Value,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GridSample"""
    return grid_sample(b, x, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)


@operator("CropAndResize", since=1, domain=MICROSOFT)
def crop_and_resize(
    b: Builder,
    x: Value,
    rois: Value,
    batch_indices: Value,
    crop_size: Value,
    *,
    mode: str = "bilinear",
    extrapolation_value: float = 0.0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.CropAndResize"""
    if mode not in ("bilinear", "nearest"):
        raise InvalidModel(f"the mode {mode} is not bilinear or nearest")
    kind = TensorType(x.dtype, (rois.shape[0], x.shape[1], *extents_of(b, crop_size, 2)))
    attributes = {"nearest": mode == "nearest", "outside": extrapolation_value, "size": told(crop_size)}
    operands = (x, rois, batch_indices, unless_known(crop_size))
    return emit_array(b, crops, lambda *_, **__: kind, operands, attributes)[0]


def crops(xp: Any, x: Any, rois: Any, batch: Any, sizes: Any, *, nearest: bool, outside: float, size: Any) -> Any:
    """Boxes (y1, x1, y2, x2) of images [N, C, H, W], in units of their size, resized with aligned corners."""
    wide = x.astype(compute_dtype(x.dtype), copy=False)
    rows, columns = (
        _positions(xp, rois[:, i], rois[:, i + 2], x.shape[2 + i], count)
        for i, count in enumerate(whole_numbers(size, sizes) or ())
    )
    inside = [(at >= 0) & (at <= extent - 1) for at, extent in ((rows, x.shape[2]), (columns, x.shape[3]))]
    image = batch.reshape(-1, 1, 1, 1)
    channel = xp.arange(x.shape[1]).reshape(-1, 1, 1)

    def read(row: Any, column: Any) -> Any:
        row = xp.clip(row, 0, x.shape[2] - 1).astype("i8")[:, None, :, None]
        column = xp.clip(column, 0, x.shape[3] - 1).astype("i8")[:, None, None, :]
        return wide[image, channel, row, column]

    if nearest:
        result = read(xp.floor(rows + 0.5), xp.floor(columns + 0.5))
    else:
        down, right = rows - xp.floor(rows), columns - xp.floor(columns)
        down, right = down[:, None, :, None], right[:, None, None, :]
        top, bottom = (
            (read(at, xp.floor(columns)), read(at, xp.ceil(columns))) for at in (xp.floor(rows), xp.ceil(rows))
        )
        top, bottom = (pair[0] + (pair[1] - pair[0]) * right for pair in (top, bottom))
        result = top + (bottom - top) * down
    return xp.where(inside[0][:, None, :, None] & inside[1][:, None, None, :], result, wide.dtype.type(outside))


def _positions(xp: Any, first: Any, last: Any, extent: int, count: int) -> Any:
    """Where the `count` samples of every box lie along an axis, [boxes, count]."""
    if count > 1:
        step = (last - first) * (extent - 1) / (count - 1)
        return first[:, None] * (extent - 1) + xp.arange(count, dtype=first.dtype) * step[:, None]
    return (first + last)[:, None] * (0.5 * (extent - 1))
