"""Logic on booleans and on bits."""

from __future__ import annotations

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import pointwise
from gpu_engine.ir.expr import Expr, clip, shift_left, shift_right, where


@pointwise("And", since=7)
def and_(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__And.html"""
    return a & b


@pointwise("Or", since=7)
def or_(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Or.html"""
    return a | b


@pointwise("Xor", since=7)
def xor(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Xor.html"""
    return a ^ b


@pointwise("Not", since=1)
def not_(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Not.html"""
    return ~x


@pointwise("BitwiseAnd", since=18)
def bitwise_and(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__BitwiseAnd.html"""
    return a & b


@pointwise("BitwiseOr", since=18)
def bitwise_or(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__BitwiseOr.html"""
    return a | b


@pointwise("BitwiseXor", since=18)
def bitwise_xor(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__BitwiseXor.html"""
    return a ^ b


@pointwise("BitwiseNot", since=18)
def bitwise_not(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__BitwiseNot.html"""
    return ~x


@pointwise("BitShift", since=11)
def bit_shift(x: Expr, y: Expr, *, direction: str) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__BitShift.html"""
    if direction not in ("LEFT", "RIGHT"):
        raise InvalidModel(f"BitShift goes LEFT or RIGHT, not {direction}")
    shift = shift_left if direction == "LEFT" else shift_right
    if x.dtype.kind == "u":
        return shift(x, y)
    bits = 8 * x.dtype.itemsize
    outside = (y < 0) | (y > bits - 1)
    nothing_left = where(x < 0, -1, x & 0) if direction == "RIGHT" else x & 0
    return where(outside, nothing_left, shift(x, clip(y, 0, bits - 1)))
