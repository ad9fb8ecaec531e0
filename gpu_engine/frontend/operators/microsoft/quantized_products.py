"""Products of bytes, exact in int32, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.integer import integer_matmul, qlinear_conv
from gpu_engine.frontend.operators.microsoft.attention import self_attention
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.products import from_nhwc, to_nhwc
from gpu_engine.frontend.operators.microsoft.quantized import one
from gpu_engine.frontend.operators.quantization import dynamic_quantize_linear, quantized
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import ops
from gpu_engine.ir.dtypes import FLOAT32, INT32, UINT32
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Value


@operator("MatMulIntegerToFloat", since=1, domain=MICROSOFT)
def matmul_integer_to_float(
    b: Builder,
    a: Value,
    w: Value,
    a_scale: Value,
    b_scale: Value,
    a_zero_point: Value | None = None,
    b_zero_point: Value | None = None,
    bias: Value | None = None,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulIntegerToFloat"""
    product = integer_matmul(b, a, w, _single(b, a_zero_point), _single(b, b_zero_point))
    return _as_numbers(b, product, _single(b, a_scale), _single(b, b_scale), bias)


@operator("DynamicQuantizeMatMul", since=1, domain=MICROSOFT)
def dynamic_quantize_matmul(
    b: Builder, a: Value, w: Value, b_scale: Value, b_zero_point: Value | None = None, bias: Value | None = None
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul"""
    whole, a_scale, a_zero = dynamic_quantize_linear(b, a)
    return matmul_integer_to_float(b, whole, w, a_scale, b_scale, a_zero, b_zero_point, bias)


def _single(b: Builder, value: Value | None) -> Value | None:
    """A value of one element without axes; others, one per column, as they are."""
    return one(b, value) if value is not None and value.shape == (1,) else value


def _as_numbers(b: Builder, product: Value, left: Value | None, right: Value | None, bias: Value | None) -> Value:
    def scaled(p: Expr, s: Expr, t: Expr, c: Expr | None) -> Expr:
        y = cast(p, FLOAT32) * (cast(s, FLOAT32) * cast(t, FLOAT32))
        return cast(y if c is None else y + cast(c, FLOAT32), s.dtype)

    return emit_map(b, scaled, product, left, right, bias)


@operator("QGemm", since=1, domain=MICROSOFT)
def qgemm(
    b: Builder,
    a: Value,
    a_scale: Value,
    a_zero_point: Value,
    w: Value,
    b_scale: Value,
    b_zero_point: Value,
    c: Value | None = None,
    y_scale: Value | None = None,
    y_zero_point: Value | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QGemm"""
    if a.rank != 2 or w.rank != 2:
        raise InvalidModel(f"QGemm of {a.type} and {w.type}, which are no matrices")
    left = b.emit(ops.Transpose((1, 0)), a) if transA else a
    right = b.emit(ops.Transpose((1, 0)), w) if transB else w
    product = integer_matmul(b, left, right, one(b, a_zero_point), _single(b, b_zero_point))
    product = product if c is None else emit_map(b, lambda p, q: p + q, product, c)
    dtype = FLOAT32 if y_zero_point is None else y_zero_point.dtype

    def finished(p: Expr, s: Expr, t: Expr, rs: Expr | None, rz: Expr | None) -> Expr:
        y = cast(p, FLOAT32) * (alpha * s * t)
        return y if rs is None else quantized(y / rs, rz, dtype)

    scales = (one(b, a_scale), _single(b, b_scale), one(b, y_scale), one(b, y_zero_point))
    return emit_map(b, finished, product, *scales)


@operator("QAttention", since=1, domain=MICROSOFT)
def qattention(
    b: Builder,
    x: Value,
    weights: Value,
    bias: Value,
    input_scale: Value,
    weight_scale: Value,
    mask_index: Value | None = None,
    input_zero_point: Value | None = None,
    weight_zero_point: Value | None = None,
    past: Value | None = None,
    *,
    num_heads: int,
    unidirectional: int = 0,
    scale: float = 0.0,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
    past_present_share_buffer: int = 0,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QAttention"""
    scales = (input_scale, weight_scale, input_zero_point, weight_zero_point)
    return self_attention(
        b,
        matmul_integer_to_float(b, x, weights, *scales, bias),
        mask_index,
        past,
        None,
        num_heads=num_heads,
        causal_only=bool(unidirectional),
        sizes=(),
        scale=scale,
        fill=mask_filter_value,
        refused=do_rotary or past_present_share_buffer,
        output_count=output_count,
    )


@operator("QLinearConv", since=1, domain=MICROSOFT)
def microsoft_qlinear_conv(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    w: Value,
    w_scale: Value,
    w_zero_point: Value,
    y_scale: Value,
    y_zero_point: Value,
    bias: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
    channels_last: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearConv

    With the channels of x and the result last, w still has ONNX's layout.
    """
    planes = from_nhwc(b, x) if channels_last else x
    y = qlinear_conv(
        b,
        planes,
        x_scale,
        x_zero_point,
        w,
        w_scale,
        w_zero_point,
        y_scale,
        y_zero_point,
        bias,
        kernel_shape=kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        group=group,
    )
    return to_nhwc(b, y) if channels_last else y


@operator("MatMulInteger16", since=1, domain=MICROSOFT)
def matmul_integer_16(b: Builder, a: Value, w: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulInteger16

    Sums wrap in 32 bits, unsigned if both operands are.
    """
    if a.rank < 2 or w.rank < 2:
        raise InvalidModel(f"a product of {a.type} and {w.type}, which are no matrices")
    wide = UINT32 if a.dtype.kind == w.dtype.kind == "u" else INT32
    return b.emit(ops.MatMul(accumulate=wide), a, w)
