"""Which lowering each engine operation has on the CPU; what has none runs its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cpu_fallback.arg_reductions import lower_arg_reduce
from cpu_fallback.calls import Array, ArrayCall, evaluate_into
from cpu_fallback.control import lower_control
from cpu_fallback.convolution import lower_conv, lower_conv_transpose
from cpu_fallback.expanded_depthwise import ExpandedDepthwise, lower_expanded_depthwise
from cpu_fallback.fused_attention import lower_fused_attention, lower_turned_attention
from cpu_fallback.gated_conv import GatedConv, lower_gated_conv
from cpu_fallback.image_lowering import lower_last_conv_transpose, lower_last_pool
from cpu_fallback.integer_conv import lower_image_conv
from cpu_fallback.integer_planes import PairedPlanes, lower_paired_planes
from cpu_fallback.integer_products import lower_integer_matmul
from cpu_fallback.maps import map_call
from cpu_fallback.movement import (
    lower_concat,
    lower_expand,
    lower_gather,
    lower_pad,
    lower_slice,
    lower_transpose,
)
from cpu_fallback.recurrent import lower_recurrent
from cpu_fallback.reductions import lower_reduce
from cpu_fallback.resizing import lower_resize
from cpu_fallback.response_norms import lower_response_norm
from cpu_fallback.rows import lower_layer_norm, lower_softmax
from cpu_fallback.scalars import lower_require, lower_shape_tensor
from cpu_fallback.taps import lower_pool
from cpu_fallback.trees import lower_trees
from gpu_engine.ir.graph import Node, Op, ShapeTensor
from gpu_engine.ir.ops import (
    ArgReduce,
    Attention,
    Concat,
    Conv,
    ConvTranspose,
    Expand,
    Gather,
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
from gpu_engine.ir.ops.channels_last import LastConv, LastConvTranspose, LastPool
from gpu_engine.ir.ops.control import If, Loop, Require
from gpu_engine.ir.ops.trees import Trees
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.turned_attention import TurnedAttention

Buffers = tuple[int, ...]
LowerOp = Callable[[Lowering, Any, Node, Buffers, Buffers], bool]
"""lower(lowering, op, node, input buffers, output buffers) appends steps; False declines, and the reference runs."""


def lower_map(lowering: Lowering, op: Map, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    operands = [(buffer, value.shape) for buffer, value in zip(inputs, node.inputs, strict=True)]
    found = map_call(op.expr, operands, outputs[0], node.outputs[0].shape)
    if found is None:
        return False
    native, in_place = found
    lowering.emit(native, inputs, outputs, in_place=in_place)
    return True


LOWERINGS: dict[type, LowerOp] = {
    ArgReduce: lower_arg_reduce,
    Attention: lower_fused_attention,
    Concat: lower_concat,
    Conv: lower_conv,
    ConvTranspose: lower_conv_transpose,
    Expand: lower_expand,
    ExpandedDepthwise: lower_expanded_depthwise,
    GatedConv: lower_gated_conv,
    Gather: lower_gather,
    LastConv: lower_image_conv,
    LastConvTranspose: lower_last_conv_transpose,
    LastPool: lower_last_pool,
    LayerNorm: lower_layer_norm,
    LocalResponseNorm: lower_response_norm,
    Map: lower_map,
    MatMul: lower_integer_matmul,
    Pad: lower_pad,
    PairedPlanes: lower_paired_planes,
    Pool: lower_pool,
    Recurrent: lower_recurrent,
    Reduce: lower_reduce,
    Require: lower_require,
    Resize: lower_resize,
    ShapeTensor: lower_shape_tensor,
    Slice: lower_slice,
    Softmax: lower_softmax,
    Transpose: lower_transpose,
    Trees: lower_trees,
    TurnedAttention: lower_turned_attention,
}


def lower_node(lowering: Lowering, node: Node, inputs: Buffers, outputs: Buffers) -> None:
    """The steps of one node."""
    if isinstance(node.op, If | Loop):
        lower_control(lowering, node, inputs, outputs)
        return
    binds = tuple(getattr(node.op, "binds", ()))
    if binds:
        lowering.emit(ArrayCall(evaluate_all, node.op), inputs, outputs, binds=binds)
        return
    lower = LOWERINGS.get(type(node.op))
    if lower is None or not lower(lowering, node.op, node, inputs, outputs):
        lowering.emit(ArrayCall(evaluate_into, node.op), inputs, outputs)


def evaluate_all(op: Op, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> object:
    """The reference of a step whose extents only running tells: it gives its results instead of writing them."""
    return tuple(op.evaluate(np, *inputs))
