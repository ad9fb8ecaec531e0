"""Shapes: reading them, and giving tensors other ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import DependsOnValues, InvalidModel
from gpu_engine.frontend.extents import room
from gpu_engine.frontend.operators.operands import fresh_type, known_extents, normal_axes, static_length
from gpu_engine.frontend.registry import emit_array, operator
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Expand, Reshape, Transpose
from gpu_engine.ir.ops.pointwise import broadcast_shapes


@operator("Identity", since=1)
def identity(b: Builder, x: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Identity.html"""
    return x


@operator("Shape", since=1)
def shape(b: Builder, x: Value, *, start: int = 0, end: int | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Shape.html"""
    return b.shape_constant(x.shape[start:end])


@operator("Size", since=1)
def size(b: Builder, x: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Size.html"""
    return b.shape_constant(np.array(dims.product(x.shape), object))


@operator("Reshape", since=5)
def reshape(b: Builder, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Reshape.html"""
    target = known_extents(shape)
    if target is not None:
        return b.emit(Reshape(target_shape(x, target, bool(allowzero))), x)
    rank = static_length(shape, "a shape")
    attributes = {"allowzero": allowzero}
    return emit_array(b, reshape_to, lambda b, x, shape, **_: fresh_type(b, x.type, rank), (x, shape), attributes)[0]


def target_shape(x: Value, target: Sequence[Dim], allowzero: bool) -> tuple[Dim, ...]:
    """The shape that `target` spells for x: 0 copies the extent of x unless `allowzero`, -1 is inferred."""
    extents: list[Dim] = []
    for axis, extent in enumerate(target):
        if extent == 0 and not allowzero:
            if axis >= x.rank:
                raise InvalidModel(f"a reshape of {x.type} to {list(target)} copies axis {axis}")
            extent = x.shape[axis]
        extents.append(extent)
    free = [axis for axis, extent in enumerate(target) if extent == -1]
    if len(free) > 1 or any(isinstance(extent, int) and extent < -1 for extent in extents):
        raise InvalidModel(f"{x.type} cannot be reshaped to {list(target)}")
    if free:
        extents[free[0]] = 1
        total, rest = dims.product(x.shape), dims.product(extents)
        if rest == 0:
            raise InvalidModel(f"a reshape of {x.type} to {list(target)} leaves -1 open")
        extents[free[0]] = dims.floor_div(total, rest)
    return tuple(extents)


def reshape_to(xp: Any, x: Any, shape: Any, *, allowzero: int) -> Any:
    extents = [int(extent) for extent in shape.ravel()]
    if not allowzero:
        extents = [x.shape[axis] if extent == 0 else extent for axis, extent in enumerate(extents)]
    return x.reshape(extents)


@operator("Flatten", since=1)
def flatten(b: Builder, x: Value, *, axis: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Flatten.html"""
    if not -x.rank <= axis <= x.rank:
        raise InvalidModel(f"Flatten of {x.type} at axis {axis}")
    cut = axis if axis >= 0 else axis + x.rank
    return b.emit(Reshape((dims.product(x.shape[:cut]), dims.product(x.shape[cut:]))), x)


@operator("Squeeze", since=1)
def squeeze_1(b: Builder, x: Value, *, axes: tuple[int, ...] | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Squeeze.html (axes as an attribute)"""
    return squeezed(b, x, axes)


@operator("Squeeze", since=13)
def squeeze(b: Builder, x: Value, axes: Value | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Squeeze.html"""
    chosen = known_extents(axes)
    if axes is None or chosen is not None:
        return squeezed(b, x, chosen)
    rank = x.rank - static_length(axes, "axes")
    return emit_array(b, squeeze_at, lambda b, x, axes: fresh_type(b, x.type, rank), (x, axes), {})[0]


def squeezed(b: Builder, x: Value, axes: Sequence[Dim] | None) -> Value:
    """x without `axes`, by default all of extent 1."""
    if axes is None:
        if any(not isinstance(extent, int) for extent in x.shape):
            raise DependsOnValues(f"{b.source}: the rank of {x.type} squeezed of all ones depends on the run")
        dropped = tuple(axis for axis, extent in enumerate(x.shape) if extent == 1)
    else:
        dropped = normal_axes(axes, x.rank)
    wrong = [axis for axis in dropped if isinstance(x.shape[axis], int) and x.shape[axis] != 1]
    if wrong:
        raise InvalidModel(f"Squeeze of {x.type} at axis {wrong[0]}, whose extent is not 1")
    return b.emit(Reshape(tuple(extent for axis, extent in enumerate(x.shape) if axis not in dropped)), x)


def squeeze_at(xp: Any, x: Any, axes: Any) -> Any:
    return xp.squeeze(x, tuple(int(axis) for axis in axes.ravel()))


@operator("Unsqueeze", since=1)
def unsqueeze_1(b: Builder, x: Value, *, axes: tuple[int, ...]) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Unsqueeze.html (axes as an attribute)"""
    return unsqueezed(b, x, axes)


@operator("Unsqueeze", since=13)
def unsqueeze(b: Builder, x: Value, axes: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Unsqueeze.html"""
    chosen = known_extents(axes)
    if chosen is not None:
        return unsqueezed(b, x, chosen)
    rank = x.rank + static_length(axes, "axes")
    return emit_array(b, unsqueeze_at, lambda b, x, axes: fresh_type(b, x.type, rank), (x, axes), {})[0]


def unsqueezed(b: Builder, x: Value, axes: Sequence[Dim]) -> Value:
    """x with extents of 1 added where the result has `axes`."""
    rank = x.rank + len(axes)
    added, kept = normal_axes(axes, rank), iter(x.shape)
    return b.emit(Reshape(tuple(1 if axis in added else next(kept) for axis in range(rank))), x)


def unsqueeze_at(xp: Any, x: Any, axes: Any) -> Any:
    return xp.expand_dims(x, tuple(int(axis) for axis in axes.ravel()))


@operator("Transpose", since=1)
def transpose(b: Builder, x: Value, *, perm: tuple[int, ...] | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Transpose.html"""
    order = tuple(reversed(range(x.rank))) if perm is None else normal_axes(perm, x.rank)
    return x if order == tuple(range(x.rank)) else b.emit(Transpose(order), x)


@operator("Expand", since=8)
def expand(b: Builder, x: Value, shape: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Expand.html"""
    target = known_extents(shape)
    if target is not None:
        return expanded(b, x, target)
    rank = max(x.rank, static_length(shape, "a shape"))
    return emit_array(b, expand_to, lambda b, x, shape: fresh_type(b, x.type, rank), (x, shape), {})[0]


def expanded(b: Builder, x: Value, target: Sequence[Dim]) -> Value:
    """x broadcast with a tensor of the shape `target`."""
    joined = broadcast_shapes(x.shape, tuple(target))
    return x if joined == x.shape else b.emit(Expand(joined), x)


def expand_to(xp: Any, x: Any, shape: Any) -> Any:
    return xp.broadcast_to(x, room(np.broadcast_shapes(x.shape, tuple(int(extent) for extent in shape.ravel()))))
