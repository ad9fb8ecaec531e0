"""Picking elements by index and writing them back."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import array_operator, emit_array, normal_axis, operator
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Gather, GatherElements, GatherND
from gpu_engine.ir.ops.scatter import scatter_along, scatter_nd


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


@operator("Scatter", since=9)
def scatter(b: Builder, data: Value, indices: Value, updates: Value, *, axis: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Scatter.html"""
    return scatter_elements(b, data, indices, updates, axis=axis)


@operator("ScatterElements", since=11)
def scatter_elements(
    b: Builder, data: Value, indices: Value, updates: Value, *, axis: int = 0, reduction: str = "none"
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ScatterElements.html"""
    axis = normal_axis(axis, data.rank)
    attributes = {"axis": axis, "reduction": reduction}
    operands = (data, indices, updates)
    return emit_array(b, scatter_along, _like_data, operands, attributes, mixes=(axis,), aligned=3)[0]


def _like_data(b: Builder, data: Value, indices: Value, updates: Value, **_: Any) -> TensorType:
    if data.dtype != updates.dtype:
        raise InvalidModel(f"{updates.type} does not go into {data.type}")
    return data.type


array_operator("ScatterND", since=11, infer=_like_data)(scatter_nd)


@operator("TensorScatter", since=24)
def tensor_scatter(
    b: Builder, cache: Value, update: Value, write_indices: Value | None = None, *, axis: int = -2, mode: str = "linear"
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__TensorScatter.html

    cache [B, ..., max length at `axis`, ...]; update the same with fewer at `axis`, written from write_indices[B] on.
    """
    if mode not in ("linear", "circular"):
        raise InvalidModel(f"TensorScatter writes linear or circular, not {mode}")
    attributes = {"axis": normal_axis(axis, cache.rank), "mode": mode}
    operands = (cache, update, write_indices)
    aligned = 2 if write_indices is None else 3
    mixes = tuple(range(1, cache.rank))
    kind = cache.type
    return emit_array(b, write_cache, lambda b, *_, **__: kind, operands, attributes, mixes=mixes, aligned=aligned)[0]


def write_cache(xp: Any, cache: Any, update: Any, write_indices: Any = None, *, axis: int, mode: str) -> Any:
    starts = xp.zeros(cache.shape[0], np.int64) if write_indices is None else write_indices
    places = starts.reshape(-1, 1) + xp.arange(update.shape[axis])
    if mode == "circular":
        places = places % cache.shape[axis]
    batch = xp.arange(cache.shape[0]).reshape(-1, 1)
    result = xp.moveaxis(cache, axis, 1).copy()
    result[batch, places] = xp.moveaxis(update, axis, 1)
    return xp.moveaxis(result, 1, axis)


@operator("ReverseSequence", since=10)
def reverse_sequence(b: Builder, x: Value, sequence_lens: Value, *, batch_axis: int = 1, time_axis: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ReverseSequence.html"""
    batch, time = normal_axis(batch_axis, x.rank), normal_axis(time_axis, x.rank)
    mixes = (time,) if batch == 0 else (batch, time)
    operands, attributes, kind = (x, sequence_lens), {"batch_axis": batch, "time_axis": time}, x.type
    aligned = 2 if batch == 0 else 1
    return emit_array(b, reverse_starts, lambda b, *_, **__: kind, operands, attributes, mixes=mixes, aligned=aligned)[
        0
    ]


def reverse_starts(xp: Any, x: Any, sequence_lens: Any, *, batch_axis: int, time_axis: int) -> Any:
    """x with the first sequence_lens[i] elements along the time axis of each row i of the batch reversed."""
    shape = [1] * x.ndim
    shape[time_axis] = -1
    times = xp.arange(x.shape[time_axis]).reshape(shape)
    shape = [1] * x.ndim
    shape[batch_axis] = -1
    lengths = sequence_lens.reshape(shape)
    source = xp.where(times < lengths, lengths - 1 - times, times)
    return xp.take_along_axis(x, source, axis=time_axis)
