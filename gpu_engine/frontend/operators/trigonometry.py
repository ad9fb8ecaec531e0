"""Trigonometric and hyperbolic functions."""

from __future__ import annotations

from gpu_engine.frontend.registry import pointwise
from gpu_engine.ir import expr
from gpu_engine.ir.expr import Expr


@pointwise("Sin", since=7)
def sin(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Sin.html"""
    return expr.sin(x)


@pointwise("Cos", since=7)
def cos(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Cos.html"""
    return expr.cos(x)


@pointwise("Tan", since=7)
def tan(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Tan.html"""
    return expr.tan(x)


@pointwise("Asin", since=7)
def asin(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Asin.html"""
    return expr.asin(x)


@pointwise("Acos", since=7)
def acos(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Acos.html"""
    return expr.acos(x)


@pointwise("Atan", since=7)
def atan(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Atan.html"""
    return expr.atan(x)


@pointwise("Sinh", since=9)
def sinh(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Sinh.html"""
    return expr.sinh(x)


@pointwise("Cosh", since=9)
def cosh(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Cosh.html"""
    return expr.cosh(x)


@pointwise("Asinh", since=9)
def asinh(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Asinh.html"""
    return expr.asinh(x)


@pointwise("Acosh", since=9)
def acosh(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Acosh.html"""
    return expr.acosh(x)


@pointwise("Atanh", since=9)
def atanh(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Atanh.html"""
    return expr.atanh(x)
