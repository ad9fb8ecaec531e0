"""Activation functions: one Expr of one element each."""

from __future__ import annotations

from gpu_engine.frontend.registry import pointwise
from gpu_engine.ir.expr import Expr, clip, erf, exp, maximum, minimum, sigmoid, tanh, where


@pointwise("Relu", since=1)
def relu(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Relu.html"""
    return maximum(x, 0)


@pointwise("Gelu", since=20)
def gelu(x: Expr, *, approximate: str = "none") -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Gelu.html"""
    if approximate == "tanh":
        return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x * 0.7071067811865476))


@pointwise("Sigmoid", since=1)
def sigmoid_(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Sigmoid.html"""
    return sigmoid(x)


@pointwise("HardSigmoid", since=1)
def hard_sigmoid(x: Expr, *, alpha: float = 0.2, beta: float = 0.5) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__HardSigmoid.html"""
    return clip(alpha * x + beta, 0, 1)


@pointwise("HardSwish", since=14)
def hard_swish(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__HardSwish.html"""
    return x * clip(x * (1 / 6) + 0.5, 0, 1)


@pointwise("LeakyRelu", since=1)
def leaky_relu(x: Expr, *, alpha: float = 0.01) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__LeakyRelu.html"""
    return where(x < 0, alpha * x, x)


@pointwise("Elu", since=1)
def elu(x: Expr, *, alpha: float = 1.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Elu.html"""
    return where(x < 0, alpha * (exp(minimum(x, 0)) - 1), x)
