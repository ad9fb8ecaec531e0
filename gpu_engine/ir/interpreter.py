"""The reference interpreter: a graph run node by node through the operations' own `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InputError
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim, Sym, Symbol
from gpu_engine.ir.graph import Graph, Node, Value
from gpu_engine.ir.parameters import op_dims, resolve


def run_graph(
    xp: Any, graph: Graph, inputs: Sequence[Any], extents: Mapping[str, int] | None = None
) -> tuple[Any, ...]:
    """The outputs for one array per input; `extents` are symbols known already, the others are read off the shapes.

    InputError if two arrays disagree on an extent.
    """
    known = dict(extents or {})
    arrays: dict[Value, Any] = {}
    for value, array in zip(graph.inputs, inputs, strict=True):
        arrays[value] = array
        bind_extents(known, value, array.shape)
    for node in graph.nodes:
        _run_node(xp, node, arrays, known)
    return tuple(_read(xp, value, arrays, known) for value in graph.outputs)


def _run_node(xp: Any, node: Node, arrays: dict[Value, Any], known: dict[str, int]) -> None:
    values: dict[Dim, int] = {dim: _extent(dim, known) for dim in op_dims(node.op)}
    op = resolve(node.op, values) if values else node.op
    results = op.evaluate(xp, *(_read(xp, value, arrays, known) for value in node.inputs))
    for value, array in zip(node.outputs, results, strict=True):
        arrays[value] = array
        bind_extents(known, value, array.shape)


def _read(xp: Any, value: Value, arrays: Mapping[Value, Any], known: Mapping[str, int]) -> Any:
    if value in arrays:
        return arrays[value]
    assert value.known is not None
    if not value.symbolic:
        return xp.asarray(value.known)
    extents = [_extent(dim, known) for dim in value.known.flat]
    return xp.asarray(np.array(extents, value.dtype).reshape(value.known.shape))


def bind_extents(known: dict[str, int], value: Value, shape: Sequence[int]) -> None:
    """Add what the shape of a value tells of the extents in its type; InputError if it contradicts what is known."""
    for dim, actual in zip(value.shape, shape, strict=True):
        name = _only_name(dim)
        if name and known.setdefault(name, actual) != actual:
            raise InputError(f"the extent {name} is {known[name]} and {actual}")


def _only_name(dim: Dim) -> str:
    """The name of an extent that is a symbol and nothing else."""
    match dim:
        case Sym(terms=(((Symbol(name),), 1),)):
            return name
    return ""


def _extent(dim: Dim, known: Mapping[str, int]) -> int:
    value = dims.substitute(dim, known)
    assert isinstance(value, int), f"{dim} is not bound by {known}"
    return max(value, 0)
