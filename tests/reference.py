"""The reference interpreter: a graph run node by node over NumPy by the operations' own `evaluate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim, Sym
from gpu_engine.ir.graph import Graph, Node, TensorType, Type, Value, op_dims, resolve

Extents = dict[str, Dim]


def run_graph(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """{output name: array} of `graph` on {input name: array}; the arrays' shapes bind the symbolic extents."""
    arrays: dict[Value, Any] = {}
    extents: Extents = {}
    for name, value in zip(graph.input_names, graph.inputs, strict=True):
        arrays[value] = np.asarray(inputs[name], value.dtype)
        bind(extents, value.type, arrays[value])
    check(extents, ((value.type, arrays[value]) for value in graph.inputs))
    for node in graph.nodes:
        run_node(node, arrays, extents)
    return {name: read(value, arrays, extents) for name, value in zip(graph.output_names, graph.outputs, strict=True)}


def run_node(node: Node, arrays: dict[Value, Any], extents: Extents) -> None:
    values = {dim: extent(dim, extents) for dim in op_dims(node.op)}
    operands = [read(value, arrays, extents) for value in node.inputs]
    for value, array in zip(node.outputs, resolve(node.op, values).evaluate(np, *operands), strict=True):
        arrays[value] = array
        bind(extents, value.type, array)
    check(extents, ((value.type, arrays[value]) for value in node.outputs), node.source)


def read(value: Value, arrays: Mapping[Value, Any], extents: Extents) -> Any:
    if value in arrays:
        return arrays[value]
    assert value.known is not None
    if value.symbolic:
        filled = [extent(dim, extents) for dim in value.known.flat]
        return np.array(filled, value.dtype).reshape(value.known.shape)
    return value.known


def bind(extents: Extents, kind: Type, array: Any) -> None:
    """Give the symbols that are an extent of their own their values."""
    if not isinstance(kind, TensorType):
        return
    for dim, actual in zip(kind.shape, array.shape, strict=True):
        if isinstance(dim, Sym) and len(names := dims.symbols(dim)) == 1 and dim == dims.symbol(*names):
            extents.setdefault(*names, actual)


def check(extents: Extents, found: Iterable[tuple[Type, Any]], source: str = "inputs") -> None:
    for kind, array in found:
        if isinstance(kind, TensorType):
            declared = tuple(extent(dim, extents) for dim in kind.shape)
            assert (array.dtype, array.shape) == (kind.dtype, declared), f"{source}: {array.dtype}{array.shape}, {kind}"


def extent(dim: Dim, extents: Extents) -> int:
    bound = dims.substitute(dim, extents)
    assert isinstance(bound, int), f"{dim} is not bound by {extents}"
    return max(bound, 0)
