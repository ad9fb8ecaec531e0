"""Which weights stay narrow: large matrices that only matrix products read; all others become numbers here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from gpu_engine.ir.dims import number
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Dequantize, MatMul, Transpose
from gpu_engine.ir.ops.weights import expanded

LEAST = 1 << 16
"""Elements from which on the memory that a matrix takes matters more than what passes make of known numbers."""


def keep_narrow(graph: Graph) -> Graph:
    """The graph whose Dequantize nodes are the second factors of products, perhaps transposed, and of LEAST elements;
    what a device without kernels for them makes of them is `ir.ops.weights.expanded`."""
    if not any(isinstance(node.op, Dequantize) for node in graph.nodes):
        return graph
    users: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            users.setdefault(value, []).append(node)
    outputs = frozenset(graph.outputs)

    def rule(node: Node, builder: Builder) -> Sequence[Value] | None:
        if not isinstance(node.op, Dequantize) or _stays(node.outputs[0], users, outputs):
            return None
        return expanded(node, builder)

    return rewrite(graph, rule)


def _stays(weights: Value, users: Mapping[Value, Sequence[Node]], outputs: frozenset[Value]) -> bool:
    return (
        weights.rank == 2
        and prod(map(number, weights.shape)) >= LEAST
        and weights not in outputs
        and all(_multiplies(weights, user, users, outputs) for user in users.get(weights, ()))
    )


def _multiplies(
    weights: Value, user: Node, users: Mapping[Value, Sequence[Node]], outputs: frozenset[Value]
) -> bool:  # fmt: skip
    """Whether a user reads the weights as the second factor of a product of floats, or of nothing but such ones."""
    match user.op:
        case MatMul():
            return user.inputs[1] is weights and weights not in (user.inputs[0], *user.inputs[2:])
        case Transpose():
            turned = user.outputs[0]
            return turned not in outputs and all(
                _multiplies(turned, other, users, outputs) for other in users.get(turned, ())
            )
    return False
