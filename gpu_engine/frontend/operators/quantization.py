"""Conversion between real and quantised tensors."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import FLOAT32, INT8, UINT8, DType, compute_dtype, from_onnx, is_float, is_integer
from gpu_engine.ir.expr import Expr, cast, equal, maximum, minimum, round_even, where
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops.weights import dequantized

NARROW = frozenset({INT8, UINT8, *map(from_onnx, (17, 19, 21, 22, 25, 26))})
"""What weights are kept as: integers of 8, 4 and 2 bits, float8e4m3fn and float8e5m2."""


@operator("QuantizeLinear", since=10)
def quantize_linear(
    b: Builder,
    x: Value,
    y_scale: Value,
    y_zero_point: Value | None = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html

    The division happens in float32 or wider, also where the scale is narrower.
    """
    dtype = from_onnx(output_dtype) if output_dtype else UINT8
    dtype = y_zero_point.dtype if y_zero_point is not None else dtype
    scale = spread(b, y_scale, x, axis, block_size)
    zero = _spread_zero(b, y_zero_point, x, axis, block_size)

    def quantize(e: Expr, s: Expr, z: Expr | None) -> Expr:
        e = cast(e, from_onnx(precision)) if precision else e
        return quantized(cast(e, _wide(x)) / cast(s, _wide(x)), z, dtype, saturate=bool(saturate))

    return emit_map(b, quantize, x, scale, zero)


@operator("DequantizeLinear", since=10)
def dequantize_linear(
    b: Builder,
    x: Value,
    x_scale: Value,
    x_zero_point: Value | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html"""
    dtype = from_onnx(output_dtype) if output_dtype else x_scale.dtype
    narrow = _weights(b, dtype, axis, block_size, x, x_scale, x_zero_point)
    if narrow is not None:
        return narrow
    scale = spread(b, x_scale, x, axis, block_size)
    zero = _spread_zero(b, x_zero_point, x, axis, block_size)
    return emit_map(b, lambda e, s, z: dequantized(e, s, z, dtype), x, scale, zero)


def _spread_zero(b: Builder, zero: Value | None, x: Value, axis: int, block_size: int) -> Value | None:
    return None if zero is None or _is_nothing(zero) else spread(b, zero, x, axis, block_size)


def _is_nothing(zero: Value) -> bool:
    """Whether a zero point only says the type: float8 has none but 0."""
    return is_float(zero.dtype) and zero.constant is not None and not zero.constant.any()


def _weights(b: Builder, dtype: DType, axis: int, block_size: int, *inputs: Value | None) -> Value | None:
    """The node that keeps constants narrow, where codes, scale and zero point are constants of such a form."""
    x, *parts = (value for value in inputs if value is not None)
    parts = [*parts[:1], *(zero for zero in parts[1:] if not _is_nothing(zero))]
    if x.rank < 2 or x.dtype not in NARROW or any(value.constant is None for value in (x, *parts)):
        return None
    blocks = [value.rank == x.rank and block_size > 0 for value in parts]
    if not any(blocks):
        parts = [spread(b, value, x, axis, block_size) for value in parts]
    elif not all(blocks):
        return None
    op = ops.Dequantize(dtype, normal_axis(axis, x.rank), block_size) if all(blocks) else ops.Dequantize(dtype)
    return b.emit(op, x, *parts)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(b: Builder, x: Value) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html

    The scale of a tensor of zeros is 1, where the specification's formula gives 0 and divides by it.
    """
    axes = tuple(range(x.rank))
    low, high = b.emit(ops.Reduce("min", axes, False), x), b.emit(ops.Reduce("max", axes, False), x)

    def scale_of(lowest: Expr, highest: Expr) -> Expr:
        span = maximum(highest, 0) - minimum(lowest, 0)
        return where(equal(span, 0), 1.0, span / 255)

    scale = emit_map(b, scale_of, low, high)
    zero = emit_map(b, lambda lowest, s: quantized(-minimum(lowest, 0) / s, None, UINT8), low, scale)
    y = emit_map(b, lambda e, s, z: quantized(e / s, z, UINT8), x, scale, zero)
    return y, scale, zero


def quantized(ratio: Expr, zero: Expr | None, dtype: DType, *, saturate: bool = True) -> Expr:
    """saturate(round(ratio) + zero) in `dtype`; floats are not rounded first."""
    if not is_integer(dtype):
        shifted = ratio if zero is None else ratio + cast(zero, ratio.dtype)
        return cast(shifted, dtype, saturate=saturate or not dtype.name.startswith("float8"))
    whole = round_even(ratio)
    return cast(whole if zero is None else whole + cast(zero, ratio.dtype), dtype, saturate=True)


def spread(b: Builder, value: Value, x: Value, axis: int, block_size: int = 0) -> Value:
    """A scale or zero point per tensor, per axis or per block, in a shape that broadcasts to x."""
    if value.rank == 0 or (value.rank == 1 and value.shape[0] == 1):
        return b.emit(ops.Reshape(()), value) if value.rank else value
    axis = normal_axis(axis, x.rank) if x.rank > 1 else 0
    if value.rank == 1 and not block_size:
        return b.emit(ops.Reshape((value.shape[0], *(1,) * (x.rank - axis - 1))), value)
    if value.rank != x.rank or block_size < 1:
        raise InvalidModel(f"a scale or zero point {value.type} in blocks of {block_size} for {x.type}")
    before, (blocks, *after) = value.shape[:axis], value.shape[axis:]
    apart = b.emit(ops.Reshape((*before, blocks, 1, *after)), value)
    repeated = b.emit(ops.Expand((*before, blocks, block_size, *after)), apart)
    whole = (*before, blocks * block_size, *after)
    extents = tuple(x.shape[i] if i == axis else extent for i, extent in enumerate(whole))
    joined = b.emit(ops.Reshape(whole), repeated)
    if isinstance(blocks, int) and blocks != dims.ceil_div(extents[axis], block_size):
        raise InvalidModel(f"a scale or zero point {value.type} in blocks of {block_size} for {x.type}")
    return joined if extents == whole else b.emit(ops.Slice((0,) * x.rank, (1,) * x.rank, extents), joined)


def _wide(x: Value) -> DType:
    return compute_dtype(x.dtype) if is_float(x.dtype) else FLOAT32
