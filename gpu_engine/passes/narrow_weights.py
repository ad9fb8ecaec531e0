"""Which weights stay narrow: large matrices, and float8, that only products read; all others become numbers here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from gpu_engine.ir.dims import number
from gpu_engine.ir.dtypes import is_float
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Conv, Dequantize, MatMul, Transpose
from gpu_engine.ir.ops.weights import expanded

LEAST = 1 << 16
"""Elements from which on the memory that a matrix takes matters more than what passes make of known numbers."""


def keep_narrow(graph: Graph) -> Graph:
    """The graph whose Dequantize nodes are second factors, perhaps transposed: integers of matrix products, of LEAST
    elements, and float8 numbers of products and convolutions. Devices without kernels for them expand them
    (`plan.weights`)."""
    if not any(isinstance(node.op, Dequantize) for node in graph.nodes):
        return graph
    users: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            users.setdefault(value, []).append(node)
    outputs = frozenset(graph.outputs)

    def rule(node: Node, builder: Builder) -> Sequence[Value] | None:
        if not isinstance(node.op, Dequantize) or _stays(node, users, outputs):
            return None
        return expanded(node, builder)

    return rewrite(graph, rule)


def _stays(node: Node, users: Mapping[Value, Sequence[Node]], outputs: frozenset[Value]) -> bool:
    codes, weights = node.inputs[0], node.outputs[0]
    if weights in outputs or (weights.rank > 2 and not is_float(codes.dtype)):
        return False
    large = is_float(codes.dtype) or prod(map(number, weights.shape)) >= LEAST
    return large and all(_multiplies(weights, user, users, outputs) for user in users.get(weights, ()))


def _multiplies(
    weights: Value, user: Node, users: Mapping[Value, Sequence[Node]], outputs: frozenset[Value]
) -> bool:  # fmt: skip
    """Whether a user reads the weights as the second factor of a product, or for nothing but such products."""
    match user.op:
        case MatMul() | Conv():
            fits = isinstance(user.op, Conv) == (weights.rank > 2)
            return fits and user.inputs[1] is weights and weights not in (user.inputs[0], *user.inputs[2:])
        case Transpose():
            turned = user.outputs[0]
            return turned not in outputs and all(
                _multiplies(turned, other, users, outputs) for other in users.get(turned, ())
            )
    return False
