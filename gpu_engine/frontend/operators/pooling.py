"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import extents_of, told, unless_known, whole_numbers
from gpu_engine.frontend.registry import emit_array, emit_map, operator
from gpu_engine.frontend.windows import Windows, split_pads, windows
from gpu_engine.ir import ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT64, compute_dtype, is_float, limits
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.linear import window_view


def pool(
    b: Builder,
    x: Value,
    kind: str,
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
    ceil_mode: int,
    count_include_pad: int = 0,
) -> Value:
    """One Pool of x [N, C, spatial...]."""
    return b.emit(_pool_op(x, kind, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode, count_include_pad), x)


def _pool_op(
    x: Value,
    kind: str,
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
    ceil_mode: int,
    count_include_pad: int = 0,
) -> ops.Pool:
    found = windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    return ops.Pool(
        kind,
        tuple(kernel_shape),
        found.strides,
        found.before,
        found.after,
        found.dilations,
        ceil_mode=bool(ceil_mode) and not same,
        count_include_pad=bool(count_include_pad),
    )


@operator("MaxPool", since=1)
def max_pool(
    b: Builder,
    x: Value,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__MaxPool.html"""
    op = _pool_op(x, "max", kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if output_count == 1:
        return (b.emit(op, x),)
    (pooled,) = op.infer(x.type)
    attributes = {
        "windows": (op.kernel, op.strides, op.before, op.dilations),
        "counts": pooled.shape[2:],
        "column_major": bool(storage_order),
    }
    types = (pooled, TensorType(INT64, pooled.shape))
    return emit_array(b, max_pool_with_indices, lambda *_, **__: types, (x,), attributes)


def max_pool_with_indices(xp: Any, x: Any, *, windows: Any, counts: tuple[int, ...], column_major: bool) -> Any:
    """The maxima of the windows of x [N, C, spatial...] and where they lie in the flattened x; the first of equals."""
    kernel, strides, before, dilations = windows
    spatial = x.shape[2:]
    after = [
        (count - 1) * stride + (size - 1) * dilation + 1 - low - extent
        for count, stride, size, dilation, low, extent in zip(
            counts, strides, kernel, dilations, before, spatial, strict=True
        )
    ]
    lowest = -np.inf if is_float(x.dtype) else limits(x.dtype)[0]
    wide = x.astype(compute_dtype(x.dtype), copy=False)
    rank = len(spatial)
    values = window_view(xp, wide, kernel, strides, before, after, dilations, lowest)
    places = np.arange(int(np.prod(spatial)), dtype=np.int64)
    places = places.reshape(spatial[::-1]).T if column_major else places.reshape(spatial)
    places = window_view(xp, xp.asarray(places)[None, None], kernel, strides, before, after, dilations, -1)
    values = values.reshape(*values.shape[: 2 + rank], -1)
    places = xp.broadcast_to(places.reshape(1, 1, *counts, -1), values.shape)
    best = xp.where(places < 0, False, values == values.max(axis=-1, keepdims=True)).argmax(axis=-1)[..., None]
    maxima = xp.take_along_axis(values, best, axis=-1)[..., 0]
    index = xp.take_along_axis(places, best, axis=-1)[..., 0]
    planes = xp.arange(x.shape[0] * x.shape[1], dtype=np.int64).reshape(*x.shape[:2], *(1,) * rank)
    return maxima, index + planes * int(np.prod(spatial))


@operator("AveragePool", since=1)
def average_pool(
    b: Builder,
    x: Value,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__AveragePool.html"""
    return pool(b, x, "average", kernel_shape, strides, dilations, pads, auto_pad, ceil_mode, count_include_pad)


@operator("LpPool", since=1)
def lp_pool(
    b: Builder,
    x: Value,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    p: float = 2,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__LpPool.html"""
    powers = emit_map(b, lambda e: abs(_widened(e)) ** p, x)
    total = pool(b, powers, "sum", kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return emit_map(b, lambda e: cast(e ** (1 / p), x.dtype), total)


@operator("GlobalAveragePool", since=1)
def global_average_pool(b: Builder, x: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GlobalAveragePool.html"""
    return b.emit(ops.Reduce("mean", tuple(range(2, x.rank)), True), x)


@operator("GlobalMaxPool", since=1)
def global_max_pool(b: Builder, x: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GlobalMaxPool.html"""
    return b.emit(ops.Reduce("max", tuple(range(2, x.rank)), True), x)


@operator("GlobalLpPool", since=1)
def global_lp_pool(b: Builder, x: Value, *, p: float = 2) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GlobalLpPool.html"""
    powers = emit_map(b, lambda e: abs(_widened(e)) ** p, x)
    total = b.emit(ops.Reduce("sum", tuple(range(2, x.rank)), True), powers)
    return emit_map(b, lambda e: cast(e ** (1 / p), x.dtype), total)


def _widened(x: Expr) -> Expr:
    return cast(x, compute_dtype(x.dtype))


@operator("MaxUnpool", since=9)
def max_unpool(
    b: Builder,
    x: Value,
    indices: Value,
    output_shape: Value | None = None,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    pads: Sequence[int] = (),
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__MaxUnpool.html

    Indices count in the smallest input that pools to x; a greater output_shape keeps the coordinates they mean.
    """
    found = windows(x.shape[2:], kernel_shape, strides)
    before, after = split_pads(pads, x.rank - 2)
    smallest = (*x.shape[:2], *_unpooled(x.shape[2:], found, before, after))
    shape: Sequence[Dim] = smallest
    if output_shape is not None:
        shape = extents_of(b, output_shape, x.rank)
        if len(shape) != x.rank:
            raise InvalidModel(f"output_shape {list(shape)} for {x.type}")
    kind = TensorType(x.dtype, tuple(shape))
    attributes = {"smallest": smallest, "shape": told(output_shape)}
    (result,) = emit_array(b, _unpool, lambda *_, **__: kind, (x, indices, unless_known(output_shape)), attributes)
    return result


def _unpooled(spatial: Sequence[Dim], found: Windows, before: Sequence[Dim], after: Sequence[Dim]) -> tuple[Dim, ...]:
    return tuple(
        (extent - 1) * stride + kernel - low - high
        for extent, stride, kernel, low, high in zip(spatial, found.strides, found.kernel, before, after, strict=True)
    )


def _unpool(xp: Any, x: Any, indices: Any, output_shape: Any, *, smallest: tuple[int, ...], shape: Any) -> Any:
    shape = whole_numbers(shape, output_shape) or smallest
    if tuple(smallest) != shape:
        coordinates = xp.unravel_index(indices.ravel(), smallest)
        indices = xp.ravel_multi_index(coordinates, shape)
    result = xp.zeros(int(np.prod(shape)), x.dtype)
    result[indices.ravel()] = x.ravel()
    return result.reshape(shape)
