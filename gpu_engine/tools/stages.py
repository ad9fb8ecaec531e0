"""A model in each of its forms, and which ONNX nodes became which steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_engine.errors import InputError, OutOfMemory
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.model import Model, ModelNode
from gpu_engine.frontend.reader import ModelSource, SpecificationFunctions, read
from gpu_engine.gpu.bundle import is_bundle, read_bundle
from gpu_engine.ir.dims import Dim, number, substitute, symbols
from gpu_engine.ir.graph import Graph, Node
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Batching, Plan, Step

TYPICAL = (64, 512, 256, 16, 1024, 1)
"""What extents other than the batch are unless they are given: the first number that the model takes."""

Lower = Callable[[Graph, Batching], Plan]
Extents = Mapping[str, int]


@dataclass(frozen=True)
class Stages:
    """What the file says, the graph before and after the passes, and the plan."""

    model: Model
    imported: Graph
    optimized: Graph
    plan: Plan


def read_named(source: ModelSource) -> Model:
    """The model of a file or bundle; nodes without a name have that of their first output."""
    model = read(read_bundle(source).model() if is_bundle(source) else source)
    nodes = tuple(
        node if node.name or not node.outputs else replace(node, name=node.outputs[0]) for node in model.graph.nodes
    )
    return replace(model, graph=replace(model.graph, nodes=nodes))


def stages_of(model: Model, lower: Lower) -> Stages:
    """All stages; raises what compile() raises."""
    imported = import_model(model, SpecificationFunctions())
    optimized = optimize(imported)
    return Stages(model, imported, optimized, lower(optimized, prove(optimized)))


def label(node: ModelNode, model: Model) -> str:
    """What errors and steps call a node of the graph."""
    name = f"{node.op_type} {node.name!r}" if node.name else node.op_type
    return f"{name} (opset {model.opsets.get(node.domain, '?')})"


def short(source: str) -> str:
    """A node's label without its opset."""
    return source.partition(" (opset ")[0]


def nodes_of_steps(imported: Graph, sources: Collection[str]) -> tuple[dict[str, list[str]], list[str]]:
    """For each of the `sources` that steps name the nodes of the imported graph that went into them, in order, and the
    nodes that went nowhere. A pass that joins nodes names the last of them, so a node that no step names went where its
    result did."""
    consumers: dict[Any, list[Node]] = {}
    for node in imported.nodes:
        for value in node.inputs:
            consumers.setdefault(value, []).append(node)
    homes: dict[Node, dict[str, None]] = {}
    for node in reversed(imported.nodes):
        following = [user for value in node.outputs for user in consumers.get(value, ())]
        found = [node.source] if node.source in sources else [home for user in following for home in homes[user]]
        homes[node] = dict.fromkeys(found)
    members: dict[str, dict[str, None]] = {source: {} for source in sources}
    nowhere: dict[str, None] = {}
    for node in imported.nodes:
        for home in homes[node]:
            members[home][node.source] = None
        if not homes[node]:
            nowhere[node.source] = None
    return {source: list(found) for source, found in members.items()}, list(nowhere)


def kernel_name(step: Step) -> str:
    """What runs: a device's kernel, or the operation that a function over arrays computes."""
    kernel = getattr(step.kernel, "kernel", None)
    if kernel is None:
        return f"{type(step.kernel.op).__name__} over arrays"
    return str(getattr(kernel, "name", type(kernel).__name__.removesuffix("Kernel")))


def parse_extents(texts: Sequence[str]) -> dict[str, int]:
    """The extents that "N=8" texts give; ValueError for anything else."""
    found = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not equals or not name or not number.isdecimal():
            raise ValueError(f"an extent is given like N=8, not {text!r}")
        found[name] = int(number)
    return found


def extents_of(plan: Plan, given: Extents) -> dict[str, int]:
    """A value for every symbol of the inputs: the given one, else 1 for axis 0 of an input of several axes, which is
    the batch as a rule, and one of TYPICAL for all others. InputError for a name that no extent of the plan has."""
    known = {name for buffer in plan.buffers for dim in buffer.shape for name in symbols(dim)} | {*plan.symbols}
    for name in given:
        if name not in known:
            raise InputError(f"the model has no extent {name!r}; it has {', '.join(sorted(known)) or 'none'}")
    single = {plan.batching.symbol}.union(*(symbols(port.shape[0]) for port in plan.input_ports if len(port.shape) > 1))
    choices = [{name: 1 if name in single else extent for name in plan.symbols} | dict(given) for extent in TYPICAL]
    return next((choice for choice in choices if _takes(plan, choice)), choices[0])


def _takes(plan: Plan, extents: Extents) -> bool:
    """Whether binding the plan to these extents contradicts nothing that is known before it runs."""
    try:
        plan.program.segments[0].numbers.evaluate([extents[name] for name in plan.symbols])
    except (InputError, OutOfMemory):
        return False
    return True


def known(dim: Dim, extents: Extents) -> int | None:
    """The value of an extent, or None if it depends on others."""
    value = substitute(dim, extents)
    return max(value, 0) if isinstance(value, int) else None


def shapes_at(plan: Plan, extents: Extents) -> dict[str, tuple[int, ...]]:
    """The inputs' shapes, whose symbols all have extents."""
    return {port.name: tuple(number(substitute(dim, extents)) for dim in port.shape) for port in plan.input_ports}


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
