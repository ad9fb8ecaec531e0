"""Biases of attention that depend on the distance."""

from __future__ import annotations

import math

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.generator import range_
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.registry import emit_map, operator, scalar
from gpu_engine.ir import ops
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.expr import Expr, cast, const, log, maximum, minimum, where
from gpu_engine.ir.graph import Builder, Value


@operator("RelativePositionBias", since=1, domain=MICROSOFT)
def relative_position_bias(
    b: Builder,
    bias_table: Value,
    query_length: Value,
    key_length: Value,
    *,
    max_distance: int,
    is_bidirectional: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.RelativePositionBias

    bias_table [buckets, heads] is read in row-major order, as a tensor of that shape is.
    """
    buckets = bias_table.shape[0]
    if not isinstance(buckets, int) or buckets < 4:
        raise InvalidModel(f"{bias_table.type} has too few buckets")
    query, key = (_count(b, length) for length in (query_length, key_length))
    rows = b.emit(ops.Reshape((*query.shape, 1)), query)
    bucket = emit_map(b, lambda i, j: _bucket(j - i, buckets, max_distance, bool(is_bidirectional)), rows, key)
    found = b.emit(ops.Transpose((2, 0, 1)), b.emit(ops.Gather(0), bias_table, bucket))
    return b.emit(ops.Reshape((1, *found.shape)), found)


def _count(b: Builder, length: Value) -> Value:
    return range_(b, scalar(b, 0, INT64), b.emit(ops.Reshape(()), length), scalar(b, 1, INT64))


def _bucket(distance: Expr, buckets: int, max_distance: int, both: bool) -> Expr:
    """https://github.com/huggingface/transformers/blob/v4.44.0/src/transformers/models/t5/modeling_t5.py
    (_relative_position_bucket): near distances have a bucket each, far ones share them by their logarithm."""
    first = const(0, INT64)
    if both:
        buckets //= 2
        first, distance = where(distance > 0, const(buckets, INT64), 0), abs(distance)
    else:
        distance = maximum(-distance, 0)
    exact = buckets // 2
    ratio = log(cast(maximum(distance, 1), FLOAT32) / exact) / math.log(max_distance / exact)
    far = minimum(cast(ratio * (buckets - exact), INT64) + exact, buckets - 1)
    return first + where(distance < exact, distance, far)
