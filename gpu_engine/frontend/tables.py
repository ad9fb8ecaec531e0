"""Tables computed from constants to read some of their rows: the rows are read first, then computed.

A model with weights of few bits makes floats of a whole vocabulary before it looks up a sentence. Folding that takes
as long, and as much memory, as all else together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from gpu_engine.frontend.model import ModelGraph, ModelNode
from gpu_engine.frontend.order import free_names

POINTWISE = frozenset(("Cast", "Mul", "Add", "Sub", "Div"))
LEAST_ROWS = 1024


@dataclass(frozen=True)
class _Table:
    """What makes a table: pointwise nodes in order, and the constants that they read, by rows or as they are."""

    rows: int
    rank: int
    nodes: tuple[ModelNode, ...]
    by_row: frozenset[str]


def read_rows_first(graph: ModelGraph) -> ModelGraph:
    """The graph in which a Gather of rows of a table that only Gathers use reads the constants behind it instead."""
    overridable = {info.name for info in graph.inputs}
    constants = {name: array for name, array in graph.initializers.items() if name not in overridable}
    uses = Counter(name for node in graph.nodes for name in free_names(node))
    uses.update(info.name for info in graph.outputs)
    found: dict[str, _Table] = {}
    for node in graph.nodes:
        table = _table(node, constants, found, uses)
        if table is not None:
            found[node.outputs[0]] = table
    readers = Counter(node.inputs[0] for node in graph.nodes if _reads_rows(node))
    tables = {name: table for name, table in found.items() if 0 < uses[name] == readers[name]}
    if not tables:
        return graph
    gone = {name for table in tables.values() for node in table.nodes for name in node.outputs}
    nodes = []
    for node in graph.nodes:
        read = tables.get(node.inputs[0]) if _reads_rows(node) else None
        nodes += _late(read, node) if read is not None else [node] * gone.isdisjoint(node.outputs)
    return replace(graph, nodes=tuple(nodes))


def _reads_rows(node: ModelNode) -> bool:
    data_alone = len(node.inputs) == 2 and node.inputs[0] != node.inputs[1] and len(node.outputs) == 1
    axis = node.attributes.get("axis", 0)
    first = isinstance(axis, int) and axis == 0
    return (node.op_type, node.domain) == ("Gather", "") and data_alone and first


def _table(
    node: ModelNode, constants: Mapping[str, NDArray[Any]], tables: Mapping[str, _Table], uses: Mapping[str, int]
) -> _Table | None:
    """The table that a pointwise node makes of constants and of another one that nothing else uses."""
    if node.op_type not in POINTWISE or node.domain or len(node.outputs) != 1 or not node.inputs:
        return None
    if node.attributes and node.op_type != "Cast":
        return None
    before = [tables[name] for name in node.inputs if name in tables and uses[name] == 1]
    arrays = {name: constants[name] for name in node.inputs if name in constants}
    if len(before) + len(arrays) != len(node.inputs) or len(before) > 1:
        return None
    rank = max([array.ndim for array in arrays.values()] + [table.rank for table in before])
    rows = max([array.shape[0] for array in arrays.values() if array.ndim == rank > 0] + [t.rows for t in before] + [0])
    if rank < 2 or rows < LEAST_ROWS or any((table.rank, table.rows) != (rank, rows) for table in before):
        return None
    if any(array.ndim == rank and array.shape[0] != rows for array in arrays.values()):
        return None
    by_row = {name for name, array in arrays.items() if array.ndim == rank}
    inner = before[0] if before else _Table(rows, rank, (), frozenset())
    return _Table(rows, rank, (*inner.nodes, node), inner.by_row | by_row)


def _late(table: _Table, gather: ModelNode) -> list[ModelNode]:
    """The rows of every constant, then the table's nodes on them; the last one makes what `gather` made."""
    (result,), names = gather.outputs, dict[str, str]()
    nodes = []
    for name in sorted(table.by_row):
        names[name] = f"{result} of {name}"
        inputs = (name, *gather.inputs[1:])
        nodes.append(replace(gather, inputs=inputs, outputs=(names[name],)))
    for node in table.nodes:
        names[node.outputs[0]] = result if node is table.nodes[-1] else f"{result} of {node.outputs[0]}"
        inputs = tuple(names.get(name, name) for name in node.inputs)
        nodes.append(replace(node, inputs=inputs, outputs=(names[node.outputs[0]],)))
    return nodes
