"""Picking elements by index and writing them back."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import array_operator, normal_axis, operator
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Gather, GatherElements, GatherND

REDUCTIONS = ("none", "add", "mul", "max", "min")


@operator("Gather", since=1)
def gather(b: Builder, data: Value, indices: Value, *, axis: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Gather.html"""
    return b.emit(Gather(normal_axis(axis, data.rank)), data, indices)


@operator("GatherElements", since=11)
def gather_elements(b: Builder, data: Value, indices: Value, *, axis: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GatherElements.html"""
    return b.emit(GatherElements(normal_axis(axis, data.rank)), data, indices)


@operator("GatherND", since=11)
def gather_nd(b: Builder, data: Value, indices: Value, *, batch_dims: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GatherND.html"""
    return b.emit(GatherND(batch_dims), data, indices)


def _like_data(b: Builder, data: Value, indices: Value, updates: Value, **_: Any) -> TensorType:
    if data.dtype != updates.dtype:
        raise InvalidModel(f"{updates.type} does not go into {data.type}")
    return data.type


@array_operator("Scatter", since=9, infer=_like_data)
def scatter(xp: Any, data: Any, indices: Any, updates: Any, *, axis: int = 0) -> Any:
    """https://onnx.ai/onnx/operators/onnx__Scatter.html"""
    return scatter_elements(xp, data, indices, updates, axis=axis)


@array_operator("ScatterElements", since=11, infer=_like_data)
def scatter_elements(xp: Any, data: Any, indices: Any, updates: Any, *, axis: int = 0, reduction: str = "none") -> Any:
    """https://onnx.ai/onnx/operators/onnx__ScatterElements.html"""
    axis = axis % data.ndim
    grids = [
        xp.arange(extent).reshape((1,) * i + (extent,) + (1,) * (indices.ndim - 1 - i))
        for i, extent in enumerate(indices.shape)
    ]
    grids[axis] = indices
    return _scattered(xp, data, tuple(grids), updates, reduction)


@array_operator("ScatterND", since=11, infer=_like_data)
def scatter_nd(xp: Any, data: Any, indices: Any, updates: Any, *, reduction: str = "none") -> Any:
    """https://onnx.ai/onnx/operators/onnx__ScatterND.html"""
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


def _like_cache(b: Builder, cache: Value, *_: Any, **__: Any) -> TensorType:
    return cache.type


@array_operator("TensorScatter", since=24, infer=_like_cache)
def tensor_scatter(
    xp: Any, cache: Any, update: Any, write_indices: Any = None, *, axis: int = -2, mode: str = "linear"
) -> Any:
    """https://onnx.ai/onnx/operators/onnx__TensorScatter.html

    cache [B, ..., max length at `axis`, ...]; update the same with fewer at `axis`, written from write_indices[B] on.
    """
    axis, length = axis % cache.ndim, cache.shape[axis]
    starts = xp.zeros(cache.shape[0], np.int64) if write_indices is None else write_indices
    places = starts.reshape(-1, 1) + xp.arange(update.shape[axis])
    if mode == "circular":
        places = places % length
    batch = xp.arange(cache.shape[0]).reshape(-1, 1)
    result = xp.moveaxis(cache, axis, 1).copy()
    result[batch, places] = xp.moveaxis(update, axis, 1)
    return xp.moveaxis(result, 1, axis)


def _like_first(b: Builder, x: Value, *_: Any, **__: Any) -> TensorType:
    return x.type


@array_operator("ReverseSequence", since=10, infer=_like_first)
def reverse_sequence(xp: Any, x: Any, sequence_lens: Any, *, batch_axis: int = 1, time_axis: int = 0) -> Any:
    """https://onnx.ai/onnx/operators/onnx__ReverseSequence.html"""
    batch_axis, time_axis = batch_axis % x.ndim, time_axis % x.ndim
    shape = [1] * x.ndim
    shape[time_axis] = -1
    times = xp.arange(x.shape[time_axis]).reshape(shape)
    shape = [1] * x.ndim
    shape[batch_axis] = -1
    lengths = sequence_lens.reshape(shape)
    source = xp.where(times < lengths, lengths - 1 - times, times)
    return xp.take_along_axis(x, source, axis=time_axis)
