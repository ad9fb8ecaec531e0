"""Narrow weights as numbers, for devices and products that have no kernels for them as they are."""

from __future__ import annotations

from gpu_engine.ir.graph import Graph, rewrite
from gpu_engine.ir.ops import Dequantize
from gpu_engine.ir.ops.weights import expanded


def expand_weights(graph: Graph) -> Graph:
    """The graph without Dequantize nodes: constants where they may be folded, else maps."""
    if not any(isinstance(node.op, Dequantize) for node in graph.nodes):
        return graph
    return rewrite(graph, lambda node, builder: expanded(node, builder) if isinstance(node.op, Dequantize) else None)
