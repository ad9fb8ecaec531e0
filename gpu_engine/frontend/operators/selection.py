"""Sorting and selecting: results whose extents may depend on the data."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.operands import fresh_at, known_scalar
from gpu_engine.frontend.registry import array_operator, emit_array, normal_axis, operator
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.selection import top_of, unique


@operator("TopK", since=1)
def top_k_1(b: Builder, x: Value, *, axis: int = -1, k: int) -> tuple[Value, ...]:
    """https://onnx.ai/onnx/operators/onnx__TopK.html (k as an attribute)"""
    return top_k(b, x, b.constant(np.array([k])), axis=axis)


@operator("TopK", since=10)
def top_k(b: Builder, x: Value, k: Value, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Value, ...]:
    """https://onnx.ai/onnx/operators/onnx__TopK.html

    Of equal elements the one with the lower index comes first; NaN counts as greater than all numbers. The result is
    sorted whatever `sorted` says.
    """
    axis = normal_axis(axis, x.rank)
    count, extent = known_scalar(k), x.shape[axis]
    if isinstance(count, int) and isinstance(extent, int) and not 0 <= count <= extent:
        raise InvalidModel(f"the top {count} along axis {axis} of {x.type}")
    values = fresh_at(b, x.type, (axis,)) if count is None else _with_extent(x.type, axis, count)
    types = (values, TensorType(INT64, values.shape))
    attributes = {"axis": axis, "largest": bool(largest), "count": count}
    operands = (x, k if count is None else None)
    return emit_array(b, top_of, lambda b, x, k, **_: types, operands, attributes, mixes=(axis,))


def _with_extent(kind: TensorType, axis: int, extent: Dim) -> TensorType:
    return TensorType(kind.dtype, (*kind.shape[:axis], extent, *kind.shape[axis + 1 :]))


def _non_zero_type(b: Builder, x: Value) -> TensorType:
    return TensorType(INT64, (x.rank, b.fresh_dim()))


@array_operator("NonZero", since=9, infer=_non_zero_type)
def non_zero(xp: Any, x: Any) -> Any:
    """https://onnx.ai/onnx/operators/onnx__NonZero.html"""
    if x.ndim == 0:
        return xp.zeros((0, int(bool(x))), np.int64)
    return xp.stack(xp.nonzero(x))


def _compress_type(b: Builder, x: Value, condition: Value, *, axis: int | None = None) -> TensorType:
    if axis is None:
        return TensorType(x.dtype, (b.fresh_dim(),))
    return fresh_at(b, x.type, (normal_axis(axis, x.rank),))


@array_operator("Compress", since=9, infer=_compress_type)
def compress(xp: Any, x: Any, condition: Any, *, axis: int | None = None) -> Any:
    """https://onnx.ai/onnx/operators/onnx__Compress.html"""
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis % x.ndim)
    (chosen,) = xp.nonzero(condition[: x.shape[axis]])
    return xp.take(x, chosen, axis=axis)


def _unique_types(b: Builder, x: Value, *, axis: int | None = None, sorted: int = 1) -> tuple[TensorType, ...]:
    count = b.fresh_dim()
    if axis is None:
        values, all_ = TensorType(x.dtype, (count,)), dims.product(x.shape)
    else:
        axis = normal_axis(axis, x.rank)
        values, all_ = _with_extent(x.type, axis, count), x.shape[axis]
    return (values, TensorType(INT64, (count,)), TensorType(INT64, (all_,)), TensorType(INT64, (count,)))


array_operator("Unique", since=11, infer=_unique_types)(unique)
