"""The reference: a graph run node by node over NumPy by the operations' own `evaluate`, every result's type checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, live_nodes, verify
from gpu_engine.ir.ops import Map
from gpu_engine.ir.parameters import op_dims, resolve
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize

Extents = dict[str, Dim]


def graph_of(shapes: Mapping[str, Any], build: Callable[..., Value | tuple[Value, ...]]) -> Graph:
    """The graph whose outputs `build(builder, *inputs)` emits; a shape is a tuple of extents, or (dtype, extents)."""
    builder = Builder()
    inputs = []
    for name, shape in shapes.items():
        dtype, extents = shape if shape and isinstance(shape[0], np.dtype) else (FLOAT32, shape)
        inputs.append(Value(TensorType(dtype, tuple(extents)), name=name))
    builder.source = "Test 'node'"
    built = build(builder, *inputs)
    outputs = built if isinstance(built, tuple) else (built,)
    outputs = tuple(map(builder.materialize, outputs))
    names = tuple(f"y{i}" if i else "y" for i in range(len(outputs)))
    return verify(Graph(tuple(inputs), outputs, live_nodes(builder.nodes, outputs), tuple(shapes), names), "test")


def pointwise(builder: Builder, function: Callable[..., Expr], *values: Value) -> Value:
    """A Map of `function` over the elements of `values`."""
    return builder.emit(Map(function(*(expr.arg(i, value.dtype) for i, value in enumerate(values)))), *values)


def random_inputs(graph: Graph, seed: int = 0, **extents: int) -> dict[str, Any]:
    """One array per input: normal floats, integers below 8, booleans; symbols take the given extents."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for name, value in zip(graph.input_names, graph.inputs, strict=True):
        shape = tuple(extent(dim, dict(extents)) for dim in value.shape)
        arrays[name] = random_array(generator, value.dtype, shape)
    return arrays


def random_array(generator: np.random.Generator, dtype: DType, shape: Sequence[int]) -> Any:
    if dtype.kind == "b":
        return generator.random(shape) < 0.5
    if dtype.kind in "iu":
        return generator.integers(0, 8, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def run_graph(graph: Graph, inputs: Mapping[str, Any], **given: int) -> dict[str, Any]:
    """{output name: array} of `graph` on {input name: array}; their shapes bind the extents that are not given."""
    arrays: dict[Value, Any] = {}
    extents: Extents = {**given}
    for name, value in zip(graph.input_names, graph.inputs, strict=True):
        arrays[value] = np.asarray(inputs[name], value.dtype)
        bind(extents, value.type, arrays[value])
    check(extents, ((value.type, arrays[value]) for value in graph.inputs))
    for node in graph.nodes:
        run_node(node, arrays, extents)
    return {name: read(value, arrays, extents) for name, value in zip(graph.output_names, graph.outputs, strict=True)}


def run_node(node: Node, arrays: dict[Value, Any], extents: Extents) -> None:
    values: dict[Dim, int] = {dim: extent(dim, extents) for dim in op_dims(node.op)}
    operands = [read(value, arrays, extents) for value in node.inputs]
    results = (resolve(node.op, values) if values else node.op).evaluate(np, *operands)
    for value, array in zip(node.outputs, results, strict=True):
        arrays[value] = array
        bind(extents, value.type, array)
    check(extents, ((value.type, arrays[value]) for value in node.outputs), node.source)


def read(value: Value, arrays: Mapping[Value, Any], extents: Extents) -> Any:
    if value in arrays:
        return arrays[value]
    assert value.known is not None
    if value.symbolic:
        return np.array([extent(dim, extents) for dim in value.known.flat], value.dtype).reshape(value.known.shape)
    return value.known


def bind(extents: Extents, kind: TensorType, array: Any) -> None:
    """Give the symbols that are an extent of their own their values."""
    for dim, actual in zip(kind.shape, array.shape, strict=True):
        for name in dims.symbols(dim):
            if dim == dims.symbol(name):
                extents.setdefault(name, actual)


def check(extents: Extents, found: Iterable[tuple[TensorType, Any]], source: str = "inputs") -> None:
    for kind, array in found:
        declared = tuple(extent(dim, extents) for dim in kind.shape)
        assert (array.dtype, array.shape) == (kind.dtype, declared), f"{source}: {array.dtype}{array.shape}, not {kind}"


def extent(dim: Dim, extents: Extents) -> int:
    bound = dims.substitute(dim, extents)
    assert isinstance(bound, int), f"{dim} is not bound by {extents}"
    return max(bound, 0)


def assert_same(graph: Graph, other: Graph, inputs: Mapping[str, Any], rtol: float = 2e-5, atol: float = 2e-5) -> None:
    """Both graphs compute the same on `inputs`, NaN for NaN, in dtype, shape and value."""
    expected, actual = run_graph(graph, inputs), run_graph(other, inputs)
    assert list(expected) == list(actual)
    for name, array in expected.items():
        assert (array.dtype, array.shape) == (actual[name].dtype, actual[name].shape)
        if array.dtype.kind in "biu":
            np.testing.assert_array_equal(actual[name], array)
        else:
            np.testing.assert_allclose(actual[name].astype("f8"), array.astype("f8"), rtol=rtol, atol=atol)


def kinds(graph: Graph) -> list[str]:
    return [type(node.op).__name__ for node in graph.nodes]


def optimized(graph: Graph, **extents: int) -> Graph:
    """The optimised graph, once it is shown to compute what the graph does."""
    result = optimize(graph)
    assert_same(graph, result, random_inputs(graph, **extents))
    return result


def assert_batches(graph: Graph, rows: int, rtol: float = 2e-5, atol: float = 2e-5, **extents: int) -> None:
    """Every row of a batch of `rows` gets what it gets alone, along axis 0 of every output."""
    batching = prove(graph)
    assert not batching.refused and batching.symbol is not None, batching.refused
    together = random_inputs(graph, **{batching.symbol: rows}, **extents)
    batch = run_graph(graph, together)
    for row in range(rows):
        ports = zip(graph.input_names, batching.inputs, strict=True)
        alone = {name: together[name][row : row + 1] if batched else together[name] for name, batched in ports}
        for name, array in run_graph(graph, alone).items():
            size = len(array)
            part = batch[name][row * size : (row + 1) * size]
            assert part.shape == array.shape
            np.testing.assert_allclose(part.astype("f8"), array.astype("f8"), rtol=rtol, atol=atol)
