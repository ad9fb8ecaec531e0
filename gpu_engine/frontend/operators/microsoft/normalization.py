"""Normalisation with what stands before it: a skip connection, a bias, embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.microsoft.products import from_nhwc, to_nhwc
from gpu_engine.frontend.operators.normalization import group_normalization, layer_normalization, moments
from gpu_engine.frontend.operators.quantization import dequantize_linear
from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT32, INT64, compute_dtype, from_onnx
from gpu_engine.ir.expr import cast, equal, sigmoid, sqrt
from gpu_engine.ir.graph import Builder, Value


@operator("LayerNormalization", since=1)
def early_layer_normalization(
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
    """https://onnx.ai/onnx/operators/onnx__LayerNormalization.html as ONNX Runtime writes it into models of opsets
    before 17"""
    return layer_normalization(b, x, scale, bias, axis=axis, epsilon=epsilon, stash_type=stash_type,
                               output_count=output_count)  # fmt: skip


@operator("SimplifiedLayerNormalization", since=1)
def simplified_layer_normalization(
    b: Builder,
    x: Value,
    scale: Value,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    output_count: int = 1,
) -> Sequence[Value]:
    """RMSNormalization as ONNX Runtime writes it in ONNX's own domain; the result has the type of the scale.

    The second output is 1 / sqrt(mean of squares + epsilon).
    """
    axis = normal_axis(axis, x.rank)
    wide = x if x.dtype.itemsize >= scale.dtype.itemsize else emit_map(b, lambda e: cast(e, scale.dtype), x)
    factor = emit_map(b, lambda e: cast(e, wide.dtype), scale)
    y = b.emit(ops.LayerNorm(axis, epsilon, centered=False), wide, factor)
    y = y if y.dtype == scale.dtype else emit_map(b, lambda e: cast(e, scale.dtype), y)
    if output_count == 1:
        return (y,)
    return y, _inverse_root(b, x, axis, epsilon, stash_type)


def _inverse_root(b: Builder, x: Value, axis: int, epsilon: float, stash_type: int) -> Value:
    wide, stash = compute_dtype(x.dtype), from_onnx(stash_type)
    element, mean = cast(expr.arg(0, x.dtype), wide), expr.arg(0, wide)
    after = cast(1 / sqrt(mean + epsilon), stash)
    return b.emit(ops.Reduce("mean", tuple(range(axis, x.rank)), True, element * element, after), x)


@operator("SkipLayerNormalization", since=1, domain=MICROSOFT)
def skip_layer_normalization(
    b: Builder,
    x: Value,
    skip: Value,
    gamma: Value,
    beta: Value | None = None,
    bias: Value | None = None,
    *,
    epsilon: float = 1e-12,
    output_count: int = 1,
) -> Sequence[Value | None]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipLayerNormalization

    The statistics are outputs for training and float32.
    """
    total = _skip_sum(b, x, skip, bias)
    affine = (gamma,) if beta is None else (gamma, beta)
    y = b.emit(ops.LayerNorm(x.rank - 1, epsilon), total, *affine)
    if output_count == 1:
        return (y,)
    mean, var = moments(b, total, (x.rank - 1,), keepdims=True)
    inverse = emit_map(b, lambda v: cast(1 / sqrt(v + epsilon), FLOAT32), var)
    return (y, emit_map(b, lambda m: cast(m, FLOAT32), mean), inverse, total)[:output_count]


@operator("SkipSimplifiedLayerNormalization", since=1, domain=MICROSOFT)
def skip_simplified_layer_normalization(
    b: Builder,
    x: Value,
    skip: Value,
    gamma: Value,
    bias: Value | None = None,
    *,
    epsilon: float = 1e-12,
    output_count: int = 1,
) -> Sequence[Value | None]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipSimplifiedLayerNormalization

    There is no mean: the second output is refused.
    """
    total = _skip_sum(b, x, skip, bias)
    y = b.emit(ops.LayerNorm(x.rank - 1, epsilon, centered=False), total, gamma)
    if output_count == 1:
        return (y,)
    return (y, None, _inverse_root(b, total, x.rank - 1, epsilon, 1), total)[:output_count]


def _skip_sum(b: Builder, x: Value, skip: Value, bias: Value | None) -> Value:
    """x + skip + bias in the shape of x."""
    if bias is None:
        return emit_map(b, lambda e, s: e + s, x, skip)
    return emit_map(b, lambda e, s, c: e + s + c, x, skip, bias)


@operator("GroupNorm", since=1, domain=MICROSOFT)
def group_norm(
    b: Builder,
    x: Value,
    gamma: Value,
    beta: Value,
    *,
    groups: int,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupNorm"""
    return _group_norm(b, x, gamma, beta, groups, activation, bool(channels_last), epsilon)


@operator("SkipGroupNorm", since=1, domain=MICROSOFT)
def skip_group_norm(
    b: Builder,
    x: Value,
    gamma: Value,
    beta: Value,
    skip: Value,
    bias: Value | None = None,
    *,
    groups: int,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipGroupNorm"""
    wide = skip if skip.rank == x.rank else b.emit(ops.Reshape(_spread(skip, x.rank, bool(channels_last))), skip)
    if bias is not None:
        bias = b.emit(ops.Reshape(_spread(bias, x.rank, bool(channels_last))), bias)
    total = _skip_sum(b, x, wide, bias)
    return _group_norm(b, total, gamma, beta, groups, activation, bool(channels_last), epsilon), total


def _spread(value: Value, rank: int, last: bool) -> tuple[Dim, ...]:
    """The shape of [N, C] or [C] that broadcasts to [N, spatial..., C] or [N, C, spatial...]."""
    rows: tuple[Dim, ...] = (1, *value.shape)[-2:]
    ones = (1,) * (rank - 2)
    return (rows[0], *ones, rows[1]) if last else (*rows, *ones)


def _group_norm(
    b: Builder, x: Value, gamma: Value, beta: Value, groups: int, activation: int, last: bool, epsilon: float
) -> Value:
    if activation not in (0, 1):
        raise InvalidModel(f"the activation {activation} is not 0 (none) or 1 (SiLU)")
    scale, shift = (emit_map(b, lambda e: cast(e, x.dtype), value) for value in (gamma, beta))
    planes = from_nhwc(b, x) if last else x
    y = group_normalization(b, planes, scale, shift, num_groups=groups, epsilon=epsilon)
    y = emit_map(b, lambda e: e * sigmoid(e), y) if activation else y
    return to_nhwc(b, y) if last else y


@operator("EmbedLayerNormalization", since=1, domain=MICROSOFT)
def embed_layer_normalization(
    b: Builder,
    input_ids: Value,
    segment_ids: Value | None,
    word_embedding: Value,
    position_embedding: Value,
    segment_embedding: Value | None,
    gamma: Value,
    beta: Value,
    mask: Value | None = None,
    position_ids: Value | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 1,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.EmbedLayerNormalization

    The second output counts the ones of every row of the mask.
    """
    total = b.emit(ops.Gather(0), word_embedding, input_ids)
    places = b.emit(ops.Iota(input_ids.shape[1], INT64)) if position_ids is None else position_ids
    total = emit_map(b, lambda w, p: w + p, total, b.emit(ops.Gather(0), position_embedding, places))
    if segment_ids is not None and segment_embedding is not None:
        total = emit_map(b, lambda w, s: w + s, total, b.emit(ops.Gather(0), segment_embedding, segment_ids))
    y = b.emit(ops.LayerNorm(2, epsilon), total, gamma, beta)
    return (y, _mask_index(b, input_ids, mask), total)[:output_count]


def _mask_index(b: Builder, input_ids: Value, mask: Value | None) -> Value:
    if mask is None:
        return b.emit(ops.Expand((input_ids.shape[0],)), b.constant(INT32.type(0)))
    return b.emit(ops.Reduce("sum", (1,), False, before=cast(equal(expr.arg(0, mask.dtype), 1), INT32)), mask)


@operator("QEmbedLayerNormalization", since=1, domain=MICROSOFT)
def q_embed_layer_normalization(
    b: Builder,
    input_ids: Value,
    segment_ids: Value | None,
    word_embedding: Value,
    position_embedding: Value,
    segment_embedding: Value | None,
    gamma: Value,
    beta: Value,
    mask: Value | None,
    word_scale: Value,
    position_scale: Value,
    segment_scale: Value | None,
    gamma_scale: Value,
    beta_scale: Value,
    word_zero_point: Value,
    position_zero_point: Value,
    segment_zero_point: Value | None,
    gamma_zero_point: Value,
    beta_zero_point: Value,
    *,
    epsilon: float = 1e-12,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QEmbedLayerNormalization"""
    words, places, scale, shift = (
        dequantize_linear(b, value, factor, zero)
        for value, factor, zero in (
            (word_embedding, word_scale, word_zero_point),
            (position_embedding, position_scale, position_zero_point),
            (gamma, gamma_scale, gamma_zero_point),
            (beta, beta_scale, beta_zero_point),
        )
    )
    segments = None
    if segment_embedding is not None and segment_scale is not None:
        segments = dequantize_linear(b, segment_embedding, segment_scale, segment_zero_point)
    return embed_layer_normalization(b, input_ids, segment_ids, words, places, segments, scale, shift, mask,
                                     epsilon=epsilon, output_count=output_count)  # fmt: skip


@operator("BranchwiseRMSNorm", since=1, domain=MICROSOFT)
def branchwise_rms_norm(
    b: Builder, x: Value, scale: Value | None = None, *, num_branches: int = 0, epsilon: float = 1e-5
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.BranchwiseRMSNorm"""
    branches = x
    if num_branches:
        apart = (*x.shape[:-1], num_branches, dims.floor_div(x.shape[-1], num_branches))
        branches = b.emit(ops.Reshape(apart), x)
    affine = []
    if scale is not None:
        held, width = scale, branches.shape[-1]
        if scale.rank == 1:
            held = b.emit(ops.Reshape((dims.floor_div(scale.shape[0], width), width)), scale)
        affine = [emit_map(b, lambda e: cast(e, FLOAT32), held)]
    wide = emit_map(b, lambda e: cast(e, FLOAT32), branches)
    y = b.emit(ops.LayerNorm(branches.rank - 1, epsilon, centered=False), wide, *affine)
    return b.emit(ops.Reshape(x.shape), emit_map(b, lambda e: cast(e, x.dtype), y))


@operator("GatedRMSNorm", since=1, domain=MICROSOFT)
def gated_rms_norm(
    b: Builder, x: Value, scale: Value, gate: Value, *, activation: str = "silu", epsilon: float = 1e-5
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatedRMSNorm"""
    if activation not in ("silu", "swish", "sigmoid"):
        raise InvalidModel(f"the activation {activation} is not one of silu, swish, sigmoid")
    count = scale.shape[0]
    rows = b.emit(ops.Reshape((*x.shape[:-1], dims.floor_div(x.shape[-1], count), count)), x)
    wide, factor = (emit_map(b, lambda e: cast(e, FLOAT32), value) for value in (rows, scale))
    y = b.emit(ops.Reshape(x.shape), b.emit(ops.LayerNorm(rows.rank - 1, epsilon, centered=False), wide, factor))

    def gated(e: expr.Expr, g: expr.Expr) -> expr.Expr:
        open_ = sigmoid(cast(g, FLOAT32))
        return cast(e * (open_ if activation == "sigmoid" else cast(g, FLOAT32) * open_), x.dtype)

    return emit_map(b, gated, y, gate)
