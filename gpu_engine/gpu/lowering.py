"""Which lowering each engine operation has on the GPU; what has none runs its reference over the array module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gpu_engine.gpu.arg_reductions import lower_arg_reduce
from gpu_engine.gpu.attention import lower_attention
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.maps import lower_map
from gpu_engine.gpu.norms import lower_layer_norm, lower_local_response_norm
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.reductions import lower_reduce
from gpu_engine.gpu.softmax import lower_softmax
from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import ArgReduce, Attention, LayerNorm, LocalResponseNorm, Map, Reduce, Softmax
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
LowerOp = Callable[[Lowering, Any, Node, Buffers, Buffers], bool]
"""lower(lowering, op, node, input buffers, output buffers) appends steps; False declines, and the reference runs."""

LOWERINGS: dict[type, LowerOp] = {
    ArgReduce: lower_arg_reduce,
    Attention: partial(lower_attention, GpuOptions()),
    LayerNorm: lower_layer_norm,
    LocalResponseNorm: lower_local_response_norm,
    Map: lower_map,
    Reduce: lower_reduce,
    Softmax: lower_softmax,
}


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
