"""Fourier transforms and products of complex numbers, whose two parts lie on the last axis."""

from __future__ import annotations

from typing import Any

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.movement import split_at
from gpu_engine.frontend.registry import array_operator, emit_map, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.graph import Builder, TensorType, Value


def _axes(rank: int, signal_ndim: int, normalized: int, onesided: int) -> tuple[int, ...]:
    if normalized or not onesided or not 1 <= signal_ndim <= rank:
        raise InvalidModel(f"normalized {normalized}, onesided {onesided}, a signal of {signal_ndim} of {rank} axes")
    return tuple(range(rank - signal_ndim, rank))


def _rfft_type(b: Builder, x: Value, *, signal_ndim: int = 1, normalized: int = 0, onesided: int = 1) -> TensorType:
    _axes(x.rank, signal_ndim, normalized, onesided)
    return TensorType(x.dtype, (*x.shape[:-1], dims.floor_div(x.shape[-1], 2) + 1, 2))


@array_operator("Rfft", since=1, domain=MICROSOFT, infer=_rfft_type)
def rfft(xp: Any, x: Any, *, signal_ndim: int = 1, normalized: int = 0, onesided: int = 1) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Rfft"""
    wide = x.astype(compute_dtype(x.dtype), copy=False)
    found = xp.fft.rfftn(wide, axes=_axes(x.ndim, signal_ndim, normalized, onesided))
    return xp.stack([found.real, found.imag], axis=-1)


def _irfft_type(b: Builder, x: Value, *, signal_ndim: int, normalized: int = 0, onesided: int = 1) -> TensorType:
    _axes(x.rank - 1, signal_ndim, normalized, onesided)
    return TensorType(x.dtype, (*x.shape[:-2], 2 * (x.shape[-2] - 1)))


@array_operator("Irfft", since=1, domain=MICROSOFT, infer=_irfft_type)
def irfft(xp: Any, x: Any, *, signal_ndim: int, normalized: int = 0, onesided: int = 1) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Irfft"""
    wide = x.astype(compute_dtype(x.dtype), copy=False)
    return xp.fft.irfftn(wide[..., 0] + 1j * wide[..., 1], axes=_axes(x.ndim - 1, signal_ndim, normalized, onesided))


@operator("ComplexMul", since=1, domain=MICROSOFT)
def complex_mul(b: Builder, x: Value, y: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.ComplexMul"""
    return _product(b, x, y, 1)


@operator("ComplexMulConj", since=1, domain=MICROSOFT)
def complex_mul_conj(b: Builder, x: Value, y: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.ComplexMulConj"""
    return _product(b, x, y, -1)


def _product(b: Builder, x: Value, y: Value, sign: int) -> Value:
    """x times y, or its conjugate."""
    (xr, xi), (yr, yi) = (split_at(b, value, value.rank - 1, (1, 1), 2) for value in (x, y))
    parts = (
        emit_map(b, lambda p, q, r, s: p * r - sign * (q * s), xr, xi, yr, yi),
        emit_map(b, lambda p, q, r, s: q * r + sign * (p * s), xr, xi, yr, yi),
    )
    return b.emit(ops.Concat(parts[0].rank - 1), *parts)
