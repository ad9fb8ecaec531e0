"""Random numbers, and Dropout.

A node with a seed gives the same numbers on every run, one without gives others each time. The streams are those of
numpy.random.RandomState, drawn on the host whatever the device; the specification leaves them open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_array, operator, scalar
from gpu_engine.ir import ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, DType, from_onnx
from gpu_engine.ir.graph import Builder, TensorType, Value


@operator("Dropout", since=7)
def dropout_7(b: Builder, x: Value, *, ratio: float = 0.5, version: int, output_count: int = 1) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__Dropout.html before opset 12: inference only"""
    return (x, _kept(b, x, BOOL if version >= 10 else x.dtype))[:output_count]


@operator("Dropout", since=12)
def dropout(
    b: Builder,
    x: Value,
    ratio: Value | None = None,
    training_mode: Value | None = None,
    *,
    seed: int | None = None,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__Dropout.html"""
    training = training_mode is not None and (training_mode.constant is None or bool(np.all(training_mode.constant)))
    if not training or (ratio is not None and ratio.constant is not None and not np.any(ratio.constant)):
        return (x, _kept(b, x, BOOL))[:output_count]
    kinds = (x.type, TensorType(BOOL, x.shape))
    results = emit_array(
        b, _drop, lambda *_, **__: kinds, (x, ratio, training_mode), {"seed": seed}, deterministic=False, host=True
    )
    return results[:output_count]


def _kept(b: Builder, x: Value, dtype: DType) -> Value:
    return b.emit(ops.Expand(x.shape), scalar(b, True, dtype))


def _drop(xp: Any, x: Any, ratio: Any, training_mode: Any, *, seed: int | None) -> Any:
    share = 0.5 if ratio is None else float(ratio)
    if not bool(training_mode) or share == 0:
        return x, xp.ones(x.shape, bool)
    mask = _state(seed).uniform(0, 1, x.shape) >= share
    return mask * x * (1 / (1 - share)), mask


@operator("RandomNormal", since=1)
def random_normal(
    b: Builder,
    *,
    shape: Sequence[int],
    dtype: int = 1,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RandomNormal.html"""
    return _random(b, shape, from_onnx(dtype), "normal", (mean, scale), seed)


@operator("RandomUniform", since=1)
def random_uniform(
    b: Builder, *, shape: Sequence[int], dtype: int = 1, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RandomUniform.html"""
    return _random(b, shape, from_onnx(dtype), "uniform", (low, high), seed)


@operator("RandomNormalLike", since=1)
def random_normal_like(
    b: Builder, x: Value, *, dtype: int = 0, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RandomNormalLike.html"""
    return _random(b, x.shape, from_onnx(dtype) if dtype else x.dtype, "normal", (mean, scale), seed)


@operator("RandomUniformLike", since=1)
def random_uniform_like(
    b: Builder, x: Value, *, dtype: int = 0, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RandomUniformLike.html"""
    return _random(b, x.shape, from_onnx(dtype) if dtype else x.dtype, "uniform", (low, high), seed)


@operator("Bernoulli", since=15)
def bernoulli(b: Builder, x: Value, *, dtype: int = 0, seed: float | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Bernoulli.html"""
    kind = TensorType(from_onnx(dtype) if dtype else x.dtype, x.shape)
    (result,) = emit_array(b, _bernoulli, lambda *_, **__: kind, (x,), {"seed": seed}, deterministic=False, host=True)
    return result


@operator("Multinomial", since=7)
def multinomial(b: Builder, x: Value, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Multinomial.html; x [batch, classes] holds logarithms of probabilities"""
    if x.rank != 2:
        raise InvalidModel(f"{x.type} has the axes batch and class")
    kind = TensorType(from_onnx(dtype), (x.shape[0], sample_size))
    attributes = {"samples": sample_size, "seed": seed}
    (result,) = emit_array(b, _multinomial, lambda *_, **__: kind, (x,), attributes, deterministic=False, host=True)
    return result


def _random(
    b: Builder,
    shape: Sequence[Dim],
    dtype: DType,
    distribution: str,
    parameters: tuple[float, float],
    seed: float | None,
) -> Value:
    kind = TensorType(dtype, tuple(shape))
    attributes = {"shape": kind.shape, "distribution": distribution, "parameters": parameters, "seed": seed}
    (result,) = emit_array(b, _sample, lambda *_, **__: kind, (), attributes, deterministic=False, host=True)
    return result


def _sample(xp: Any, *, shape: Any, distribution: str, parameters: tuple[float, float], seed: float | None) -> Any:
    return getattr(_state(seed), distribution)(*parameters, shape)


def _bernoulli(xp: Any, x: Any, *, seed: float | None) -> Any:
    return _state(seed).uniform(0, 1, x.shape) < x


def _multinomial(xp: Any, x: Any, *, samples: int, seed: float | None) -> Any:
    weights = xp.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    bounds = xp.cumsum(weights, axis=1)
    drawn = _state(seed).uniform(0, 1, (x.shape[0], samples)) * bounds[:, -1:]
    return xp.minimum((bounds[:, None, :] <= drawn[:, :, None]).sum(axis=2), x.shape[1] - 1)


def _state(seed: float | None) -> Any:
    return np.random.RandomState(None if seed is None else int(seed) & 0xFFFFFFFF)
