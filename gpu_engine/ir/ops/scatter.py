"""Scatter as functions over an array module, which an `Array` node holds: devices with kernels for it know them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dtypes import compute_dtype

REDUCTIONS = ("none", "add", "mul", "max", "min")


def scatter_along(xp: Any, data: Any, indices: Any, updates: Any, *, axis: int, reduction: str) -> Any:
    """`data` with the element at each index along `axis` replaced by, or combined with, its update.

    https://onnx.ai/onnx/operators/onnx__ScatterElements.html
    """
    grids = [
        xp.arange(extent).reshape((1,) * i + (extent,) + (1,) * (indices.ndim - 1 - i))
        for i, extent in enumerate(indices.shape)
    ]
    grids[axis] = indices
    return _scattered(xp, data, tuple(grids), updates, reduction)


def scatter_nd(xp: Any, data: Any, indices: Any, updates: Any, *, reduction: str = "none") -> Any:
    """`data` with the slice at each index tuple of `indices` [..., depth] replaced by, or combined with, its update.

    https://onnx.ai/onnx/operators/onnx__ScatterND.html
    """
    places = tuple(indices[..., i] for i in range(indices.shape[-1]))
    return _scattered(xp, data, places, updates, reduction)


def _scattered(xp: Any, data: Any, places: tuple[Any, ...], updates: Any, reduction: str) -> Any:
    if reduction not in REDUCTIONS:
        raise InvalidModel(f"the reduction {reduction} is not one of {', '.join(REDUCTIONS)}")
    if reduction == "none":
        result = data.copy()
        result[places] = updates
        return result
    wide = compute_dtype(data.dtype)
    result = data.astype(wide)
    combine = {"add": xp.add, "mul": xp.multiply, "max": xp.maximum, "min": xp.minimum}[reduction]
    with np.errstate(all="ignore"):
        combine.at(result, places, updates.astype(wide, copy=False))
        return result.astype(data.dtype, copy=False)
