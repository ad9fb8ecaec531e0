"""Products of quantised tensors: int8 and uint8 operands, sums in int32 that wrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_engine.frontend.operators.convolution import kernel_extents, per_channel, with_bias
from gpu_engine.frontend.operators.quantization import quantized
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.frontend.windows import Windows, windows
from gpu_engine.ir import expr, ops
from gpu_engine.ir.dtypes import FLOAT32, INT16, INT32, is_float
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops.weights import centred


@operator("MatMulInteger", since=10)
def matmul_integer(
    b: Builder, a: Value, w: Value, a_zero_point: Value | None = None, b_zero_point: Value | None = None
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__MatMulInteger.html"""
    return integer_matmul(b, a, w, a_zero_point, b_zero_point)


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    b: Builder,
    a: Value,
    a_scale: Value,
    a_zero_point: Value,
    w: Value,
    b_scale: Value,
    b_zero_point: Value,
    y_scale: Value,
    y_zero_point: Value,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html"""
    if is_float(a.dtype) or is_float(w.dtype):
        product = b.emit(ops.MatMul(), *(
            emit_map(b, lambda e, z: centred(e, z, FLOAT32), value, zero)
            for value, zero in ((a, _per_row(b, a_zero_point)), (w, b_zero_point))))  # fmt: skip
    else:
        product = integer_matmul(b, a, w, a_zero_point, b_zero_point)
    scales = (_per_row(b, a_scale), b_scale, y_scale)
    return _requantized(b, product, scales, y_zero_point)


@operator("ConvInteger", since=10)
def conv_integer(
    b: Builder,
    x: Value,
    w: Value,
    x_zero_point: Value | None = None,
    w_zero_point: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ConvInteger.html"""
    found = windows(x.shape[2:], kernel_extents(w, kernel_shape), strides, dilations, pads, auto_pad)
    return integer_conv(b, x, w, x_zero_point, w_zero_point, found, group)


@operator("QLinearConv", since=10)
def qlinear_conv(
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
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__QLinearConv.html"""
    found = windows(x.shape[2:], kernel_extents(w, kernel_shape), strides, dilations, pads, auto_pad)
    product = with_bias(b, integer_conv(b, x, w, x_zero_point, w_zero_point, found, group), bias)
    scales = (_one(b, x_scale), _channels(b, w_scale, x.rank), _one(b, y_scale))
    return _requantized(b, product, scales, _one(b, y_zero_point))


def integer_matmul(b: Builder, a: Value, w: Value, a_zero: Value | None, w_zero: Value | None) -> Value:
    """(a - a_zero) times (w - w_zero) in int32; operands of one axis as numpy.matmul takes them.

    The product is taken of the bytes as they are and corrected by sums of rows and columns: of constant weights these
    are constants.
    """
    if a.rank == 1 or w.rank == 1:
        return _vector_product(b, a, w, a_zero, w_zero)
    a_zero, w_zero = _unless_zero(a_zero), _unless_zero(w_zero)
    if w.constant is None and isinstance(a.shape[-1], int):
        left = _centred(b, a, None if a_zero is None else _per_row(b, a_zero))
        return b.emit(ops.MatMul(accumulate=INT32), left, _centred(b, w, w_zero))
    product = b.emit(ops.MatMul(accumulate=INT32), a, w)
    if a_zero is not None:
        columns = b.emit(ops.Reduce("sum", (w.rank - 2,), True, before=cast(expr.arg(0, w.dtype), INT32)), w)
        product = emit_map(b, _minus_product, product, _per_row(b, a_zero), columns)
    if w_zero is not None:
        rows = emit_map(b, lambda e, z: centred(e, z, INT32), a, None if a_zero is None else _per_row(b, a_zero))
        rows = b.emit(ops.Reduce("sum", (rows.rank - 1,), True), rows)
        product = emit_map(b, _minus_product, product, w_zero, rows)
    return product


def integer_conv(
    b: Builder, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None, found: Windows, group: int
) -> Value:
    """The convolution of x - x_zero with w - w_zero in int32: padding is x_zero."""
    image = _centred(b, x, None if x_zero is None else _one(b, x_zero))
    weights = _centred(b, w, None if w_zero is None else _first_axis(b, w_zero, w.rank))
    op = ops.Conv(found.strides, found.before, found.after, found.dilations, group, accumulate=INT32)
    return b.emit(op, image, weights)


def _centred(b: Builder, x: Value, zero: Value | None) -> Value:
    """Bytes less a zero point as int16, which holds them all."""
    return emit_map(b, lambda e, z: cast(centred(e, z, INT32), INT16), x, zero)


def _minus_product(product: Expr, zero: Expr, sums: Expr) -> Expr:
    return product - cast(zero, INT32) * cast(sums, INT32)


def _requantized(b: Builder, product: Value, scales: Sequence[Value], zero: Value) -> Value:
    def requantize(total: Expr, left: Expr, right: Expr, out: Expr, z: Expr) -> Expr:
        factor = cast(left, FLOAT32) * cast(right, FLOAT32) / cast(out, FLOAT32)
        return quantized(cast(total, FLOAT32) * factor, z, zero.dtype)

    return emit_map(b, requantize, product, *scales, zero)


def _vector_product(b: Builder, a: Value, w: Value, a_zero: Value | None, w_zero: Value | None) -> Value:
    left = b.emit(ops.Reshape((1, *a.shape)), a) if a.rank == 1 else a
    right = b.emit(ops.Reshape((*w.shape, 1)), w) if w.rank == 1 else w
    product = integer_matmul(b, left, right, a_zero, w_zero)
    shape = product.shape[:-1] if w.rank == 1 else product.shape
    if a.rank == 1:
        shape = (*shape[: -1 if w.rank == 1 else -2], *(shape[-1:] if w.rank > 1 else ()))
    return b.emit(ops.Reshape(shape), product)


def _unless_zero(zero: Value | None) -> Value | None:
    if zero is None or (zero.constant is not None and not np.any(zero.constant)):
        return None
    return zero


def _one(b: Builder, value: Value) -> Value:
    """The only element of a tensor, without axes."""
    return b.emit(ops.Reshape(()), value) if value.rank else value


def _per_row(b: Builder, value: Value) -> Value:
    """One element per row [M] as [M, 1]; a single one, or one with all its axes, as it is."""
    return b.emit(ops.Reshape((*value.shape, 1)), value) if value.rank == 1 and value.shape != (1,) else value


def _first_axis(b: Builder, value: Value, rank: int) -> Value:
    """One element, or one per index of the first of `rank` axes, in a shape that broadcasts."""
    return b.emit(ops.Reshape((value.shape[0], *(1,) * (rank - 1))), value) if value.rank else value


def _channels(b: Builder, value: Value, rank: int) -> Value:
    return per_channel(b, value, rank) if value.rank else value
