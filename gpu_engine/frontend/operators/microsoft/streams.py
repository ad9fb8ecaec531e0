"""Several residual streams side by side: mixing them, and gating what enters them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr, cast, maximum, sigmoid, sign, sqrt
from gpu_engine.ir.graph import Builder, Value


def _apart(b: Builder, x: Value, branches: int) -> Value:
    """x [..., C * H] as [..., C, H]; without a number of branches it is so already."""
    if not branches:
        return x
    return b.emit(ops.Reshape((*x.shape[:-1], branches, dims.floor_div(x.shape[-1], branches))), x)


def _gates(b: Builder, mix: Value, streams: Value) -> Value:
    """Gates [..., C], [..., C, 1 or H] or [..., C * H] in float32 for streams [..., C, H]."""
    if mix.rank < streams.rank:
        branches = streams.shape[-2]
        width = dims.floor_div(mix.shape[-1], branches)
        mix = b.emit(ops.Reshape((*mix.shape[:-1], branches, width)), mix)
    return emit_map(b, lambda e: cast(e, FLOAT32), mix)


@operator("HyperConnectionPreMix", since=1, domain=MICROSOFT)
def hyper_connection_pre_mix(
    b: Builder, streams: Value, pre_mix: Value, *, num_branches: int = 0, reduction_scale: float = 1.0
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.HyperConnectionPreMix"""
    apart = _apart(b, streams, num_branches)
    gates = _gates(b, pre_mix, apart)
    product = cast(expr.arg(0, apart.dtype), FLOAT32) * expr.arg(1, FLOAT32)
    after = cast(expr.arg(0, FLOAT32) * reduction_scale, streams.dtype)
    return b.emit(ops.Reduce("sum", (apart.rank - 2,), False, product, after), apart, gates)


@operator("HyperConnectionPostMix", since=1, domain=MICROSOFT)
def hyper_connection_post_mix(
    b: Builder,
    streams: Value,
    block_output: Value,
    post_mix: Value,
    stream_mix: Value | None = None,
    *,
    num_branches: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.HyperConnectionPostMix"""
    apart = _apart(b, streams, num_branches)
    gates, kept = _gates(b, post_mix, apart), emit_map(b, lambda e: cast(e, FLOAT32), apart)
    if stream_mix is not None:
        kept = b.emit(ops.MatMul(transpose_a=True), emit_map(b, lambda e: cast(e, FLOAT32), stream_mix), kept)
    branch = b.emit(ops.Reshape((*block_output.shape[:-1], 1, block_output.shape[-1])), block_output)
    mixed = emit_map(b, lambda s, g, o: cast(s + g * cast(o, FLOAT32), streams.dtype), kept, gates, branch)
    return b.emit(ops.Reshape(streams.shape), mixed)


@operator("EngramGate", since=1, domain=MICROSOFT)
def engram_gate(
    b: Builder,
    key: Value,
    query: Value,
    value: Value,
    key_norm_scale: Value,
    query_norm_scale: Value,
    conv_norm_scale: Value | None = None,
    *,
    epsilon: float = 1e-5,
    output_count: int = 1,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.EngramGate"""
    norm = ops.LayerNorm(3, epsilon, centered=False)
    k, q = (
        b.emit(norm, *(emit_map(b, lambda e: cast(e, FLOAT32), part) for part in pair))
        for pair in ((key, key_norm_scale), (query, query_norm_scale))
    )
    width = key.shape[3]
    if not isinstance(width, int):
        raise InvalidModel(f"the last axis of {key.type} must be known when the model is compiled")
    total = expr.arg(0, FLOAT32) * float(1 / np.sqrt(width))
    opened: Expr = sigmoid(sign(total) * sqrt(maximum(abs(total), 1e-6)))
    gate = b.emit(ops.Reduce("sum", (3,), True, expr.arg(0, FLOAT32) * expr.arg(1, FLOAT32), opened), k, q)
    shared = b.emit(ops.Reshape((*value.shape[:2], 1, value.shape[2])), value)
    y = emit_map(b, lambda v, g: cast(cast(v, FLOAT32) * g, v.dtype), shared, gate)
    if output_count == 1:
        return (y,)
    if conv_norm_scale is None:
        raise InvalidModel("gated_value_normed is asked for, and there is no conv_norm_scale")
    return y, b.emit(norm, y, conv_norm_scale)
