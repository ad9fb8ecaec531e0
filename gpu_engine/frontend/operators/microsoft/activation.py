"""Activation functions, alone and behind a bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial, reduce

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators import activation as onnx_activation
from gpu_engine.frontend.operators.linear import matmul
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.retired import parametric_softplus, scaled_tanh
from gpu_engine.frontend.operators.movement import split_at
from gpu_engine.frontend.operators.softmax import softmax_1
from gpu_engine.frontend.registry import emit_map, operator, pointwise
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr, cast, clip, sigmoid
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Reduce


def _clip(x: Expr, *, alpha: float, beta: float) -> Expr:
    return clip(x, alpha, beta)


ACTIVATIONS: Mapping[str, tuple[Callable[..., Expr], tuple[str, ...]]] = {
    "Relu": (onnx_activation.relu, ()),
    "Tanh": (onnx_activation.tanh_, ()),
    "Sigmoid": (onnx_activation.sigmoid_, ()),
    "Softplus": (onnx_activation.softplus, ()),
    "Softsign": (onnx_activation.softsign, ()),
    "HardSwish": (onnx_activation.hard_swish, ()),
    "LeakyRelu": (onnx_activation.leaky_relu, ("alpha",)),
    "ThresholdedRelu": (onnx_activation.thresholded_relu, ("alpha",)),
    "Elu": (onnx_activation.elu, ("alpha",)),
    "Celu": (onnx_activation.celu, ("alpha",)),
    "Clip": (_clip, ("alpha", "beta")),
    "HardSigmoid": (onnx_activation.hard_sigmoid, ("alpha", "beta")),
    "ParametricSoftplus": (parametric_softplus, ("alpha", "beta")),
    "ScaledTanh": (scaled_tanh, ("alpha", "beta")),
    "Selu": (onnx_activation.selu, ("alpha", "gamma")),
}
"""What a fused product may be followed by, and the parameters that it takes."""


def activation_of(name: str, parameters: Mapping[str, float | None]) -> Callable[[Expr], Expr]:
    """The function of one element; parameters that it does not take are ignored, as ONNX Runtime does."""
    if not name:
        return lambda x: x
    if name not in ACTIVATIONS:
        raise InvalidModel(f"the activation {name} is not one of {', '.join(ACTIVATIONS)}")
    function, wanted = ACTIVATIONS[name]
    given = {key: parameters[key] for key in wanted if parameters.get(key) is not None}
    if name in ("Clip", "ParametricSoftplus", "ScaledTanh") and len(given) < len(wanted):
        raise InvalidModel(f"the activation {name} needs {' and '.join(wanted)}")
    return partial(function, **given)


@pointwise("Gelu", since=1, domain=MICROSOFT)
def gelu(x: Expr) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Gelu"""
    return onnx_activation.gelu(x)


@pointwise("BiasGelu", since=1, domain=MICROSOFT)
def bias_gelu(x: Expr, bias: Expr) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.BiasGelu"""
    return onnx_activation.gelu(x + bias)


@pointwise("FastGelu", since=1, domain=MICROSOFT)
def fast_gelu(x: Expr, bias: Expr | None = None) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FastGelu"""
    return onnx_activation.gelu(x if bias is None else x + bias, approximate="tanh")


@pointwise("QuickGelu", since=1, domain=MICROSOFT)
def quick_gelu(x: Expr, *, alpha: float = 1.702) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QuickGelu"""
    return x * sigmoid(alpha * x)


@operator("GemmFastGelu", since=1, domain=MICROSOFT)
def gemm_fast_gelu(b: Builder, x: Value, w: Value, bias: Value | None = None) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GemmFastGelu"""
    return emit_map(b, fast_gelu, matmul(b, x, w), bias)


@operator("BiasSplitGelu", since=1, domain=MICROSOFT)
def bias_split_gelu(b: Builder, x: Value, bias: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.BiasSplitGelu"""
    half = dims.floor_div(x.shape[-1], 2)
    left, right = split_at(b, emit_map(b, lambda e, c: e + c, x, bias), x.rank - 1, (half, half), 2)
    return emit_map(b, lambda e, g: e * onnx_activation.gelu(g), left, right)


@pointwise("BiasAdd", since=1, domain=MICROSOFT)
def bias_add(x: Expr, bias: Expr, skip: Expr) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.BiasAdd"""
    return x + bias + skip


@operator("BiasSoftmax", since=1, domain=MICROSOFT)
def bias_softmax(b: Builder, x: Value, bias: Value, *, is_inner_broadcast: int, axis: int = 1) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.BiasSoftmax

    The bias has the axes of x, 1 where it is broadcast, whichever axes these are.
    """
    return softmax_1(b, emit_map(b, lambda e, c: e + c, x, bias), axis=axis)


@pointwise("GatedAdd", since=1, domain=MICROSOFT)
def gated_add(x: Expr, y: Expr, gate: Expr) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatedAdd"""
    return x + cast(cast(y, FLOAT32) * cast(gate, FLOAT32), y.dtype)


@pointwise("ScaledSiLU", since=1, domain=MICROSOFT)
def scaled_silu(x: Expr, scale: Expr | None = None, *, alpha: float = 1.0) -> Expr:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.ScaledSiLU"""
    factor = expr.const(alpha, FLOAT32) if scale is None else cast(scale, FLOAT32)
    scaled = cast(factor * cast(x, FLOAT32), x.dtype)
    return scaled * cast(sigmoid(cast(scaled, FLOAT32)), x.dtype)


@operator("IsAllFinite", since=1, domain=MICROSOFT)
def is_all_finite(b: Builder, *inputs: Value, isinf_only: int = 0, isnan_only: int = 0) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.IsAllFinite"""
    if not inputs or (isinf_only and isnan_only):
        raise InvalidModel("IsAllFinite looks at something, for infinities or for NaN")

    def passes(x: Expr) -> Expr:
        if isnan_only:
            return ~expr.isnan(x)
        return expr.not_equal(abs(x), math.inf) if isinf_only else abs(x) < math.inf

    found = [b.emit(Reduce("min", tuple(range(x.rank)), False, before=passes(expr.arg(0, x.dtype))), x) for x in inputs]
    return reduce(lambda left, right: emit_map(b, lambda p, q: p & q, left, right), found)
