"""The passes in order. Each is a function from Graph to Graph; the graph is verified after every one."""

from __future__ import annotations

from collections.abc import Callable

from gpu_engine.ir.graph import Graph, Node, verify
from gpu_engine.passes.activations import canonical_activations
from gpu_engine.passes.attention import recognize_attention
from gpu_engine.passes.bodies import optimize_bodies
from gpu_engine.passes.coordinates import resolve_coordinates
from gpu_engine.passes.cse import eliminate_common
from gpu_engine.passes.fusion import fuse_pointwise
from gpu_engine.passes.narrow_weights import keep_narrow
from gpu_engine.passes.norms import recognize_norms
from gpu_engine.passes.one_hot import gather_one_hot
from gpu_engine.passes.padding import absorb_padding
from gpu_engine.passes.quantized import multiply_integers
from gpu_engine.passes.ranges import decide_comparisons
from gpu_engine.passes.reductions import keep_folded_axes
from gpu_engine.passes.requantize import shorten_requantization
from gpu_engine.passes.scales import fold_scales
from gpu_engine.passes.simplify import simplify
from gpu_engine.passes.softmax import recognize_softmax
from gpu_engine.passes.transposes import clean_transposes

Pass = Callable[[Graph], Graph]
PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("quantized products", multiply_integers),
    ("narrow weights", keep_narrow),
    ("simplify", simplify),
    ("coordinates", resolve_coordinates),
    ("ranges", decide_comparisons),
    ("reductions", keep_folded_axes),
    ("common subexpressions", eliminate_common),
    ("norms", recognize_norms),
    ("softmax", recognize_softmax),
    ("one-hot products", gather_one_hot),
    ("padding", absorb_padding),
    ("scales", fold_scales),
    ("transposes", clean_transposes),
    ("simplify again", simplify),
    ("attention", recognize_attention),
    ("pointwise fusion", fuse_pointwise),
    ("activations", canonical_activations),
    ("requantization", shorten_requantization),
    ("common subexpressions again", eliminate_common),
)


def optimize(graph: Graph) -> Graph:
    """The graph after every pass of PIPELINE, the same function of its inputs up to rounding.

    A GpuEngineError names the pass and the node where a pass breaks the graph: a bug.
    """
    verified: frozenset[Node] = frozenset()
    for name, transform in PIPELINE:
        graph = verify(transform(graph), name, verified)
        verified = frozenset(graph.nodes)
    return verify(optimize_bodies(graph, optimize), "bodies", verified)
