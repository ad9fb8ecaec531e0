"""Which lowering each engine operation has on the GPU; what has none runs its reference over the array module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from gpu_engine.gpu.arg_reductions import lower_arg_reduce
from gpu_engine.gpu.attention import lower_attention
from gpu_engine.gpu.control import lower_control
from gpu_engine.gpu.conv import lower_last_conv
from gpu_engine.gpu.counting import lower_iota, lower_shape_tensor
from gpu_engine.gpu.functions import lower_array
from gpu_engine.gpu.gathers import lower_gather, lower_gather_elements, lower_gather_nd
from gpu_engine.gpu.gemm import lower_matmul
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.maps import lower_map
from gpu_engine.gpu.movement import lower_concat, lower_expand, lower_slice, lower_transpose
from gpu_engine.gpu.narrow_products import NarrowMatMul, lower_narrow_matmul
from gpu_engine.gpu.norms import lower_layer_norm, lower_local_response_norm
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.padding import lower_pad
from gpu_engine.gpu.pooling import lower_last_pool, lower_pool
from gpu_engine.gpu.recurrent import lower_recurrent
from gpu_engine.gpu.reductions import lower_reduce
from gpu_engine.gpu.resizing import lower_resize
from gpu_engine.gpu.softmax import lower_softmax
from gpu_engine.gpu.transposed_conv import lower_last_conv_transpose
from gpu_engine.gpu.turned_attention import lower_turned_attention
from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.expr import Expr, walk
from gpu_engine.ir.graph import Node, ShapeTensor
from gpu_engine.ir.ops import (
    ArgReduce,
    Attention,
    Concat,
    Expand,
    Gather,
    GatherElements,
    GatherND,
    Iota,
    LayerNorm,
    LocalResponseNorm,
    Map,
    MatMul,
    Pad,
    Pool,
    Recurrent,
    Reduce,
    Resize,
    Slice,
    Softmax,
    Transpose,
)
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.channels_last import LastConv, LastConvTranspose, LastPool
from gpu_engine.ir.ops.control import If, Loop
from gpu_engine.plan.lower import Lowering, LowerNode
from gpu_engine.plan.turned_attention import TurnedAttention

Buffers = tuple[int, ...]
LowerOp = Callable[[Lowering, Any, Node, Buffers, Buffers], bool]
"""lower(lowering, op, node, input buffers, output buffers) appends steps; False declines, and the reference runs."""

LOWERINGS: dict[type, LowerOp] = {
    Array: lower_array,
    ArgReduce: lower_arg_reduce,
    LayerNorm: lower_layer_norm,
    LocalResponseNorm: lower_local_response_norm,
    Map: lower_map,
    Pool: lower_pool,
    LastPool: lower_last_pool,
    Resize: lower_resize,
    Recurrent: lower_recurrent,
    Reduce: lower_reduce,
    Softmax: lower_softmax,
    Transpose: lower_transpose,
    Expand: lower_expand,
    Slice: lower_slice,
    Concat: lower_concat,
    Pad: lower_pad,
    Gather: lower_gather,
    GatherElements: lower_gather_elements,
    GatherND: lower_gather_nd,
    Iota: lower_iota,
    ShapeTensor: lower_shape_tensor,
}
CHOOSING: dict[type, Callable[[GpuOptions, Lowering, Any, Node, Buffers, Buffers], bool]] = {
    Attention: lower_attention,
    TurnedAttention: lower_turned_attention,
    MatMul: lower_matmul,
    NarrowMatMul: lower_narrow_matmul,
    LastConv: lower_last_conv,
    LastConvTranspose: lower_last_conv_transpose,
}
"""Lowerings that what the plan is made for matters to."""


def lowering_for(options: GpuOptions) -> LowerNode:
    """What appends the steps of one node to a plan made for `options`."""
    table = LOWERINGS | {op: partial(lower, options) for op, lower in CHOOSING.items()}
    return partial(_lower_node, table)


def _lower_node(
    table: dict[type, LowerOp], lowering: Lowering, node: Node, inputs: Buffers, outputs: Buffers
) -> None:  # fmt: skip
    if isinstance(node.op, If | Loop):
        lower_control(lowering, node, inputs, outputs)
        return
    binds = tuple(getattr(node.op, "binds", ()))
    lower = table.get(type(node.op))
    if lower is None or (binds and lower is not lower_array) or not lower(lowering, node.op, node, inputs, outputs):
        lowering.emit(ArrayCall(evaluate, node.op, host=runs_on_host(node)), inputs, outputs, binds=binds)


def runs_on_host(node: Node) -> str:
    """Why only NumPy can run the reference of an operation; empty where the device's array module can as well."""
    dtypes = [value.dtype for value in (*node.inputs, *node.outputs)]
    below = [part for root in _exprs(tuple(vars(node.op).values())) for part in walk(root)]
    unknown = [str(dtype) for dtype in (*dtypes, *(part.dtype for part in below)) if dtype.isbuiltin != 1]
    if STRING in dtypes:
        return "strings"
    if getattr(node.op, "host", False):
        return "written for the host"
    if unknown:
        return f"CuPy has no {unknown[0]}"
    if any(part.op == "erf" for part in below):
        return "CuPy has no erf"
    if ("reduction", "mul") in getattr(node.op, "attributes", ()):
        return "CuPy has no multiply.at"
    return ""


def _exprs(field: Any) -> Iterator[Expr]:
    if isinstance(field, Expr):
        yield field
    elif isinstance(field, tuple):
        for item in field:
            yield from _exprs(item)


def evaluate(xp: Any, op: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The reference of an operation."""
    return tuple(op.evaluate(xp, *inputs))
