"""TopK, Unique and NonMaxSuppression as functions over an array module, which an `Array` node holds: devices with
kernels for them know them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_engine.ir.dtypes import STRING, compute_dtype


def top_of(xp: Any, x: Any, k: Any = None, *, axis: int, largest: bool, count: int | None) -> Any:
    """The `count` (or k) greatest or least elements of x along `axis`, in order, and where they were.

    Of equal elements the one with the lower index comes first; NaN counts as greater than all numbers.
    """
    found = int(k.ravel()[0]) if count is None else count
    if found > x.shape[axis]:
        raise ValueError(f"the top {found} of {x.shape[axis]} elements")
    keys = x.astype(compute_dtype(x.dtype), copy=False)
    if largest:
        order = x.shape[axis] - 1 - xp.flip(xp.argsort(xp.flip(keys, axis), axis=axis, kind="stable"), axis)
    else:
        order = xp.argsort(keys, axis=axis, kind="stable")
    chosen = order[(slice(None),) * axis + (slice(0, found),)]
    return xp.take_along_axis(x, chosen, axis=axis), chosen


def unique(xp: Any, x: Any, *, axis: int | None = None, sorted: int = 1) -> Any:
    """https://onnx.ai/onnx/operators/onnx__Unique.html

    NaN equals NaN, but a slice along `axis` that holds one equals no other.
    """
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis % x.ndim)
    beside = math.prod(x.shape[:axis]) * math.prod(x.shape[axis + 1 :])
    rows = x if x.ndim == 1 else xp.moveaxis(x, axis, 0).reshape(x.shape[axis], beside)
    keys = rows.astype(compute_dtype(x.dtype), copy=False) if x.dtype != STRING else rows
    _, first, inverse, counts = xp.unique(
        keys, return_index=True, return_inverse=True, return_counts=True, axis=0 if keys.ndim > 1 else None
    )
    inverse = inverse.reshape(-1)
    if not sorted:
        order = xp.argsort(first)
        first, counts, inverse = first[order], counts[order], xp.argsort(order)[inverse]
    return xp.take(x, first, axis=axis), first, inverse, counts


def microsoft_unique(xp: Any, x: Any) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Unique

    In the order of their first appearance; no NaN equals another.
    """
    _, first, inverse, counts = xp.unique(
        x, return_index=True, return_inverse=True, return_counts=True, equal_nan=False
    )
    order = xp.argsort(first)
    return x[first[order]], xp.argsort(order)[inverse.reshape(-1)], counts[order]


def non_max_suppression(
    xp: Any,
    boxes: Any,
    scores: Any,
    max_output_boxes_per_class: Any = None,
    iou_threshold: Any = None,
    score_threshold: Any = None,
    *,
    center_point_box: int = 0,
) -> Any:
    """https://onnx.ai/onnx/operators/onnx__NonMaxSuppression.html"""
    limit = 0 if max_output_boxes_per_class is None else int(max_output_boxes_per_class.ravel()[0])
    overlap = boxes.dtype.type(0 if iou_threshold is None else iou_threshold.ravel()[0])
    found = []
    for row, class_index in np.ndindex(*scores.shape[:2]) if limit > 0 else ():
        corners = _corners(boxes[row], bool(center_point_box))
        held = scores[row, class_index]
        order = np.argsort(-held, kind="stable")
        if score_threshold is not None:
            order = order[held[order] > score_threshold.ravel()[0]]
        chosen = _select(corners, order, limit, overlap)
        found.append(np.stack([np.full_like(chosen, row), np.full_like(chosen, class_index), chosen], axis=1))
    return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


def _corners(boxes: Any, centred: bool) -> Any:
    """(low, high) corners, each [boxes, 2]."""
    if centred:
        return boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    return np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])


def _select(corners: Any, order: Any, limit: int, overlap: Any) -> Any:
    """At most `limit` boxes in `order`, none of which overlaps one before it by more than `overlap`."""
    low, high = corners
    areas = np.prod(high - low, axis=1)
    chosen: list[int] = []
    while len(order) and len(chosen) < limit:
        best, order = order[0], order[1:]
        chosen.append(int(best))
        sides = np.maximum(np.minimum(high[best], high[order]) - np.maximum(low[best], low[order]), 0)
        shared = sides[:, 0] * sides[:, 1]
        union = areas[best] + areas[order] - shared
        real = (shared > 0) & (areas[best] > 0) & (areas[order] > 0) & (union > 0)
        ratio = np.divide(shared, union, out=np.zeros_like(shared), where=real)
        order = order[~(real & (ratio > overlap))]
    return np.array(chosen, np.int64)
