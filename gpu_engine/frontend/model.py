"""Model: what the file says, as plain immutable values, free of protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from gpu_engine.ir.dtypes import DType

DimText = int | str | None
"""An extent as declared: a number, a name, or None where the file says nothing."""


@dataclass(frozen=True)
class TensorInfo:
    """A declared value; `shape` is None where the file does not even give the rank.

    `wrappers` are the types around the tensor type, outermost first: "sequence", "optional" or "map", which has keys of
    type `key`.
    """

    name: str
    dtype: DType | None
    shape: tuple[DimText, ...] | None
    wrappers: tuple[str, ...] = ()
    key: DType | None = None


@dataclass(frozen=True)
class ModelNode:
    """One NodeProto. An empty name among `inputs` is an absent optional input. Attributes are Python values: int,
    float, str, bytes that are no text, NumPy arrays, ModelGraph, AttributeReference (in bodies), and tuples."""

    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    name: str = ""


@dataclass(frozen=True)
class AttributeReference:
    """Inside a function body: the value of the calling node's attribute `name`."""

    name: str


@dataclass(frozen=True)
class ModelGraph:
    """A graph or the body of an If, Loop or Scan; its nodes may use names of the enclosing graph."""

    nodes: tuple[ModelNode, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    initializers: Mapping[str, NDArray[Any]]
    name: str = ""


@dataclass(frozen=True)
class ModelFunction:
    """A model-local function or the specification's own body of an operator."""

    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[ModelNode, ...]
    opsets: Mapping[str, int]
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A whole file. `opsets` maps a domain ("" is ai.onnx) to the version the graph uses."""

    graph: ModelGraph
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str], ModelFunction]
    metadata: Mapping[str, str]
    ir_version: int = 0
    producer: str = ""


def graphs_of(node: ModelNode) -> Iterator[ModelGraph]:
    """The graphs among the attributes of a node."""
    for attribute in node.attributes.values():
        for graph in attribute if isinstance(attribute, tuple) else (attribute,):
            if isinstance(graph, ModelGraph):
                yield graph


def nested_nodes(nodes: Iterable[ModelNode]) -> Iterator[ModelNode]:
    """The nodes and, however deep, those of the graphs among their attributes."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(inner for graph in graphs_of(node) for inner in graph.nodes)
