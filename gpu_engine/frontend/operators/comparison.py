"""Comparisons and selection by a condition."""

from __future__ import annotations

from typing import Any

from gpu_engine.frontend.registry import emit_array, emit_map, operator, pointwise
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BOOL, STRING
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.pointwise import broadcast_shapes


@operator("Equal", since=7)
def equal(b: Builder, x: Value, y: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Equal.html"""
    if STRING not in (x.dtype, y.dtype):
        return emit_map(b, expr.equal, x, y)
    kind = TensorType(BOOL, broadcast_shapes(x.shape, y.shape))
    return emit_array(b, _equal_strings, lambda b, x, y: kind, (x, y), {}, host=True)[0]


def _equal_strings(xp: Any, x: Any, y: Any) -> Any:
    return xp.asarray(xp.equal(x, y), bool)


@pointwise("Greater", since=7)
def greater(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Greater.html"""
    return a > b


@pointwise("Less", since=7)
def less(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Less.html"""
    return a < b


@pointwise("GreaterOrEqual", since=12)
def greater_or_equal(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__GreaterOrEqual.html"""
    return a >= b


@pointwise("LessOrEqual", since=12)
def less_or_equal(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__LessOrEqual.html"""
    return a <= b


@pointwise("IsNaN", since=9)
def is_nan(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__IsNaN.html"""
    return expr.isnan(x)


@pointwise("IsInf", since=10)
def is_inf(x: Expr, *, detect_negative: int = 1, detect_positive: int = 1) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__IsInf.html"""
    if detect_negative and detect_positive:
        return expr.isinf(x)
    if detect_negative or detect_positive:
        return expr.equal(x, float("-inf" if detect_negative else "inf"))
    return x < x


@operator("Where", since=9)
def where(b: Builder, condition: Value, x: Value, y: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Where.html"""
    if STRING not in (x.dtype, y.dtype):
        return emit_map(b, expr.where, condition, x, y)
    kind = TensorType(STRING, broadcast_shapes(condition.shape, x.shape, y.shape))
    return emit_array(b, _where_strings, lambda b, condition, x, y: kind, (condition, x, y), {}, host=True)[0]


def _where_strings(xp: Any, condition: Any, x: Any, y: Any) -> Any:
    return xp.where(condition, x, y)
