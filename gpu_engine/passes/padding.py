"""Zero padding in front of a convolution is padding by the convolution."""

from __future__ import annotations

import dataclasses

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Conv, Pad
from gpu_engine.passes.simplify import nonzero


def absorb_padding(graph: Graph) -> Graph:
    """The graph without Pads that add zeros, along spatial axes, to what a convolution reads."""
    return rewrite(graph, _absorbed)


def _absorbed(node: Node, builder: Builder) -> tuple[Value] | None:
    made = builder.producer(node.inputs[0]) if isinstance(node.op, Conv) else None
    if made is None or not isinstance(made.op, Pad) or not isinstance(node.op, Conv) or not _zeros(made):
        return None
    before, after = made.op.before, made.op.after
    if any(map(nonzero, (*before[:2], *after[:2]))) or not all(map(grows, (*before[2:], *after[2:]))):
        return None
    if not all(map(grows, (*node.op.before, *node.op.after))):
        return None
    op = dataclasses.replace(
        node.op,
        before=tuple(a + b for a, b in zip(before[2:], node.op.before, strict=True)),
        after=tuple(a + b for a, b in zip(after[2:], node.op.after, strict=True)),
    )
    return (builder.emit(op, *made.inputs[:1], *node.inputs[1:]),)


def _zeros(made: Node) -> bool:
    fill = made.inputs[1].constant if len(made.inputs) > 1 else None
    return made.op.mode == "constant" and (len(made.inputs) == 1 or (fill is not None and not fill.any()))  # type: ignore[attr-defined]


def grows(dim: Dim) -> bool:
    return isinstance(dim, int) and dim >= 0
