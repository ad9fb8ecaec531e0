"""How much arithmetic and memory traffic a plan's steps mean, for rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu_engine.ir.dims import Dim, product
from gpu_engine.ir.graph import Graph, Node
from gpu_engine.ir.ops import Attention, Conv, ConvTranspose, MatMul, Recurrent
from gpu_engine.plan.memory import buffer_nbytes
from gpu_engine.plan.plan import Plan, Step, root
from gpu_engine.tools.stages import Extents, known


def node_flop(node: Node) -> Dim | None:
    """Multiplications and additions of a product, a convolution, attention or a recurrent network, as the textbook
    counts them; None for others, which memory bounds."""
    shapes, result = [value.shape for value in node.inputs], node.outputs[0].shape
    match node.op:
        case MatMul():
            return 2 * product(result) * shapes[0][-2 if node.op.transpose_a else -1]
        case Conv():
            return 2 * product(result) * product(shapes[1][1:])
        case ConvTranspose():
            return 2 * product(shapes[0]) * product(shapes[1][1:])
        case Attention():
            queries, keys, values = shapes[:3]
            return 2 * product(result[:-1]) * keys[-2] * (queries[-1] + values[-1])
        case Recurrent():
            return 2 * product(shapes[0][:2]) * product(shapes[1])
    return None


def flop_by_source(graph: Graph, members: Mapping[str, Sequence[str]]) -> dict[str, Dim]:
    """Of all nodes of an optimized graph that went into the steps of one source; `members` of each are what
    `nodes_of_steps` found."""
    homes = {name: source for source, names in members.items() for name in names}
    found: dict[str, Dim] = {}
    for node in graph.nodes:
        flop = node_flop(node)
        if flop is not None:
            home = homes.get(node.source, node.source)
            found[home] = found.get(home, 0) + flop
    return found


def step_nbytes(plan: Plan, step: Step, extents: Extents) -> int | None:
    """Bytes that a step's operands and results have, each buffer once; None where an extent is not known."""
    roots = {root(plan.buffers, index) for index in (*step.inputs, *step.outputs)}
    sizes = [known(buffer_nbytes(plan.buffers[index]), extents) for index in roots]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def flop_of_steps(plan: Plan, flops: Mapping[str, Dim], seconds: Sequence[float], extents: Extents) -> list[int | None]:
    """For every step the arithmetic of its node, which the longest of the node's steps is taken to do."""
    longest: dict[str, int] = {}
    for number, step in enumerate(plan.steps):
        best = longest.setdefault(step.source, number)
        if seconds[number] > seconds[best]:
            longest[step.source] = number
    return [
        known(flops[step.source], extents) if step.source in flops and longest[step.source] == number else None
        for number, step in enumerate(plan.steps)
    ]
