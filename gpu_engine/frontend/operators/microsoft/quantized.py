"""Operators whose operands and results are bytes with a scale and a zero point each.

Real numbers in between are float32, and a result is rounded once; ONNX Runtime looks some of them up in tables, so its
results may be one step away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.activation import leaky_relu
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.products import from_nhwc, to_nhwc
from gpu_engine.frontend.operators.pooling import max_pool, pool
from gpu_engine.frontend.operators.quantization import dequantize_linear, quantize_linear, quantized
from gpu_engine.frontend.operators.softmax import softmax, softmax_1
from gpu_engine.frontend.registry import emit_map, normal_axis, operator, scalar
from gpu_engine.ir import expr, ops
from gpu_engine.ir.dtypes import FLOAT32, INT32
from gpu_engine.ir.expr import Expr, cast, sigmoid, where
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops.weights import centred


def real(x: Expr, scale: Expr, zero: Expr | None) -> Expr:
    """The number that a byte stands for."""
    return centred(x, zero, FLOAT32) * scale


def one(b: Builder, value: Value | None) -> Value | None:
    """The only element of a tensor, without axes."""
    return b.emit(ops.Reshape(()), value) if value is not None and value.rank else value


def _binary(
    b: Builder, function: Callable[[Expr, Expr], Expr], first: Sequence[Value | None], second: Sequence[Value | None],
    result: Sequence[Value | None],
) -> Value:  # fmt: skip
    """`function` of two operands, each given as (bytes, scale, zero point), for a result (scale, zero point)."""
    x, y = first[0], second[0]
    assert x is not None and y is not None
    dtype = x.dtype

    def combine(
        p: Expr, ps: Expr, pz: Expr | None, q: Expr, qs: Expr, qz: Expr | None, rs: Expr, rz: Expr | None
    ) -> Expr:
        return quantized(function(real(p, ps, pz), real(q, qs, qz)) / rs, rz, dtype)

    scales = [one(b, value) for value in (*first[1:], *second[1:], *result)]
    return emit_map(b, combine, x, *scales[:2], y, *scales[2:])


@operator("QLinearAdd", since=1, domain=MICROSOFT)
def qlinear_add(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y: Value,
    y_scale: Value,
    y_zero_point: Value | None,
    z_scale: Value,
    z_zero_point: Value | None = None,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearAdd"""
    first, second = (x, x_scale, x_zero_point), (y, y_scale, y_zero_point)
    return _binary(b, lambda p, q: p + q, first, second, (z_scale, z_zero_point))


@operator("QLinearMul", since=1, domain=MICROSOFT)
def qlinear_mul(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y: Value,
    y_scale: Value,
    y_zero_point: Value | None,
    z_scale: Value,
    z_zero_point: Value | None = None,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearMul"""
    first, second = (x, x_scale, x_zero_point), (y, y_scale, y_zero_point)
    return _binary(b, lambda p, q: p * q, first, second, (z_scale, z_zero_point))


@operator("QLinearWhere", since=1, domain=MICROSOFT)
def qlinear_where(
    b: Builder,
    condition: Value,
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    y: Value,
    y_scale: Value,
    y_zero_point: Value,
    z_scale: Value,
    z_zero_point: Value,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearWhere"""
    scales = [one(b, v) for v in (x_scale, x_zero_point, y_scale, y_zero_point, z_scale, z_zero_point)]

    def choose(c: Expr, p: Expr, q: Expr, ps: Expr, pz: Expr, qs: Expr, qz: Expr, rs: Expr, rz: Expr) -> Expr:
        return quantized(where(c, real(p, ps, pz), real(q, qs, qz)) / rs, rz, x.dtype)

    return emit_map(b, choose, condition, x, y, *scales)


def _unary(
    b: Builder, function: Callable[[Expr], Expr], x: Value, scale: Value, zero: Value | None, y_scale: Value,
    y_zero: Value | None,
) -> Value:  # fmt: skip
    def apply(e: Expr, s: Expr, z: Expr | None, rs: Expr, rz: Expr | None) -> Expr:
        return quantized(function(real(e, s, z)) / rs, rz, x.dtype)

    return emit_map(b, apply, x, *(one(b, value) for value in (scale, zero, y_scale, y_zero)))


@operator("QLinearSigmoid", since=1, domain=MICROSOFT)
def qlinear_sigmoid(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y_scale: Value,
    y_zero_point: Value | None = None,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearSigmoid"""
    return _unary(b, sigmoid, x, x_scale, x_zero_point, y_scale, y_zero_point)


@operator("QLinearLeakyRelu", since=1, domain=MICROSOFT)
def qlinear_leaky_relu(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y_scale: Value,
    y_zero_point: Value | None = None,
    *,
    alpha: float = 0.01,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearLeakyRelu"""
    return _unary(b, lambda e: leaky_relu(e, alpha=alpha), x, x_scale, x_zero_point, y_scale, y_zero_point)


@operator("QLinearSoftmax", since=1, domain=MICROSOFT)
def qlinear_softmax(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y_scale: Value,
    y_zero_point: Value,
    *,
    opset: int,
    axis: int = -1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearSoftmax"""
    numbers = emit_map(b, real, x, one(b, x_scale), one(b, x_zero_point))
    y = softmax(b, numbers, axis=axis) if opset >= 13 else softmax_1(b, numbers, axis=axis)
    return quantize_linear(b, y, y_scale, y_zero_point)


@operator("QLinearConcat", since=1, domain=MICROSOFT)
def qlinear_concat(b: Builder, y_scale: Value, y_zero_point: Value, *inputs: Value, axis: int) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearConcat"""
    if not inputs or len(inputs) % 3:
        raise InvalidModel(f"{len(inputs)} operands are no triples of bytes, scale and zero point")
    parts = [
        _unary(b, lambda e: e, x, scale, zero, y_scale, y_zero_point)
        for x, scale, zero in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
    ]
    return b.emit(ops.Concat(normal_axis(axis, parts[0].rank)), *parts) if len(parts) > 1 else parts[0]


@operator("QLinearReduceMean", since=1, domain=MICROSOFT)
def qlinear_reduce_mean(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y_scale: Value,
    y_zero_point: Value | None = None,
    *,
    axes: Sequence[int],
    keepdims: int,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearReduceMean"""
    folded = tuple(sorted(normal_axis(axis, x.rank) for axis in axes)) or tuple(range(x.rank))
    numbers = emit_map(b, real, x, one(b, x_scale), one(b, x_zero_point))
    return _narrowed(b, b.emit(ops.Reduce("mean", folded, bool(keepdims)), numbers), x, y_scale, y_zero_point)


def _narrowed(b: Builder, y: Value, x: Value, scale: Value, zero: Value | None) -> Value:
    """Numbers as bytes of the type of x."""
    return quantize_linear(b, y, scale, scalar(b, 0, x.dtype) if zero is None else zero)


@operator("QLinearGlobalAveragePool", since=1, domain=MICROSOFT)
def qlinear_global_average_pool(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    y_scale: Value,
    y_zero_point: Value,
    *,
    channels_last: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearGlobalAveragePool"""
    axes = tuple(range(1, x.rank - 1)) if channels_last else tuple(range(2, x.rank))
    return qlinear_reduce_mean(b, x, x_scale, x_zero_point, y_scale, y_zero_point, axes=axes, keepdims=1)


@operator("QLinearAveragePool", since=1, domain=MICROSOFT)
def qlinear_average_pool(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None,
    y_scale: Value,
    y_zero_point: Value | None = None,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    channels_last: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearAveragePool"""
    planes = from_nhwc(b, x) if channels_last else x
    numbers = emit_map(b, real, planes, one(b, x_scale), one(b, x_zero_point))
    pooled = pool(b, numbers, "average", kernel_shape, strides, (), pads, auto_pad, ceil_mode, count_include_pad)
    y = _narrowed(b, pooled, x, y_scale, y_zero_point)
    return to_nhwc(b, y) if channels_last else y


@operator("NhwcMaxPool", since=1, domain=MICROSOFT)
def nhwc_max_pool(
    b: Builder,
    x: Value,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.NhwcMaxPool"""
    planes = from_nhwc(b, x)
    (y,) = max_pool(b, planes, kernel_shape=kernel_shape, strides=strides, dilations=dilations, pads=pads,
                    auto_pad=auto_pad, ceil_mode=ceil_mode)  # fmt: skip
    return to_nhwc(b, y)


@operator("QuantizeLinear", since=1, domain=MICROSOFT)
def microsoft_quantize_linear(
    b: Builder, x: Value, y_scale: Value, y_zero_point: Value | None = None, *, axis: int = 1
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QuantizeLinear"""
    return quantize_linear(b, x, y_scale, y_zero_point, axis=axis)


@operator("DequantizeLinear", since=1, domain=MICROSOFT)
def microsoft_dequantize_linear(
    b: Builder, x: Value, x_scale: Value, x_zero_point: Value | None = None, *, axis: int = 1
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DequantizeLinear"""
    return dequantize_linear(b, x, x_scale, x_zero_point, axis=axis)


@operator("MulInteger", since=1, domain=MICROSOFT)
def mul_integer(b: Builder, x: Value, x_zero_point: Value | None, y: Value, y_zero_point: Value | None = None) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MulInteger"""

    def product(p: Expr, pz: Expr | None, q: Expr, qz: Expr | None) -> Expr:
        return centred(p, pz, INT32) * centred(q, qz, INT32)

    return emit_map(b, product, x, one(b, x_zero_point), y, one(b, y_zero_point))


@operator("ReduceSumInteger", since=1, domain=MICROSOFT)
def reduce_sum_integer(b: Builder, x: Value, *, axes: Sequence[int], keepdims: int) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.ReduceSumInteger"""
    folded = tuple(sorted(normal_axis(axis, x.rank) for axis in axes)) or tuple(range(x.rank))
    return b.emit(ops.Reduce("sum", folded, bool(keepdims), before=cast(expr.arg(0, x.dtype), INT32)), x)
