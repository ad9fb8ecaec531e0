"""The graph: typed values, nodes whose op is a dataclass instance, and the one way to rewrite it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import GpuEngineError, InvalidModel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim, Sym
from gpu_engine.ir.dtypes import INT64, STRING, DType
from gpu_engine.ir.folding import FoldingBudget, tensors_nbytes
from gpu_engine.ir.parameters import op_dims
from gpu_engine.ir.structure import Structure

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorType:
    """An element type and a shape of ints and symbolic extents; the rank is always known."""

    dtype: DType
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype if self.dtype != STRING else 'string'}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SequenceType:
    """A Python list of values of one type; lives on the host."""

    element: Type


@dataclass(frozen=True)
class OptionalType:
    """None or a value; lives on the host."""

    element: Type


Type = TensorType | SequenceType | OptionalType


class Op(Protocol):
    """An engine operation: a frozen dataclass. Its fields are its parameters; extents among them may be symbolic."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """The types of the outputs; InvalidModel if the inputs never fit."""
        ...

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        """The outputs over the array module `xp`; every extent among the fields is an int by then."""
        ...


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the graph. `known` holds its contents where the compiler knows them: an array of the dtype, or an
    object array of ints and symbolic extents (shape arithmetic)."""

    type: TensorType
    known: Array | None = None
    name: str = ""

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def rank(self) -> int:
        return len(self.type.shape)

    @property
    def symbolic(self) -> bool:
        """Whether `known` holds symbolic extents rather than elements of the dtype."""
        return self.known is not None and self.known.dtype == object and self.dtype != STRING

    @property
    def constant(self) -> Array | None:
        """`known` where it holds plain elements."""
        return None if self.symbolic else self.known


@dataclass(frozen=True, eq=False)
class Node:
    """One operation; `source` names the ONNX node it came from, for errors and profiles."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    source: str


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order. Constants are values that no node makes.

    `output_structures` names the outputs and says how each is made of `outputs`, where some are no single tensor.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    output_structures: tuple[tuple[str, Structure], ...] = ()

    def __str__(self) -> str:
        return graph_text(self)


@dataclass(frozen=True)
class ShapeTensor:
    """Integers that are known once the extents are bound, as a tensor: `values` in row-major order."""

    values: tuple[Dim, ...]
    shape: tuple[int, ...]
    dtype: DType

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(self.dtype, self.shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return (xp.asarray(np.array(self.values, self.dtype).reshape(self.shape)),)


class Builder:
    """Appends nodes, folding what is known already. Front end and passes emit through it."""

    def __init__(self, fresh: Iterator[int] | None = None) -> None:
        self.nodes: list[Node] = []
        self.source = ""
        self._producers: dict[Value, Node] = {}
        self._materialized: dict[Value, Value] = {}
        self._fresh = itertools.count(1) if fresh is None else fresh
        self._budget = FoldingBudget()

    def constant(self, array: Any, name: str = "") -> Value:
        """A value whose contents are known."""
        array = np.asarray(array)
        return Value(TensorType(array.dtype, array.shape), array, name)

    def shape_constant(self, extents: Sequence[Dim] | Array, dtype: DType = INT64) -> Value:
        """A known integer tensor of extents, symbolic or not."""
        array: Array = np.array(extents, object)
        if not any(isinstance(item, Sym) for item in array.flat):
            array = array.astype(dtype)
        return Value(TensorType(dtype, array.shape), array)

    def fresh_dim(self) -> Sym:
        """An extent that only running the node it belongs to will tell."""
        return dims.symbol(f"u{next(self._fresh)}")

    def nested(self) -> Builder:
        """A builder for a body: its fresh extents have names that no other builder of the model gives."""
        inner = Builder(self._fresh)
        inner.source, inner._budget = self.source, self._budget
        return inner

    def emit(self, op: Op, *inputs: Value) -> Value:
        """The only output of `op`."""
        (output,) = self.emit_all(op, *inputs)
        return output

    def emit_all(self, op: Op, *inputs: Value) -> tuple[Value, ...]:
        """All outputs of `op`: known values where it folds, else a new node's. InvalidModel if types do not fit."""
        types = self._infer(op, inputs)
        folded = self._fold(op, inputs, types)
        if folded is not None:
            return folded
        return self.append(op, tuple(map(self.materialize, inputs)), tuple(Value(kind) for kind in types))

    def append(self, op: Op, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """A node as it is, without inference or folding."""
        node = Node(op, inputs, outputs, self.source)
        self.nodes.append(node)
        for output in outputs:
            self._producers[output] = node
        return outputs

    def keep(self, node: Node) -> None:
        """The node itself, with symbolic contents of its operands as tensors."""
        if any(value.symbolic for value in node.inputs):
            node = Node(node.op, tuple(map(self.materialize, node.inputs)), node.outputs, node.source)
        self.nodes.append(node)
        for output in node.outputs:
            self._producers[output] = node

    def producer(self, value: Value) -> Node | None:
        """The node that makes `value`; None for inputs and constants."""
        return self._producers.get(value)

    def materialize(self, value: Value) -> Value:
        """`value`, or the tensor that holds its symbolic contents at run time."""
        if not value.symbolic:
            return value
        if value not in self._materialized:
            assert value.known is not None
            shape = tuple(int(extent) for extent in value.known.shape)
            op = ShapeTensor(tuple(value.known.ravel()), shape, value.dtype)
            (self._materialized[value],) = self.append(op, (), (Value(value.type),))
        return self._materialized[value]

    def _infer(self, op: Op, inputs: tuple[Value, ...]) -> tuple[TensorType, ...]:
        try:
            types = op.infer(*(value.type for value in inputs))
            if any(isinstance(extent, int) and extent < 0 for kind in types for extent in kind.shape):
                raise InvalidModel(f"{type(op).__name__} would make {', '.join(map(str, types))}")
            return types
        except InvalidModel as error:
            if not self.source or self.source in str(error):
                raise
            kinds = ", ".join(str(value.type) for value in inputs)
            raise InvalidModel(f"{self.source}: {error} (inputs {kinds})") from error

    def _fold(self, op: Op, inputs: tuple[Value, ...], types: tuple[TensorType, ...]) -> tuple[Value, ...] | None:
        if not all(value.known is not None for value in inputs) or not getattr(op, "deterministic", True):
            return None
        if not getattr(op, "folds", True):
            return None
        if getattr(op, "binds", ()):
            return self._fold_open(op, inputs, types)
        if not all(isinstance(extent, int) for kind in types for extent in kind.shape) or op_dims(op):
            return None
        arrays = [value.known for value in inputs if value.known is not None]
        symbolic = any(value.symbolic for value in inputs)
        nbytes = tensors_nbytes((kind.dtype, kind.shape) for kind in types)
        as_view = getattr(op, "fold_as_view", False)
        if not self._budget.allows(arrays, nbytes, as_view=as_view, symbolic=symbolic):
            return None
        if symbolic:
            return self._fold_symbolic(op, inputs, types)
        results = self._evaluate(op, inputs)
        if results is None:
            return None
        return tuple(Value(kind, np.asarray(array)) for kind, array in zip(types, results, strict=True))

    def _fold_open(self, op: Op, inputs: tuple[Value, ...], types: tuple[TensorType, ...]) -> tuple[Value, ...] | None:
        """What an operation whose extents depend on its operands' contents makes of constants."""
        arrays = None if any(value.symbolic for value in inputs) else self._evaluate(op, inputs)
        if arrays is None or not all(isinstance(kind, TensorType) for kind in types):
            return None
        found = zip(types, map(np.asarray, arrays), strict=True)
        return tuple(Value(TensorType(kind.dtype, array.shape), array) for kind, array in found)

    def _evaluate(self, op: Op, inputs: tuple[Value, ...]) -> tuple[Array, ...] | None:
        """The outputs for constants; None where they make the operation fail, which is for the run to report."""
        try:
            with np.errstate(all="ignore"):
                return op.evaluate(np, *(value.known for value in inputs))
        except (ArithmeticError, IndexError, MemoryError, ValueError):
            return None

    def _fold_symbolic(
        self, op: Op, inputs: tuple[Value, ...], types: tuple[TensorType, ...]
    ) -> tuple[Value, ...] | None:
        if not getattr(op, "shape_arithmetic", False):
            return None
        operands = [np.asarray(value.known, object) for value in inputs]
        try:
            arrays = op.evaluate(np, *operands)
        except (dims.Undecided, TypeError, ArithmeticError):
            return None
        return tuple(self.shape_constant(array, kind.dtype) for kind, array in zip(types, arrays, strict=True))


Rule = Callable[[Node, Builder], Sequence[Value] | None]


def rewrite(graph: Graph, rule: Rule) -> Graph:
    """The graph after `rule` has seen every node in order: the only way to change a graph.

    `rule(node, builder)` sees a node whose inputs are rewritten already. It returns the values that stand for the
    node's outputs, emitted through the builder (which also tells the producer of a value), or None to keep the node.
    What nothing uses afterwards is dropped.
    """
    builder, renamed = Builder(), {}  # type: tuple[Builder, dict[Value, Value]]
    for node in graph.nodes:
        stale = False
        if not renamed.keys().isdisjoint(node.inputs):
            inputs = tuple(renamed.get(value, value) for value in node.inputs)
            stale = any(new.type != old.type for new, old in zip(inputs, node.inputs, strict=True))
            stale = stale or all(value.known is not None for value in inputs)
            node = Node(node.op, inputs, node.outputs, node.source)
        builder.source = node.source
        replaced = rule(node, builder)
        if replaced is None and stale:
            replaced = builder.emit_all(node.op, *node.inputs)
        if replaced is None:
            builder.keep(node)
            continue
        for old, new in zip(node.outputs, replaced, strict=True):
            assert (old.dtype, old.rank) == (new.dtype, new.rank), f"{rule} turned {old.type} into {new.type}"
            renamed[old] = new
    builder.source = ""
    outputs = tuple(builder.materialize(renamed.get(value, value)) for value in graph.outputs)
    return dataclasses.replace(graph, outputs=outputs, nodes=live_nodes(builder.nodes, outputs))


def live_nodes(nodes: Iterable[Node], outputs: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes that the outputs need, in order: for their contents, or for an extent that only they tell."""
    needed, kept, found = set(outputs), [], list(nodes)
    some_bind = any(getattr(node.op, "binds", ()) for node in found)
    extents: set[str] = set()
    for node in reversed(found):
        if not needed.isdisjoint(node.outputs) or extents.intersection(getattr(node.op, "binds", ())):
            kept.append(node)
            needed.update(node.inputs)
            if some_bind:
                extents.update(*map(dims.symbols, op_dims(node.op)))
    return tuple(reversed(kept))


def use_counts(graph: Graph) -> dict[Value, int]:
    """How many operands and graph outputs each value is."""
    counts: dict[Value, int] = {}
    for value in [*(value for node in graph.nodes for value in node.inputs), *graph.outputs]:
        counts[value] = counts.get(value, 0) + 1
    return counts


def verify(graph: Graph, stage: str, verified: Set[Node] = frozenset()) -> Graph:
    """The graph itself, once every node's types are inferred anew and agree; an error names `stage` and the node.

    Nodes never change, so that those `verified` before need no second look.
    """
    made = set(graph.inputs)
    for node in graph.nodes:
        for value in node.inputs:
            if value not in made and value.known is None:
                raise GpuEngineError(
                    f"{stage}: {node.source}: an operand of {type(node.op).__name__} is made by no node"
                )
        declared = tuple(value.type for value in node.outputs)
        found = declared if node in verified else node.op.infer(*(value.type for value in node.inputs))
        if found != declared:
            raise GpuEngineError(
                f"{stage}: {node.source}: {type(node.op).__name__} makes {', '.join(map(str, found))}, "
                f"declared {', '.join(map(str, declared))}"
            )
        made.update(node.outputs)
    for value in graph.outputs:
        if value not in made and value.known is None:
            raise GpuEngineError(f"{stage}: an output of the graph is made by no node")
    return graph


def graph_text(graph: Graph) -> str:
    """One line per node, values numbered in order of appearance."""
    names: dict[Value, str] = {}

    def name(value: Value) -> str:
        if value not in names:
            names[value] = f"%{len(names)}" if value.known is None else f"c{len(names)}:{value.type}"
        return names[value]

    lines = [f"input {label} = {name(value)}: {value.type}" for label, value in
             zip(graph.input_names, graph.inputs, strict=True)]  # fmt: skip
    for node in graph.nodes:
        inputs = ", ".join(map(name, node.inputs))
        outputs = ", ".join(f"{name(value)}: {value.type}" for value in node.outputs)
        lines.append(f"{outputs} = {node.op}({inputs})  # {node.source}")
    lines += [f"output {label} = {name(value)}: {value.type}" for label, value in
              zip(graph.output_names, graph.outputs, strict=True)]  # fmt: skip
    return "\n".join(lines)
