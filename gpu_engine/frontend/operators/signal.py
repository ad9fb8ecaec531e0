"""Fourier transforms and mel filters."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import extents_of, room, told, unless_known, whole_numbers
from gpu_engine.frontend.registry import emit_array, normal_axis, operator
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import compute_dtype, from_onnx
from gpu_engine.ir.graph import Builder, TensorType, Value


@operator("DFT", since=17)
def dft_17(
    b: Builder, x: Value, dft_length: Value | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__DFT.html of opset 17"""
    return _dft(b, x, dft_length, normal_axis(axis, x.rank), bool(inverse), bool(onesided))


@operator("DFT", since=20)
def dft(
    b: Builder,
    x: Value,
    dft_length: Value | None = None,
    axis: Value | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__DFT.html"""
    if axis is None or axis.constant is not None:
        at = -2 if axis is None or axis.constant is None else int(axis.constant.ravel()[0])
        return _dft(b, x, dft_length, normal_axis(at, x.rank), bool(inverse), bool(onesided))
    shape = (*(b.fresh_dim() for _ in x.shape[:-1]), 1 if inverse and onesided else 2)
    return _emit_dft(b, x, dft_length, axis, shape, {"inverse": bool(inverse), "onesided": bool(onesided)})


def _dft(b: Builder, x: Value, length: Value | None, axis: int, inverse: bool, onesided: bool) -> Value:
    parts = x.shape[-1]
    if axis == x.rank - 1 or (isinstance(parts, int) and parts not in (1, 2)):
        raise InvalidModel(f"{x.type} has the parts of a complex number on its last axis; axis is {axis}")
    extent: Dim
    if length is not None:
        (extent,) = extents_of(b, length, 1)
    else:
        extent = 2 * (x.shape[axis] - 1) if inverse and onesided else x.shape[axis]
    if onesided and not inverse:
        extent = dims.floor_div(extent, 2) + 1
    shape = (*x.shape[:axis], extent, *x.shape[axis + 1 : -1], 1 if inverse and onesided else 2)
    if length is not None and length.known is None and onesided and not inverse:
        shape = (*shape[:axis], b.fresh_dim(), *shape[axis + 1 :])
    return _emit_dft(b, x, length, None, shape, {"at": axis, "inverse": inverse, "onesided": onesided})


def _emit_dft(
    b: Builder, x: Value, length: Value | None, axis: Value | None, shape: tuple[Dim, ...], attributes: dict[str, Any]
) -> Value:
    kind = TensorType(x.dtype, shape)
    operands = (x, unless_known(length), axis)
    (result,) = emit_array(b, _transformed, lambda *_, **__: kind, operands, {**attributes, "size": told(length)})
    return result


def _transformed(
    xp: Any, x: Any, length: Any, axis: Any, *, size: Any, inverse: bool, onesided: bool, at: int = 0
) -> Any:
    axis = at if axis is None else normal_axis(int(axis.ravel()[0]), x.ndim)
    signal = _complex(xp, x)
    default = 2 * (x.shape[axis] - 1) if onesided and inverse else x.shape[axis]
    (count,) = whole_numbers(size, length) or (default,)
    if onesided and inverse:
        return xp.fft.irfft(signal, n=count, axis=axis)[..., None]
    if inverse:
        return _parts(xp, xp.fft.ifft(signal, n=count, axis=axis))
    transform = xp.fft.rfft if onesided and x.shape[-1] == 1 else xp.fft.fft
    result = transform(signal, n=count, axis=axis)
    return _parts(xp, result[(slice(None),) * axis + (slice(0, count // 2 + 1),)] if onesided else result)


def _complex(xp: Any, x: Any) -> Any:
    wide = x.astype(compute_dtype(x.dtype), copy=False)
    return wide[..., 0] if x.shape[-1] == 1 else wide[..., 0] + wide[..., 1] * wide.dtype.type(1) * 1j


def _parts(xp: Any, values: Any) -> Any:
    return xp.stack([values.real, values.imag], axis=-1)


@operator("STFT", since=17)
def stft(
    b: Builder,
    signal: Value,
    frame_step: Value,
    window: Value | None = None,
    frame_length: Value | None = None,
    *,
    onesided: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__STFT.html"""
    if signal.rank != 3:
        raise InvalidModel(f"signal {signal.type} has the axes batch, time and part of a complex number")
    length = window.shape[0] if window is not None else signal.shape[1]
    if frame_length is not None and frame_length.known is not None:
        (length,) = extents_of(b, frame_length)
    known = frame_step.constant is not None and (frame_length is None or frame_length.known is not None)
    frames, bins = b.fresh_dim(), b.fresh_dim()
    if known and frame_step.constant is not None:
        step = int(frame_step.constant.ravel()[0])
        frames = dims.floor_div(signal.shape[1] - length, step) + 1  # type: ignore[assignment]
        bins = dims.floor_div(length, 2) + 1 if onesided else length  # type: ignore[assignment]
    kind = TensorType(signal.dtype, (signal.shape[0], frames, bins, 2))
    operands = (signal, unless_known(frame_step), window, unless_known(frame_length))
    attributes = {"onesided": bool(onesided), "steps": (told(frame_step), told(frame_length))}
    (result,) = emit_array(b, _short_time, lambda *_, **__: kind, operands, attributes)
    return result


def _short_time(
    xp: Any, signal: Any, frame_step: Any, window: Any, frame_length: Any, *, onesided: bool, steps: Any
) -> Any:
    (step,) = whole_numbers(steps[0], frame_step) or (1,)
    default = signal.shape[1] if window is None else window.shape[0]
    (length,) = whole_numbers(steps[1], frame_length) or (default,)
    frames = max(0, (signal.shape[1] - length) // step + 1)
    values = _complex(xp, signal)
    places = xp.arange(frames)[:, None] * step + xp.arange(length)
    parts = values[:, places]
    parts = parts if window is None else parts * window.astype(compute_dtype(window.dtype), copy=False)
    if onesided and signal.shape[2] == 1:
        return _parts(xp, xp.fft.rfft(parts, axis=-1))
    result = xp.fft.fft(parts, axis=-1)
    return _parts(xp, result[..., : length // 2 + 1] if onesided else result)


@operator("MelWeightMatrix", since=17)
def mel_weight_matrix(
    b: Builder,
    num_mel_bins: Value,
    dft_length: Value,
    sample_rate: Value,
    lower_edge_hertz: Value,
    upper_edge_hertz: Value,
    *,
    output_datatype: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__MelWeightMatrix.html"""
    (columns,) = extents_of(b, num_mel_bins, 1)
    (length,) = extents_of(b, dft_length, 1)
    rows = dims.floor_div(length, 2) + 1 if dft_length.known is not None else b.fresh_dim()
    kind = TensorType(from_onnx(output_datatype), (rows, columns))
    operands = (num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz)
    (result,) = emit_array(b, _mel_weights, lambda *_, **__: kind, operands, {}, host=True)
    return result


def _mel_weights(xp: Any, bins: Any, length: Any, rate: Any, lower: Any, upper: Any) -> Any:
    bands, size = room((bins.ravel()[0], length.ravel()[0]))
    low, high = (2595 * np.log1p(float(edge.ravel()[0]) / 700) / np.log(10) for edge in (lower, upper))
    mels = np.arange(bands + 2) * ((high - low) / (bands + 2)) + low
    hertz = 700 * np.expm1(mels / 2595 * np.log(10))
    places = ((size + 1) * hertz // int(rate.ravel()[0])).astype(np.int64)
    rows = np.arange(size // 2 + 1)[:, None]
    left, centre, right = places[:-2], places[1:-1], places[2:]
    rising = np.where(centre == left, rows == centre, (rows - left) / np.maximum(centre - left, 1))
    falling = (right - rows) / np.maximum(right - centre, 1)
    inside_left = (rows >= left) & (rows <= centre)
    inside_right = (rows >= centre) & (rows < right)
    return np.where(inside_right, falling, np.where(inside_left, rising, 0))
