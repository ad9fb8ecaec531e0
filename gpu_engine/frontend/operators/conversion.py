"""Conversions between element types."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_array, emit_map, operator
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BOOL, BY_ONNX_NUMBER, FLOAT32, STRING, DType, from_onnx, is_float
from gpu_engine.ir.graph import Builder, TensorType, Value

SATURATING = frozenset(BY_ONNX_NUMBER[number] for number in (17, 18, 19, 20))
E8M0 = BY_ONNX_NUMBER[24]


@operator("Cast", since=6)
def cast(b: Builder, x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """https://onnx.ai/onnx/operators/onnx__Cast.html"""
    return convert(b, x, from_onnx(to), bool(saturate), round_mode)


@operator("CastLike", since=15)
def cast_like(b: Builder, x: Value, target: Value, *, saturate: int = 1, round_mode: str = "up") -> Value:
    """https://onnx.ai/onnx/operators/onnx__CastLike.html"""
    return convert(b, x, target.dtype, bool(saturate), round_mode)


def convert(b: Builder, x: Value, dtype: DType, saturate: bool = True, round_mode: str = "up") -> Value:
    """x as `dtype`, by the rules of Cast."""
    if x.dtype == dtype:
        return x
    kind = TensorType(dtype, x.shape)
    if STRING in (x.dtype, dtype):
        function = strings_to_numbers if x.dtype == STRING else numbers_to_strings
        target = {"dtype": dtype} if x.dtype == STRING else {}
        return emit_array(b, function, lambda b, x, **_: kind, (x,), target, host=True, mixes=())[0]
    if dtype == E8M0:
        attributes = {"saturate": saturate, "round_mode": round_mode}
        return emit_array(b, to_power_of_two, lambda b, x, **_: kind, (x,), attributes, mixes=())[0]
    return emit_map(b, lambda e: expr.cast(e, dtype, saturate=saturate and dtype in SATURATING), x)


def to_power_of_two(xp: Any, x: Any, *, saturate: bool, round_mode: str) -> Any:
    """float8e8m0: an exponent and no mantissa, rounded by `round_mode` (up, down or nearest, ties up)."""
    if round_mode not in ("up", "down", "nearest"):
        raise InvalidModel(f"the round_mode {round_mode} is not up, down or nearest")
    bits = x.astype(np.float32).view(np.uint32)
    exponent, fraction = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    finite = exponent != 0xFF
    rounds = {"up": fraction > 0, "down": fraction < 0, "nearest": (fraction >= 0x400000) & (exponent > 0)}
    rounded = exponent + rounds[round_mode]
    if saturate:
        highest = xp.where(finite | (fraction == 0), 0xFE, 0xFF)
        rounded = xp.minimum(rounded, highest)
    return xp.where(finite | saturate, rounded, 0xFF).astype(np.uint8).view(E8M0)


def numbers_to_strings(xp: Any, x: Any) -> Any:
    """Integers and booleans in decimal, floats with the fewest digits that read back the same and no exponent."""
    return _objects([_number_text(item) for item in x.ravel()], x.shape)


def _number_text(item: Any) -> str:
    if item.dtype == BOOL or not is_float(item.dtype):
        return str(int(item))
    if np.isnan(item):
        return "NaN"
    if np.isinf(item):
        return "INF" if item > 0 else "-INF"
    wide = item if item.dtype.kind == "f" else np.float32(item)
    return np.format_float_positional(wide, unique=True, trim="-")


def strings_to_numbers(xp: Any, x: Any, *, dtype: DType) -> Any:
    """The numbers that the strings spell; ValueError for a string that spells none."""
    read = float if is_float(dtype) else _whole_number
    wide = np.dtype(np.float64) if is_float(dtype) else np.dtype(object)
    numbers = np.array([read(item) for item in x.ravel()], wide).reshape(x.shape)
    return numbers.astype(FLOAT32).astype(dtype) if dtype.kind == "V" else numbers.astype(dtype)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return int(float(text))


def _objects(items: list[str], shape: tuple[int, ...]) -> Any:
    result = np.empty(len(items), object)
    result[:] = items
    return result.reshape(shape)


@operator("BitCast", since=26)
def bit_cast(b: Builder, x: Value, *, to: int) -> Value:
    """https://onnx.ai/onnx/operators/onnx__BitCast.html"""
    dtype = from_onnx(to)
    if STRING in (x.dtype, dtype) or _bits(x.dtype) != _bits(dtype):
        raise InvalidModel(f"the bits of {x.type} do not make up {dtype}")
    kind = TensorType(dtype, x.shape)
    return emit_array(b, reinterpret, lambda b, x, **_: kind, (x,), {"dtype": dtype}, mixes=())[0]


def reinterpret(xp: Any, x: Any, *, dtype: DType) -> Any:
    """The same bits as another dtype; a sub-byte element lies in the low bits of its byte."""
    if _bits(dtype) == 8 * dtype.itemsize:
        return xp.ascontiguousarray(x).reshape(x.shape).view(dtype)
    raw = xp.ascontiguousarray(x).reshape(x.shape).view(np.uint8) & ((1 << _bits(dtype)) - 1)
    return raw.astype(np.int8).view(dtype) if is_float(dtype) else raw.astype(dtype)


def _bits(dtype: DType) -> int:
    """The bits of one element."""
    if dtype in (BY_ONNX_NUMBER[21], BY_ONNX_NUMBER[22], BY_ONNX_NUMBER[23]):
        return 4
    return 2 if dtype in (BY_ONNX_NUMBER[25], BY_ONNX_NUMBER[26]) else 8 * dtype.itemsize
