"""Reductions whose folded axes are put back later keep them from the start.

Exporters write ReduceSum(keepdims=0), some arithmetic on the result, then Reshape to the shape with extents of 1. With
the axes kept, the arithmetic broadcasts as it is, and the recognition of norms and softmax sees one form.
"""

from __future__ import annotations

import dataclasses

from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Map, Reduce, Reshape


def keep_folded_axes(graph: Graph) -> Graph:
    """The graph with every Reshape that only restores folded axes moved up into the reductions."""
    return rewrite(graph, _restored)


def _restored(node: Node, builder: Builder) -> tuple[Value] | None:
    if not isinstance(node.op, Reshape):
        return None
    kept = _with_axes(node.inputs[0], node.outputs[0], builder, depth=6)
    return None if kept is None else (kept,)


def _with_axes(value: Value, like: Value, builder: Builder, depth: int) -> Value | None:
    """`value` in the shape of `like`, from reductions that keep their axes; None if it is made otherwise."""
    node = builder.producer(value)
    if node is None or depth == 0:
        return None
    match node.op:
        case Reduce(keepdims=False):
            op = dataclasses.replace(node.op, keepdims=True)
            (kind,) = op.infer(*(operand.type for operand in node.inputs))
            return builder.emit(op, *node.inputs) if kind.shape == like.shape else None
        case Map():
            operands = []
            for operand in node.inputs:
                same = operand.shape == value.shape
                kept = _with_axes(operand, like, builder, depth - 1) if same else operand if not operand.rank else None
                if kept is None:
                    return None
                operands.append(kept)
            return builder.emit(node.op, *operands)
    return None
