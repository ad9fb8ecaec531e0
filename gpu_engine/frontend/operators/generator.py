"""Operators that make tensors from numbers and shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import room
from gpu_engine.frontend.operators.comparison import where
from gpu_engine.frontend.operators.einsum import position
from gpu_engine.frontend.operators.operands import fresh_type, known_extents, known_scalar, static_length
from gpu_engine.frontend.registry import emit_array, emit_map, normal_axis, operator, scalar
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT64, STRING, compute_dtype, from_onnx, is_float
from gpu_engine.ir.expr import cast
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Expand, Gather, Iota, Reshape

Array = NDArray[Any]


@operator("Constant", since=1)
def constant(
    b: Builder,
    *,
    value: Array | None = None,
    sparse_value: Array | None = None,
    value_float: float | None = None,
    value_floats: tuple[float, ...] | None = None,
    value_int: int | None = None,
    value_ints: tuple[int, ...] | None = None,
    value_string: str | None = None,
    value_strings: tuple[str, ...] | None = None,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Constant.html"""
    given: list[Array] = [array for array in (value, sparse_value) if array is not None]
    given += [np.array(x, FLOAT32) for x in (value_float, value_floats) if x is not None]
    given += [np.array(x, INT64) for x in (value_int, value_ints) if x is not None]
    given += [np.array(x, object) for x in (value_string, value_strings) if x is not None]
    if len(given) != 1:
        raise InvalidModel(f"Constant holds {len(given)} values, not one")
    return b.constant(given[0])


@operator("ConstantOfShape", since=9)
def constant_of_shape(b: Builder, shape: Value, *, value: Array | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ConstantOfShape.html"""
    fill = b.constant(np.zeros((), np.float32) if value is None else value.reshape(()))
    extents = known_extents(shape)
    if extents is not None:
        if any(isinstance(extent, int) and extent < 0 for extent in extents):
            raise InvalidModel(f"a tensor of the shape {extents}")
        return b.emit(Expand(tuple(extents)), fill) if extents else fill
    rank = static_length(shape, "a shape")
    return emit_array(b, fill_shape, lambda b, fill, shape: fresh_type(b, fill.type, rank), (fill, shape), {})[0]


def fill_shape(xp: Any, fill: Any, shape: Any) -> Any:
    return xp.broadcast_to(fill, room(shape.ravel()))


@operator("Range", since=11)
def range_(b: Builder, start: Value, limit: Value, delta: Value, *, stash_type: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Range.html"""
    count = _known_count(start, limit, delta)
    if count is None:
        kind = TensorType(start.dtype, (b.fresh_dim(),))
        return emit_array(b, count_up, lambda b, *_: kind, (start, limit, delta), {})[0]
    if _is_only(start, 0) and _is_only(delta, 1):
        return b.emit(Iota(count, start.dtype))
    index = b.emit(Iota(count, INT64))
    wide = compute_dtype(start.dtype)
    return emit_map(
        b,
        lambda i, first, step: cast(cast(first, wide) + cast(i, wide) * cast(step, wide), first.dtype),
        index,
        *(b.emit(Reshape(()), value) for value in (start, delta)),
    )


def _known_count(start: Value, limit: Value, delta: Value) -> Dim | None:
    """How many elements a range has, where the compiler can tell."""
    constants = [value.constant for value in (start, limit, delta) if value.constant is not None]
    if len(constants) == 3:
        return range_count(*(array.ravel()[0].item() for array in constants))
    if is_float(start.dtype):
        return None
    first, last, step = (known_scalar(value) for value in (start, limit, delta))
    if first is None or last is None or not isinstance(step, int) or step == 0:
        return None
    steps = dims.ceil_div(last - first, step) if step > 0 else dims.ceil_div(first - last, -step)
    return dims.maximum(0, steps)


def _is_only(value: Value, number: int) -> bool:
    return value.constant is not None and bool((value.constant == number).all())


def range_count(start: float, limit: float, delta: float) -> int:
    if delta == 0:
        raise InvalidModel("Range by steps of 0")
    if isinstance(start, int):
        return max(0, int(-((start - limit) // delta)))
    return max(0, math.ceil((limit - start) / delta))


def count_up(xp: Any, start: Any, limit: Any, delta: Any) -> Any:
    first, last, step = (array.ravel()[0].item() for array in (start, limit, delta))
    index = xp.arange(*room([range_count(first, last, step)]))
    wide = compute_dtype(start.dtype)
    return wide.type(first) + index.astype(wide) * wide.type(step)


@operator("EyeLike", since=9)
def eye_like(b: Builder, x: Value, *, dtype: int | None = None, k: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__EyeLike.html"""
    if x.rank != 2:
        raise InvalidModel(f"EyeLike of {x.type}, which is no matrix")
    kind = x.dtype if dtype is None else from_onnx(dtype)
    rows, columns = (position(b, x, axis) for axis in (0, 1))
    return emit_map(b, lambda i, j: cast(expr.equal(i + k, j), kind), rows, columns)


@operator("Trilu", since=14)
def trilu(b: Builder, x: Value, k: Value | None = None, *, upper: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Trilu.html"""
    if x.rank < 2:
        raise InvalidModel(f"Trilu of {x.type}")
    rows, columns = (position(b, x, axis) for axis in (x.rank - 2, x.rank - 1))
    diagonal = scalar(b, 0, INT64) if k is None else b.emit(Reshape(()), k)
    if x.dtype == STRING:
        kept = emit_map(b, lambda i, j, d: j - i >= d if upper else j - i <= d, rows, columns, diagonal)
        return where(b, kept, x, b.constant(np.array("", object)))
    zero = expr.const(0, x.dtype)
    return emit_map(
        b,
        lambda x, i, j, d: expr.where(j - i >= d if upper else j - i <= d, x, zero),
        x,
        rows,
        columns,
        diagonal,
    )


@operator("OneHot", since=9)
def one_hot(b: Builder, indices: Value, depth: Value, values: Value, *, axis: int = -1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__OneHot.html"""
    axis = normal_axis(axis, indices.rank + 1)
    count = _known_depth(depth)
    if count is None:
        shape = (*indices.shape[:axis], b.fresh_dim(), *indices.shape[axis:])
        kind = TensorType(values.dtype, shape)
        operands = (indices, depth, values)
        return emit_array(b, one_hot_of, lambda b, *_, **__: kind, operands, {"axis": axis})[0]
    picks = b.emit(Reshape((*indices.shape[:axis], 1, *indices.shape[axis:])), indices)
    places = b.emit(Reshape((count,) + (1,) * (indices.rank - axis)), b.emit(Iota(count, INT64)))
    off, on = (b.emit(Gather(0), values, scalar(b, i, INT64)) for i in (0, 1))
    return emit_map(
        b,
        lambda i, place, n, off, on: expr.where(
            expr.equal(cast(i, INT64), place) | expr.equal(cast(i, INT64) + n, place), on, off
        ),
        picks,
        places,
        b.shape_constant(np.array(count, object)),
        off,
        on,
    )


def _known_depth(depth: Value) -> Dim | None:
    if depth.constant is not None:
        return int(depth.constant.ravel()[0])
    return known_scalar(depth)


def one_hot_of(xp: Any, indices: Any, depth: Any, values: Any, *, axis: int) -> Any:
    """OneHot of a depth that only running tells."""
    count = int(depth.ravel()[0])
    room((count, *indices.shape))
    picks = xp.expand_dims(indices.astype(np.int64), axis)
    places = xp.arange(count).reshape((count,) + (1,) * (indices.ndim - axis))
    return xp.where((picks == places) | (picks + count == places), values[1], values[0])
