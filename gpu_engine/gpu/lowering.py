"""Which lowering each engine operation has on the GPU; what has none runs its reference over the array module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpu_engine.gpu.counting import lower_iota, lower_shape_tensor
from gpu_engine.gpu.gathers import lower_gather, lower_gather_elements, lower_gather_nd
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.maps import lower_map
from gpu_engine.gpu.movement import lower_concat, lower_expand, lower_slice, lower_transpose
from gpu_engine.gpu.padding import lower_pad
from gpu_engine.gpu.recurrent import lower_recurrent
from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.graph import Node, ShapeTensor
from gpu_engine.ir.ops import (
    Concat,
    Expand,
    Gather,
    GatherElements,
    GatherND,
    Iota,
    Map,
    Pad,
    Recurrent,
    Slice,
    Transpose,
)
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
LowerOp = Callable[[Lowering, Any, Node, Buffers, Buffers], bool]
"""lower(lowering, op, node, input buffers, output buffers) appends steps; False declines, and the reference runs."""

LOWERINGS: dict[type, LowerOp] = {
    Map: lower_map,
    Transpose: lower_transpose, Expand: lower_expand, Slice: lower_slice, Concat: lower_concat, Pad: lower_pad,
    Gather: lower_gather, GatherElements: lower_gather_elements, GatherND: lower_gather_nd,
    Iota: lower_iota, ShapeTensor: lower_shape_tensor, Recurrent: lower_recurrent,
}  # fmt: skip


def lower_node(lowering: Lowering, node: Node, inputs: Buffers, outputs: Buffers) -> None:
    """The steps of one node."""
    binds = tuple(getattr(node.op, "binds", ()))
    lower = LOWERINGS.get(type(node.op))
    if binds or lower is None or not lower(lowering, node.op, node, inputs, outputs):
        lowering.emit(ArrayCall(evaluate, node.op, host=runs_on_host(node)), inputs, outputs, binds=binds)


def runs_on_host(node: Node) -> bool:
    """Whether an operation is only known to NumPy: it says so, or its elements are none of the array module's."""
    dtypes = [value.dtype for value in (*node.inputs, *node.outputs)]
    return getattr(node.op, "host", False) or any(dtype == STRING or dtype.kind == "V" for dtype in dtypes)


def evaluate(xp: Any, op: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The reference of an operation."""
    return tuple(op.evaluate(xp, *inputs))
