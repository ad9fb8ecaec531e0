"""Which attention runs natively."""

from __future__ import annotations

from collections.abc import Sequence

from cpu_fallback.lanes import is_supported
from cpu_fallback.native import Target
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, compute_dtype
from gpu_engine.ir.graph import Graph, TensorType
from gpu_engine.plan import turned_attention


def turn_attention(graph: Graph, target: Target) -> Graph:
    """The graph with attention in place of attention between transposes and slices, wherever it has a native form."""
    return turned_attention.turn_attention(
        graph, lambda node: has_kernel(node.outputs[0].type, [value.type for value in node.inputs], target)
    )


def has_kernel(result: TensorType, operands: Sequence[TensorType], target: Target) -> bool:
    """Whether attention of these operands runs natively: in float32, with conversions that the processor can do."""
    casts = [expr.cast(expr.arg(0, kind.dtype), FLOAT32) for kind in operands]
    casts.append(expr.cast(expr.arg(0, FLOAT32), result.dtype))
    return compute_dtype(result.dtype) == FLOAT32 and all(is_supported(cast, target) for cast in casts)
