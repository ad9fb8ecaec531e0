"""How many operations a model's products, convolutions and recurrences take, from its optimised graph."""

from __future__ import annotations

from math import prod

from benchmarks.inputs import Feed
from gpu_engine.errors import GpuEngineError
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import ModelSource, SpecificationFunctions, read
from gpu_engine.ir import dims
from gpu_engine.ir.graph import Graph, Node, Value
from gpu_engine.ir.ops.attention import Attention
from gpu_engine.ir.ops.control import If, Loop
from gpu_engine.ir.ops.linear import Conv, ConvTranspose, MatMul
from gpu_engine.ir.ops.recurrent import Recurrent
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.lower import NOT_BATCHED, lower_graph
from gpu_engine.plan.signature import Signature

Shape = tuple[int, ...]


def model_flops(model: ModelSource, feed: Feed) -> int | None:
    """Multiplications and additions of one inference of `feed`; None where only running tells.

    Convolutions count as if done directly. What is not a product (softmax, activations, pooling) does not count.
    """
    try:
        return graph_flops(optimize(import_model(read(model), SpecificationFunctions(), None)), feed)
    except GpuEngineError:
        return None


def graph_flops(graph: Graph, feed: Feed) -> int | None:
    """As `model_flops`, of an optimised graph."""
    if any(isinstance(node.op, If | Loop) for node in graph.nodes):
        return None
    plan = lower_graph(graph, NOT_BATCHED, lambda *_: None)
    fit = Signature(plan).fit([feed[name].shape for name in graph.input_names])
    known = dict(zip(plan.symbols, fit.extents, strict=True))
    counts = [node_flops(node, known) for node in graph.nodes]
    return None if None in counts else sum(count for count in counts if count is not None)


def node_flops(node: Node, known: dict[str, int]) -> int | None:
    """Of one node, whose symbols are `known`; 0 where it is no product."""
    if not isinstance(node.op, MatMul | Conv | ConvTranspose | Attention | Recurrent):
        return 0
    shapes = [_shape(value, known) for value in (*node.inputs, *node.outputs)]
    if None in shapes:
        return None
    found = [shape for shape in shapes if shape is not None]
    inputs, output = found[: len(node.inputs)], found[len(node.inputs)]
    match node.op:
        case MatMul(transpose_a=transposed):
            return 2 * prod(output) * inputs[0][-2 if transposed else -1]
        case Conv():
            return 2 * prod(output) * prod(inputs[1][1:])
        case ConvTranspose():
            return 2 * prod(inputs[0]) * prod(inputs[1][1:])
        case Attention():
            return 2 * prod(output[:-1]) * inputs[1][-2] * (inputs[0][-1] + output[-1])
        case _:
            return 2 * prod(inputs[0]) * inputs[1][-1]


def _shape(value: Value, known: dict[str, int]) -> Shape | None:
    extents = [dims.substitute(extent, known) for extent in value.shape]
    numbers = tuple(max(0, extent) for extent in extents if isinstance(extent, int))
    return numbers if len(numbers) == len(extents) else None
