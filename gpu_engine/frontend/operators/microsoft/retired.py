"""Operators that ONNX took back before opset 7 and ONNX Runtime still runs, in ONNX's own domain.

Their last description: https://github.com/onnx/onnx/blob/v1.4.1/docs/Operators.md
"""

from __future__ import annotations

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.activation import softplus
from gpu_engine.frontend.operators.movement import cut, slice_
from gpu_engine.frontend.registry import emit_map, operator, pointwise
from gpu_engine.ir.expr import Expr, tanh
from gpu_engine.ir.graph import Builder, Value


@pointwise("ScaledTanh", since=1)
def scaled_tanh(x: Expr, *, alpha: float, beta: float) -> Expr:
    """alpha * tanh(beta * x)"""
    return alpha * tanh(beta * x)


@pointwise("ParametricSoftplus", since=1)
def parametric_softplus(x: Expr, *, alpha: float, beta: float) -> Expr:
    """alpha * log(exp(beta * x) + 1)"""
    return alpha * softplus(beta * x)


@pointwise("Affine", since=1)
def affine(x: Expr, *, alpha: float = 1.0, beta: float = 0.0) -> Expr:
    """alpha * x + beta"""
    return alpha * x + beta


@pointwise("Scale", since=1)
def scale(x: Expr, *, scale: float = 1.0) -> Expr:
    """x * scale"""
    return x * scale


@operator("ImageScaler", since=1)
def image_scaler(b: Builder, x: Value, *, bias: tuple[float, ...], scale: float = 1.0) -> Value:
    """x [N, C, H, W] * scale + bias [C]"""
    shifts = b.constant(np.array(bias, x.dtype).reshape(-1, 1, 1))
    return emit_map(b, lambda e, s: e * scale + s, x, shifts)


@operator("Crop", since=1)
def crop(b: Builder, x: Value, *, border: tuple[int, ...], scale: tuple[int, ...] = ()) -> Value:
    """x [N, C, H, W] without its border (left, top, right, bottom), or the `scale` (height, width) from there on."""
    if x.rank != 4 or len(border) != 4 or len(scale) not in (0, 2):
        raise InvalidModel(f"{x.type} without a border {list(border)} in {list(scale)}")
    left, top, right, bottom = border
    height, width = scale or (x.shape[2] - top - bottom, x.shape[3] - left - right)
    return cut(b, x, {2: (top, 1, height), 3: (left, 1, width)})


@operator("DynamicSlice", since=1)
def dynamic_slice(b: Builder, x: Value, starts: Value, ends: Value, axes: Value | None = None) -> Value:
    """Slice without steps"""
    return slice_(b, x, starts, ends, axes)
