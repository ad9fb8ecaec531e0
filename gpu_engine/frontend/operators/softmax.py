"""Softmax, its logarithm, and Hardmax."""

from __future__ import annotations

from collections.abc import Callable

from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.expr import cast, equal
from gpu_engine.ir.graph import Builder, Value

Along = Callable[[Builder, Value, int], Value]


@operator("Softmax", since=13)
def softmax(b: Builder, x: Value, *, axis: int = -1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Softmax.html"""
    return _softmax(b, x, normal_axis(axis, x.rank))


@operator("Softmax", since=1)
def softmax_1(b: Builder, x: Value, *, axis: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Softmax.html before opset 13: over all axes from `axis`"""
    return flattened(b, x, axis, _softmax)


@operator("LogSoftmax", since=13)
def log_softmax(b: Builder, x: Value, *, axis: int = -1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__LogSoftmax.html"""
    return _log_softmax(b, x, normal_axis(axis, x.rank))


@operator("LogSoftmax", since=1)
def log_softmax_1(b: Builder, x: Value, *, axis: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__LogSoftmax.html before opset 13: over all axes from `axis`"""
    return flattened(b, x, axis, _log_softmax)


@operator("Hardmax", since=13)
def hardmax(b: Builder, x: Value, *, axis: int = -1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Hardmax.html"""
    return _hardmax(b, x, normal_axis(axis, x.rank))


@operator("Hardmax", since=1)
def hardmax_1(b: Builder, x: Value, *, axis: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Hardmax.html before opset 13: over all axes from `axis`"""
    return flattened(b, x, axis, _hardmax)


def flattened(b: Builder, x: Value, axis: int, along: Along) -> Value:
    """`along` the second axis of x as a matrix whose columns are all axes from `axis`."""
    axis = axis + x.rank if axis < 0 else axis
    if axis == x.rank - 1:
        return along(b, x, axis)
    matrix = b.emit(ops.Reshape((dims.product(x.shape[:axis]), dims.product(x.shape[axis:]))), x)
    return b.emit(ops.Reshape(x.shape), along(b, matrix, 1))


def _softmax(b: Builder, x: Value, axis: int) -> Value:
    return b.emit(ops.Softmax(axis), x)


def _log_softmax(b: Builder, x: Value, axis: int) -> Value:
    return b.emit(ops.Softmax(axis, log=True), x)


def _hardmax(b: Builder, x: Value, axis: int) -> Value:
    best = b.emit(ops.ArgReduce("max", axis, True, False), x)
    places = b.emit(ops.Iota(x.shape[axis], INT64))
    places = b.emit(ops.Reshape((x.shape[axis], *(1,) * (x.rank - axis - 1))), places)
    return emit_map(b, lambda place, index: cast(equal(place, index), x.dtype), places, best)
