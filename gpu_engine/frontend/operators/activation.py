"""Activation functions: one Expr of one element each."""

from __future__ import annotations

from gpu_engine.frontend.registry import pointwise
from gpu_engine.ir.dtypes import FLOAT64, is_float
from gpu_engine.ir.expr import Expr, cast, clip, equal, erf, exp, log, maximum, minimum, sigmoid, tanh, where


def log1p(x: Expr) -> Expr:
    """log(1 + x) for x >= 0 to rounding, however small x is (https://doi.org/10.1145/103162.103163, theorem 4)."""
    grown = 1 + x
    return where(equal(grown, 1), x, log(grown) * (x / (grown - 1)))


def expm1(x: Expr) -> Expr:
    """exp(x) - 1 for x <= 0, exact to rounding however small x is."""
    half = tanh(0.5 * x)
    return 2 * half / (1 - half)


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


@pointwise("Tanh", since=1)
def tanh_(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Tanh.html"""
    return tanh(x)


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


@pointwise("PRelu", since=7)
def prelu(x: Expr, slope: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__PRelu.html"""
    return where(x < 0, slope * x, x)


@pointwise("ThresholdedRelu", since=1)
def thresholded_relu(x: Expr, *, alpha: float = 1.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__ThresholdedRelu.html"""
    return where(x > alpha, x, 0)


@pointwise("Elu", since=1)
def elu(x: Expr, *, alpha: float = 1.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Elu.html"""
    return where(x < 0, alpha * expm1(minimum(x, 0)), x)


@pointwise("Celu", since=12)
def celu(x: Expr, *, alpha: float = 1.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Celu.html"""
    return where(x < 0, alpha * expm1(minimum(x, 0) / alpha), x)


@pointwise("Selu", since=1)
def selu(x: Expr, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Selu.html"""
    return gamma * where(x < 0, alpha * expm1(minimum(x, 0)), x)


@pointwise("Softplus", since=1)
def softplus(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Softplus.html"""
    return maximum(x, 0) + log1p(exp(-abs(x)))


@pointwise("Softsign", since=1)
def softsign(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Softsign.html"""
    return x / (1 + abs(x))


@pointwise("Mish", since=18)
def mish(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Mish.html

    tanh(log(1 + e)) is e (e + 2) / (e (e + 2) + 2) with e = exp(x), and 1 in float32 and float64 beyond x = 20.
    """
    grown = exp(minimum(x, 20))
    grown = grown * (grown + 2)
    return x * (grown / (grown + 2))


@pointwise("Swish", since=24)
def swish(x: Expr, *, alpha: float = 1.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Swish.html"""
    return x * sigmoid(alpha * x)


@pointwise("SwiGLU", since=28)
def swiglu(a: Expr, b: Expr, *, alpha: float = 1.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__SwiGLU.html"""
    return a * sigmoid(alpha * a) * b


@pointwise("Shrink", since=9)
def shrink(x: Expr, *, bias: float = 0.0, lambd: float = 0.5) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Shrink.html"""
    wide = x if is_float(x.dtype) else cast(x, FLOAT64)
    return cast(where(wide < -lambd, wide + bias, where(wide > lambd, wide - bias, 0)), x.dtype)
