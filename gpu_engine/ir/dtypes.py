"""Element types: NumPy dtypes (with ml_dtypes' for what NumPy lacks) and their ONNX numbers.

ONNX's numbering: https://github.com/onnx/onnx/blob/main/onnx/onnx.in.proto (TensorProto.DataType). Strings are
NumPy's object dtype holding `str`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from gpu_engine.errors import UnsupportedModel

DType = np.dtype[Any]

FLOAT32, FLOAT64, FLOAT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INT8, INT16, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64)
UINT8, UINT16, UINT32, UINT64 = np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)
BOOL, STRING = np.dtype(np.bool_), np.dtype(object)
COMPLEX64, COMPLEX128 = np.dtype(np.complex64), np.dtype(np.complex128)

BY_ONNX_NUMBER: dict[int, DType] = {
    1: FLOAT32, 2: UINT8, 3: INT8, 4: UINT16, 5: INT16, 6: INT32, 7: INT64, 8: STRING, 9: BOOL, 10: FLOAT16,
    11: FLOAT64, 12: UINT32, 13: UINT64, 14: COMPLEX64, 15: COMPLEX128, 16: BFLOAT16,
    17: np.dtype(ml_dtypes.float8_e4m3fn), 18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2), 20: np.dtype(ml_dtypes.float8_e5m2fnuz),
    21: np.dtype(ml_dtypes.uint4), 22: np.dtype(ml_dtypes.int4), 23: np.dtype(ml_dtypes.float4_e2m1fn),
    24: np.dtype(ml_dtypes.float8_e8m0fnu), 25: np.dtype(ml_dtypes.uint2), 26: np.dtype(ml_dtypes.int2),
    27: np.dtype(ml_dtypes.float6_e2m3fn), 28: np.dtype(ml_dtypes.float6_e3m2fn),
}  # fmt: skip
ONNX_NUMBER: dict[DType, int] = {dtype: number for number, dtype in BY_ONNX_NUMBER.items()}
_FLOATS = {FLOAT32, FLOAT64, FLOAT16, BFLOAT16} | {BY_ONNX_NUMBER[n] for n in (17, 18, 19, 20, 23, 24, 27, 28)}
_INTEGERS = {INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64} | {BY_ONNX_NUMBER[n] for n in (21, 22, 25, 26)}

BITS: dict[int, DType] = {1: UINT8, 2: UINT16, 4: UINT32, 8: UINT64}
"""The unsigned integers by their bytes: what elements are to kernels that only move them."""


def can_copy(dtype: DType) -> bool:
    """Whether kernels can move elements of this type."""
    return not dtype.hasobject and dtype.itemsize in BITS


def from_onnx(number: int) -> DType:
    """The dtype of a TensorProto.DataType number; UnsupportedModel for one that is not known."""
    if number not in BY_ONNX_NUMBER:
        raise UnsupportedModel(f"tensor element type {number} is not known")
    return BY_ONNX_NUMBER[number]


def is_float(dtype: DType) -> bool:
    return dtype in _FLOATS


def is_integer(dtype: DType) -> bool:
    return dtype in _INTEGERS


def compute_dtype(dtype: DType) -> DType:
    """The dtype that arithmetic on `dtype` happens in: float32 for narrower floats, int32 for sub-byte integers."""
    if dtype in _FLOATS and dtype.itemsize < 4:
        return FLOAT32
    if dtype in _INTEGERS and dtype.kind == "V":
        return INT32
    return dtype


def limits(dtype: DType) -> tuple[Any, Any]:
    """The least and greatest finite value."""
    if is_float(dtype):
        info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        return info.min, info.max
    if dtype == BOOL:
        return False, True
    whole: Any = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return whole.min, whole.max
