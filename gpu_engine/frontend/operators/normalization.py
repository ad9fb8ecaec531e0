"""Normalization."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.convolution import per_channel
from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import DType, compute_dtype, from_onnx
from gpu_engine.ir.expr import Expr, cast, equal, sqrt, where
from gpu_engine.ir.graph import Builder, Value


@operator("BatchNormalization", since=7)
def batch_normalization_7(
    b: Builder,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    var: Value,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__BatchNormalization.html; more outputs than one ask for training."""
    if output_count == 1:
        return (normalize_channels(b, x, scale, bias, mean, var, epsilon, shared=bool(spatial)),)
    y, *running, batch_mean, batch_var = _trained(b, x, scale, bias, mean, var, epsilon, momentum, bool(spatial))
    return (y, *running, batch_mean, batch_var)[:output_count]


@operator("BatchNormalization", since=14)
def batch_normalization(
    b: Builder,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    var: Value,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__BatchNormalization.html"""
    if not training_mode:
        return (normalize_channels(b, x, scale, bias, mean, var, epsilon),)
    return _trained(b, x, scale, bias, mean, var, epsilon, momentum, True)[:output_count]


def normalize_channels(
    b: Builder, x: Value, scale: Value, bias: Value, mean: Value, var: Value, epsilon: float, *, shared: bool = True
) -> Value:
    """(x - mean) / sqrt(var + epsilon) * scale + bias as x * factor + shift: one Map where the statistics are constant.

    The statistics are per channel, [C], or with `shared` False per element of a row of x.
    """
    wide = compute_dtype(x.dtype)
    if shared:
        scale, bias, mean, var = (per_channel(b, value, x.rank) for value in (scale, bias, mean, var))
    factor = emit_map(b, lambda s, v: cast(s, wide) / sqrt(cast(v, wide) + epsilon), scale, var)
    shift = emit_map(b, lambda c, m, f: cast(c, wide) - cast(m, wide) * f, bias, mean, factor)
    return emit_map(b, lambda e, f, s: cast(cast(e, wide) * f + s, x.dtype), x, factor, shift)


def _trained(
    b: Builder,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    var: Value,
    epsilon: float,
    momentum: float,
    shared: bool,
) -> tuple[Value, ...]:
    """(y, running mean, running variance, mean, variance) by the statistics of the batch itself."""
    axes = tuple(axis for axis in range(x.rank) if axis != 1) if shared else (0,)
    batch_mean, batch_var = moments(b, x, axes, keepdims=False)
    y = normalize_channels(b, x, scale, bias, batch_mean, batch_var, epsilon, shared=shared)

    def blend(old: Expr, new: Expr) -> Expr:
        return cast(cast(old, new.dtype) * momentum + new * (1 - momentum), old.dtype)

    running = emit_map(b, blend, mean, batch_mean), emit_map(b, blend, var, batch_var)
    own = (
        emit_map(b, lambda e, like: cast(e, like.dtype), new, old)
        for new, old in ((batch_mean, mean), (batch_var, var))
    )
    return (y, *running, *own)


def moments(b: Builder, x: Value, axes: Sequence[int], *, keepdims: bool) -> tuple[Value, Value]:
    """Mean and biased variance of x over `axes`, in at least float32."""
    wide = compute_dtype(x.dtype)
    kept = b.emit(ops.Reduce("mean", tuple(axes), True, before=cast(expr.arg(0, x.dtype), wide)), x)
    distance = cast(expr.arg(0, x.dtype), wide) - expr.arg(1, wide)
    var = b.emit(ops.Reduce("mean", tuple(axes), keepdims, before=distance * distance), x, kept)
    return (kept, var) if keepdims else (b.emit(ops.Reshape(var.shape), kept), var)


@operator("InstanceNormalization", since=1)
def instance_normalization(b: Builder, x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5) -> Value:
    """https://onnx.ai/onnx/operators/onnx__InstanceNormalization.html"""
    return b.emit(ops.LayerNorm(2, epsilon), x, per_channel(b, scale, x.rank), per_channel(b, bias, x.rank))


@operator("GroupNormalization", since=18)
def group_normalization_18(
    b: Builder, x: Value, scale: Value, bias: Value, *, num_groups: int, epsilon: float = 1e-5
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GroupNormalization.html with one scale and bias per group"""
    grouped = _grouped(b, x, num_groups)
    affine = (per_channel(b, value, grouped.rank) for value in (scale, bias))
    return b.emit(ops.Reshape(x.shape), b.emit(ops.LayerNorm(2, epsilon), grouped, *affine))


@operator("GroupNormalization", since=21)
def group_normalization(
    b: Builder, x: Value, scale: Value, bias: Value, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__GroupNormalization.html; statistics are float32 or wider always"""
    grouped = _grouped(b, x, num_groups)
    shape = (*grouped.shape[1:3], *(1,) * (x.rank - 2))
    affine = (b.emit(ops.Reshape(shape), value) for value in (scale, bias))
    return b.emit(ops.Reshape(x.shape), b.emit(ops.LayerNorm(2, epsilon), grouped, *affine))


def _grouped(b: Builder, x: Value, groups: int) -> Value:
    """x [N, C, ...] as [N, groups, C / groups, ...]."""
    if groups < 1 or (isinstance(x.shape[1], int) and x.shape[1] % groups):
        raise InvalidModel(f"{x.shape[1]} channels in {groups} groups")
    return b.emit(ops.Reshape((x.shape[0], groups, dims.floor_div(x.shape[1], groups), *x.shape[2:])), x)


@operator("LayerNormalization", since=17)
def layer_normalization(
    b: Builder,
    x: Value,
    scale: Value,
    bias: Value | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__LayerNormalization.html; computed in float32 or wider always"""
    axis = normal_axis(axis, x.rank)
    affine = (scale,) if bias is None else (scale, bias)
    y = b.emit(ops.LayerNorm(axis, epsilon), x, *affine)
    if output_count == 1:
        return (y,)
    mean, var = moments(b, x, range(axis, x.rank), keepdims=True)
    stash: DType = from_onnx(stash_type)
    inverse = emit_map(b, lambda v: cast(1 / sqrt(v + epsilon), stash), var)
    return (y, emit_map(b, lambda m: cast(m, stash), mean), inverse)[:output_count]


@operator("RMSNormalization", since=23)
def rms_normalization(
    b: Builder, x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__RMSNormalization.html; computed in float32 or wider always"""
    return b.emit(ops.LayerNorm(normal_axis(axis, x.rank), epsilon, centered=False), x, scale)


@operator("LpNormalization", since=1)
def lp_normalization(b: Builder, x: Value, *, axis: int = -1, p: int = 2) -> Value:
    """https://onnx.ai/onnx/operators/onnx__LpNormalization.html"""
    if p not in (1, 2):
        raise InvalidModel(f"p {p} is not 1 or 2")
    wide = compute_dtype(x.dtype)
    element, total = cast(expr.arg(0, x.dtype), wide), expr.arg(0, wide)
    power, root = (abs(element), total) if p == 1 else (element * element, sqrt(total))
    norm = b.emit(ops.Reduce("sum", (normal_axis(axis, x.rank),), True, before=power, after=root), x)
    return emit_map(b, lambda e, n: cast(where(equal(n, 0), 0.0, cast(e, wide) / n), x.dtype), x, norm)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(b: Builder, x: Value, *, axes: Sequence[int] = (0, 2, 3)) -> Value:
    """https://onnx.ai/onnx/operators/onnx__MeanVarianceNormalization.html"""
    mean, var = moments(b, x, sorted(normal_axis(axis, x.rank) for axis in axes), keepdims=True)
    return emit_map(b, lambda e, m, v: cast((cast(e, m.dtype) - m) / (sqrt(v) + 1e-9), e.dtype), x, mean, var)


@operator("LRN", since=1)
def lrn(b: Builder, x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__LRN.html"""
    if x.rank < 2 or size < 1:
        raise InvalidModel(f"LRN of {x.type} over {size} channels")
    return b.emit(ops.LocalResponseNorm(1, size, alpha, beta, bias), x)
