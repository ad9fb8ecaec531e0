"""Elementwise arithmetic."""

from __future__ import annotations

from gpu_engine.frontend.registry import pointwise
from gpu_engine.ir.expr import Expr


@pointwise("Add", since=7)
def add(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Add.html"""
    return a + b


@pointwise("Mul", since=7)
def mul(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Mul.html"""
    return a * b
