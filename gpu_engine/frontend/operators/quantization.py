"""Conversion between real and quantised tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT32, UINT8, DType, compute_dtype, from_onnx, is_float, is_integer
from gpu_engine.ir.expr import Expr, cast, equal, maximum, minimum, round_even, where
from gpu_engine.ir.graph import Builder, Value


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
    zero = spread(b, y_zero_point, x, axis, block_size) if y_zero_point is not None else None

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
    scale = spread(b, x_scale, x, axis, block_size)
    zero = spread(b, x_zero_point, x, axis, block_size) if x_zero_point is not None else None
    wide = compute_dtype(dtype)

    def dequantize(e: Expr, s: Expr, z: Expr | None) -> Expr:
        return cast(centred(e, z, wide) * cast(s, wide), dtype)

    if x.constant is None or x.dtype not in (INT8, UINT8) or x.rank < 2 or block_size:
        return emit_map(b, dequantize, x, scale, zero)
    return _unfolded(b, dequantize, x, scale, zero)


def _unfolded(b: Builder, function: Callable[..., Expr], *inputs: Value | None) -> Value:
    """The map of constants as a node: passes see the bytes that weights were stored as."""
    given = [value for value in inputs if value is not None]
    places = iter(expr.arg(i, value.dtype) for i, value in enumerate(given))
    op = ops.Map(function(*(None if value is None else next(places) for value in inputs)))
    (kind,) = op.infer(*(value.type for value in given))
    (result,) = b.append(op, tuple(given), (Value(kind),))
    return result


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


def centred(x: Expr, zero: Expr | None, wide: DType) -> Expr:
    """x - zero in `wide`; integers are subtracted as int32."""
    if zero is None:
        return cast(x, wide)
    between = wide if is_float(x.dtype) else INT32
    return cast(cast(x, between) - cast(zero, between), wide)


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
