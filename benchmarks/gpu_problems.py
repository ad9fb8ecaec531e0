"""The products and convolutions of models as graphs of one node with known extents: what `gpu_tiles` measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from benchmarks.models import MODELS
from gpu_engine.gpu import conv, gemm
from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.lowering import lowering_for
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import arranged, gpu_plan
from gpu_engine.gpu.tiles import SPLITS, Choice, Extents, GemmTile, candidates, choose, takes_parts
from gpu_engine.gpu.tuned_tiles import bucket
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Graph, Node, TensorType, Value
from gpu_engine.ir.ops import MatMul
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.passes.batchability import prove
from gpu_engine.plan.lower import NOT_BATCHED, lower_graph
from gpu_engine.plan.plan import Plan
from gpu_engine.plan.signature import Signature
from gpu_engine.tools.bundles import imported


@dataclass(frozen=True)
class Problem:
    """One product, without its epilogue; `family`, `kind` and `extents` are what its tile is chosen by."""

    graph: Graph
    options: GpuOptions
    family: str
    kind: str
    extents: Extents


def problems_of(name: str, batches: Sequence[int], options: GpuOptions) -> Iterator[Problem]:
    """Those of a model of the catalogue for so many rows, at the size that its clients bring; one for each bucket.

    Products whose extents only running tells are left out.
    """
    model = MODELS[name]
    graph = imported(model.path().read_bytes())
    batching = prove(graph)
    plan, feed = gpu_plan(graph, batching, options), model.feed(*model.timed_shape)
    fit = Signature(plan).fit([feed[port.name].shape for port in plan.input_ports])
    known = dict(zip(plan.symbols, fit.extents, strict=True))
    seen = set()
    for batch in batches if batching.symbol else [1]:
        extents = known | ({batching.symbol: batch} if batching.symbol else {})
        for node in arranged(graph).nodes:
            problem = problem_of(node, extents, options) if isinstance(node.op, MatMul | LastConv) else None
            if problem is None:
                continue
            key = problem.family, problem.kind, problem.extents.nbytes, bucket(map(dims.number, problem.extents[:4]))
            if key not in seen:
                seen.add(key)
                yield problem


def problem_of(node: Node, extents: Mapping[str, int], options: GpuOptions) -> Problem | None:
    """A product with its extents; None where they are not known, or where no tile is chosen for it."""
    types = [_static(value.type, extents) for value in node.inputs[:2]]
    op = _plain(node.op, extents)
    if op is None or None in types:
        return None
    values = tuple(Value(kind, value.constant) for kind, value in zip(types, node.inputs, strict=False) if kind)
    outputs = tuple(Value(kind) for kind in op.infer(*(value.type for value in values)))
    inputs = tuple(value for value in values if value.constant is None)
    names = tuple(f"x{i}" for i in range(len(inputs)))
    graph = Graph(inputs, outputs, (Node(op, values, outputs, node.source),), names, ("y",))
    asked: list[tuple[str, str, Extents]] = []

    def noted(family: str, extents: Extents, arch: int, *, kind: str = "gemm", **rest: Any) -> tuple[Choice, ...]:
        asked.append((family, kind, extents))
        return choose(family, extents, arch, kind=kind, **rest)

    plan = _lowered(graph, options, noted)
    if len(asked) != 1 or not all(isinstance(step.kernel, Launch) for step in plan.steps):
        return None
    ((family, kind, found),) = asked
    return Problem(graph, options, family, kind, found)


def choices(problem: Problem) -> list[Choice]:
    """Every tile of the family that fits the GPU, with every number of parts that leaves each of them enough."""
    tiles: list[GemmTile] = candidates(problem.family, problem.extents.nbytes, problem.options.arch)
    depth = dims.number(problem.extents.k)
    return [
        Choice(1, None, tile, splits)
        for tile in tiles
        for splits in SPLITS
        if splits == 1 or (takes_parts(problem.family, tile) and 2 * splits * tile.block_k <= depth)
    ]


def plan_with(problem: Problem, choice: Choice) -> Plan:
    """The launches of a problem with a tile."""
    return _lowered(problem.graph, problem.options, lambda *args, **options: (choice,))


def _lowered(graph: Graph, options: GpuOptions, chooser: object) -> Plan:
    with patch.object(gemm, "choose", chooser), patch.object(conv, "choose", chooser):
        return lower_graph(graph, NOT_BATCHED, lowering_for(options))


def _static(kind: TensorType, extents: Mapping[str, int]) -> TensorType | None:
    shape = [_number(dim, extents) for dim in kind.shape]
    return None if None in shape else TensorType(kind.dtype, tuple(extent for extent in shape if extent is not None))


def _number(dim: Dim, extents: Mapping[str, int]) -> int | None:
    found = dims.substitute(dim, dict(extents))
    return found if isinstance(found, int) else None


def _plain(op: object, extents: Mapping[str, int]) -> MatMul | LastConv | None:
    """Without the epilogue, with paddings that are known."""
    if isinstance(op, MatMul):
        return replace(op, epilogue=None)
    assert isinstance(op, LastConv)
    before, after = ([_number(pad, extents) for pad in pads] for pads in (op.before, op.after))
    if None in before or None in after:
        return None
    return replace(op, epilogue=None, before=tuple(before), after=tuple(after))
