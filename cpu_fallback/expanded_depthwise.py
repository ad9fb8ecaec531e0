"""1x1 convolutions and the depthwise ones behind them as one operation, where the tensor between them is large."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cpu_fallback.caches import caches
from cpu_fallback.calls import Native
from cpu_fallback.conv_lowering import geometry_of, panel_vectors, thread_limit
from cpu_fallback.conv_tiles import tile_shape
from cpu_fallback.conv_weights import Floats, aligned, depthwise_weights, tile_weights
from cpu_fallback.depthwise_driver import ROWS, reach_of, window_of
from cpu_fallback.epilogues import FULL, Finish, finish_of
from cpu_fallback.expanded_driver import ExpandedDepthwiseKernel
from cpu_fallback.native import Target, host
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import FLOAT32, UINT8
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, rewrite, use_counts
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
WEIGHTS = 8
"""Of the second cache the weights take a part of so much at most: every few rows read all of them again."""


@dataclass(frozen=True)
class ExpandedDepthwise:
    """`second` of what `first` makes of x [N, H, W, C]. Inputs: x, the weights of both, then the operands of the first
    one's epilogue, of which there are `operands`, and of the second one's."""

    first: LastConv
    second: LastConv
    operands: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, w, taps, *extras = inputs
        (made,) = self.first.infer(x, w, *extras[: self.operands])
        return self.second.infer(made, taps, *extras[self.operands :])

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, w, taps, *extras = arrays
        (made,) = self.first.evaluate(xp, x, w, *extras[: self.operands])
        return self.second.evaluate(xp, made, taps, *extras[self.operands :])


def join_expansions(graph: Graph, target: Target) -> Graph:
    """The graph with every such pair as one, if it has a kernel and the tensor between leaves the second cache."""
    uses = use_counts(graph)

    def rule(node: Node, builder: Builder) -> tuple[Value] | None:
        made = builder.producer(node.inputs[0]) if node.inputs else None
        if made is None or uses.get(node.inputs[0]) != 1 or not _is_pair(made, node, target):
            return None
        assert isinstance(made.op, LastConv) and isinstance(node.op, LastConv)
        (x, w, *before), (_, taps, *after) = made.inputs, node.inputs
        joined = ExpandedDepthwise(made.op, node.op, len(before))
        return (builder.emit(joined, x, w, taps, *before, *after),)

    return rewrite(graph, rule)


def _is_pair(made: Node, node: Node, target: Target) -> bool:
    """Whether a node is depthwise, and the one that makes its image a 1x1 convolution worth joining with it."""
    if not (_is_pointwise(made) and _is_depthwise(node)):
        return False
    shape, weights = made.outputs[0].shape, made.inputs[1].shape
    image, ring = (4 * dims.product(extents) for extents in (shape[1:], (*shape[2:], _reach(node))))
    near = isinstance(image, int) and image <= caches().l2
    wide = isinstance(ring, int) and ring > caches().l2
    if near or wide or 4 * prod(map(dims.number, weights)) > caches().l2 // WEIGHTS:
        return False
    return _finish(made, target) is not None and _finish(node, target) is not None


def _is_pointwise(node: Node) -> bool:
    if not isinstance(node.op, LastConv) or node.op.planar or node.op.group != 1 or node.op.accumulate is not None:
        return False
    w, op = node.inputs[1], node.op
    unit = all(extent == 1 for extent in (*w.shape[2:], *op.strides)) and not any((*op.before, *op.after))
    return unit and len(op.strides) == 2 and w.dtype == FLOAT32 and w.constant is not None


def _is_depthwise(node: Node) -> bool:
    op = node.op
    if not isinstance(op, LastConv) or op.planar or op.accumulate is not None or len(op.strides) != 2:
        return False
    w = node.inputs[1]
    known = w.constant is not None and w.dtype == FLOAT32 and w.shape[1] == 1
    return known and op.group == w.shape[0] and _reach(node) <= ROWS


def _reach(node: Node) -> int:
    """Rows that a row of tiles reads."""
    op, w = node.op, node.inputs[1].constant
    assert isinstance(op, LastConv) and w is not None
    return reach_of(w.shape[2], op.strides[0], op.dilations[0])


def _finish(node: Node, target: Target, buffers: Buffers = ()) -> Finish | None:
    """A node's epilogue with its operands; None where it has none for tiles, or a 1x1 convolution reads a tensor."""
    op, extras = node.op, node.inputs[2:]
    assert isinstance(op, LastConv)
    given = [(buffer, v.shape) for buffer, v in zip(buffers or range(len(extras)), extras, strict=True)]
    found = finish_of(op.epilogue, given, node.outputs[0].shape, target)
    if found is not None and FULL in found.epilogue.kinds and op.group == 1:
        return None
    return found


def lower_expanded_depthwise(
    lowering: Lowering, op: ExpandedDepthwise, node: Node, inputs: Buffers, outputs: Buffers,
    target: Target | None = None,
) -> bool:  # fmt: skip
    x, w, taps, *extras = node.inputs
    target = target or host()
    (made,) = op.first.infer(x.type, w.type, *(value.type for value in extras[: op.operands]))
    pair = _split(op, node, made)
    split = 3 + op.operands
    finishes = _finish(pair[0], target, inputs[3:split]), _finish(pair[1], target, inputs[split:])
    if w.constant is None or taps.constant is None or finishes[0] is None or finishes[1] is None:
        return False
    _emit(lowering, target, pair, (w.constant, taps.constant), (finishes[0], finishes[1]), inputs[0], outputs[0])
    return True


def _split(op: ExpandedDepthwise, node: Node, made: TensorType) -> tuple[Node, Node]:
    """The two nodes that one stands for."""
    x, w, taps, *extras = node.inputs
    between = Value(made)
    first = Node(op.first, (x, w, *extras[: op.operands]), (between,), node.source)
    return first, Node(op.second, (between, taps, *extras[op.operands :]), node.outputs, node.source)


def _emit(
    lowering: Lowering, target: Target, pair: tuple[Node, Node], weights: tuple[Floats, Floats],
    finishes: tuple[Finish, Finish], x: int, out: int,
) -> None:  # fmt: skip
    image, made, result = pair[0].inputs[0].shape, pair[0].outputs[0].shape, pair[1].outputs[0].shape
    shape, second = tile_shape(target), pair[1].op
    assert isinstance(second, LastConv)
    channels, depth = weights[0].shape[:2]
    geometry = geometry_of(second.form, weights[1].shape, made, result)
    window = window_of(geometry, channels, shape.lanes, finite=bool(np.isfinite(weights[1]).all()))
    ring = reach_of(weights[1].shape[2], geometry.stride_h, geometry.dilation_h)
    panels = panel_vectors(channels, shape)
    kernel = ExpandedDepthwiseKernel(panels, finishes[0].epilogue, window, finishes[1].epilogue, ring)
    packed = lowering.constant(tile_weights(weights[0], 1, shape))
    taps = lowering.constant(depthwise_weights(weights[1]))
    blank = lowering.constant(aligned(np.zeros(window.blank_elements(channels))))
    nbytes = 4 * (made[2] * (ring * channels) + shape.rows * depth)
    room = dims.ceil_div(nbytes, 64) * 64
    scratch = lowering.buffer(UINT8, (thread_limit() * room,))
    read = (x, packed, taps, blank)
    operands = (*finishes[0].words, *finishes[1].words)
    words = (*map(Address, (*read, out, scratch)), room, thread_limit(), image[3], *geometry, *operands)
    buffers = (*read, *finishes[0].buffers, *finishes[1].buffers)
    lowering.emit(Native(kernel, words), buffers, (out,), scratch=(scratch,))
