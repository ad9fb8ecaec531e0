"""The least time that a network can take: each of its layers at the measured matrix rate or the measured copy rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from benchmarks.arithmetic import node_flops
from benchmarks.inputs import Feed
from gpu_engine.ir import dims
from gpu_engine.ir.graph import Graph, Node, ShapeTensor, Value
from gpu_engine.ir.ops import Expand, Iota, Reshape
from gpu_engine.plan.lower import NOT_BATCHED, lower_graph
from gpu_engine.plan.signature import Signature

FREE = (Reshape, Expand, Iota, ShapeTensor)
"""What need not move a byte: its result is a view, or read as it is computed."""


@dataclass(frozen=True)
class Rates:
    """What was measured on the device: multiplications and additions a second in a precision, bytes read and written
    a second by a copy."""

    flops_per_s: float
    nbytes_per_s: float


def rates_at(ceilings: Mapping[str, float], precision: str) -> Rates:
    """Those of a precision, of what `gpu_ceilings.rates` measured."""
    return Rates(ceilings[precision], ceilings["copy"])


@dataclass(frozen=True)
class Floor:
    """Operations and bytes of a network whose layers each read their operands once and write their results once, the
    seconds that they take at the ceilings, layer by layer, and the share of those in which products are the ceiling."""

    flops: int
    nbytes: int
    seconds: float
    matrix_share: float


def floor(graph: Graph, feed: Feed, rates: Rates) -> Floor:
    """Of an optimized graph for inputs of these shapes. Small tensors may stay in the caches, so that a small batch can
    be a little faster than this."""
    plan = lower_graph(graph, NOT_BATCHED, lambda *_: None)
    fit = Signature(plan).fit([feed[name].shape for name in graph.input_names])
    known = dict(zip(plan.symbols, fit.extents, strict=True))
    layers = [(node_flops(node, known) or 0, _nbytes(node, known)) for node in graph.nodes]
    times = [(flops / rates.flops_per_s, nbytes / rates.nbytes_per_s) for flops, nbytes in layers]
    total = sum(map(max, times))
    matrix = sum(product_s for product_s, copy_s in times if product_s > copy_s)
    return Floor(
        sum(flops for flops, _ in layers), sum(nbytes for _, nbytes in layers), total, matrix / total if total else 0.0
    )  # fmt: skip


def _nbytes(node: Node, known: dict[str, int]) -> int:
    if isinstance(node.op, FREE):
        return 0
    return sum(_size(value, known) for value in (*dict.fromkeys(node.inputs), *node.outputs))


def _size(value: Value, known: dict[str, int]) -> int:
    extents = [dims.substitute(dim, known) for dim in value.shape]
    return prod(extent for extent in extents if isinstance(extent, int)) * value.dtype.itemsize
