"""Common subexpressions: equal operations on the same values are computed once."""

from __future__ import annotations

from typing import Any

from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite

SMALL_NBYTES = 1 << 12


def eliminate_common(graph: Graph) -> Graph:
    """The graph in which no two deterministic nodes have equal ops and the same operands.

    Constants count as the same if they are small and equal to the bit; larger ones only if they are one value.
    """
    made: dict[Any, tuple[Value, ...]] = {}
    first: dict[Any, Value] = {}

    def representative(value: Value) -> Value:
        key = constant_key(value)
        return value if key is None else first.setdefault(key, value)

    def rule(node: Node, builder: Builder) -> tuple[Value, ...] | None:
        key = (type(node.op), node.op, tuple(map(representative, node.inputs)))
        if not getattr(node.op, "deterministic", True) or not hashable(key):
            return None
        found = made.setdefault(key, node.outputs)
        return None if found is node.outputs else found

    return rewrite(graph, rule)


def constant_key(value: Value) -> Any:
    """What small constants of equal contents share, or None."""
    array = value.constant
    if array is None or array.nbytes > SMALL_NBYTES or value.dtype == STRING:
        return None
    return array.dtype, array.shape, array.tobytes()


def hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
