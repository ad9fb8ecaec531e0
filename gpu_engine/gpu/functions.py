"""Array nodes: which of their functions have kernels, known by identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_engine.gpu.distinct import lower_unique
from gpu_engine.gpu.scans import lower_accumulate
from gpu_engine.gpu.scatter import lower_scatter
from gpu_engine.gpu.suppression import lower_suppression
from gpu_engine.gpu.top_k import lower_top_k
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.running import accumulate
from gpu_engine.ir.ops.scatter import scatter_along, scatter_nd
from gpu_engine.ir.ops.selection import microsoft_unique, non_max_suppression, top_of, unique
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]

KERNELS: dict[Callable[..., Any], Callable[[Lowering, Array, Node, Buffers, Buffers], bool]] = {
    scatter_along: lower_scatter,
    scatter_nd: lower_scatter,
    top_of: lower_top_k,
    non_max_suppression: lower_suppression,
    accumulate: lower_accumulate,
    unique: lower_unique,
    microsoft_unique: lower_unique,
}


def lower_array(lowering: Lowering, op: Array, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """The function's kernels; False where it has none."""
    lower = KERNELS.get(op.function)
    return lower is not None and lower(lowering, op, node, inputs, outputs)
