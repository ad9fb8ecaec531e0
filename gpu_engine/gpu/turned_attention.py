"""Attention as one launch where it is, with what only moves its operands taken in."""

from __future__ import annotations

from gpu_engine.gpu.attention import Factors, emit_attention, has_kernel
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Node
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.turned_attention import TurnedAttention, View


def reads_views(node: Node) -> bool:
    """Whether the attention of a node has a kernel."""
    q, _, v, *_ = node.inputs
    return has_kernel(q.dtype, node.inputs[1].shape[-1], v.shape[-1])


def lower_turned_attention(
    options: GpuOptions,
    lowering: Lowering,
    op: TurnedAttention,
    node: Node,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> bool:
    back = tuple(map(op.out.index, range(len(op.out))))
    result = tuple(node.outputs[0].shape[axis] for axis in back)
    (queries, depth), (keys, width), lead = op.views[0].shape[-2:], op.views[2].shape[-2:], result[:-2]
    views = [*op.views, View(result, back, (0,) * len(back))]
    stored = [*(value.shape for value in node.inputs[:3]), node.outputs[0].shape]
    buffers = (*inputs[:3], outputs[0])
    walks = [_walked(buffer, shape, view, lead) for buffer, shape, view in zip(buffers, stored, views, strict=True)]
    for buffer, value in zip(inputs[3:], node.inputs[3:], strict=True):
        walks.append(Walked(buffer, broadcast_strides(value.shape, (*lead, queries, keys))))
    assert isinstance(depth, int) and isinstance(width, int)
    emit_attention(options, lowering, op.attention, Factors(tuple(walks), lead, queries, keys, depth, width))
    return True


def _walked(buffer: int, stored: Shape, view: View, lead: Shape) -> Walked:
    """A view of a buffer as the kernel walks it, with stride 0 along the axes of `lead` that it is broadcast over."""
    steps = contiguous_strides(stored)
    offset: Dim = sum((start * step for start, step in zip(view.starts, steps, strict=True)), 0)
    own = [steps[axis] for axis in view.axes]
    missing = len(lead) + 2 - len(own)
    strides = [0] * missing + [
        step if extent == whole else dims.many(extent) * step
        for extent, step, whole in zip(view.shape[:-2], own, lead[missing:], strict=False)
    ]
    return Walked(buffer, (*strides, *own[-2:]), offset)
