"""Grouping: a graph that runs several requests at once where the model itself has no batch to put them in.

Every tensor that depends on the inputs gets one equal block of axis 0 for each request, and every operation keeps the
blocks apart: what folds, moves or orders axis 0 gets an axis of requests before it. So models of a fixed batch, and
models that mix the rows of a batch (a maximum over all of them), can share executions; each request means what it
means alone, whatever the others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dims import Dim, Sym, symbol, symbols
from gpu_engine.ir.graph import Builder, Graph, Node, Op, TensorType, Value, live_nodes
from gpu_engine.ir.ops import (
    ArgReduce,
    Attention,
    Concat,
    Conv,
    ConvTranspose,
    Expand,
    Gather,
    GatherElements,
    LayerNorm,
    LocalResponseNorm,
    Map,
    MatMul,
    Pad,
    Pool,
    Recurrent,
    Reduce,
    Reshape,
    Resize,
    Slice,
    Softmax,
    Transpose,
)
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.control import Require
from gpu_engine.ir.ops.image import keeps_axis
from gpu_engine.ir.parameters import op_dims
from gpu_engine.plan.plan import Batching

Shape = tuple[Dim, ...]
NAME = "requests"


class Ungroupable(Exception):
    """Why requests cannot be kept apart; names the node."""


def grouped(graph: Graph) -> tuple[Graph, Batching]:
    """The graph for any number of requests, and its batching; Ungroupable if there is an operation without a rule."""
    name = NAME
    while any(name in symbols(extent) for value in graph.inputs for extent in value.shape):
        name += "_"
    return _Grouping(graph, name).result()


class _Grouping:
    """`_own` holds, for every value that depends on an input, its tensor for all requests: axis 0 has a block each."""

    def __init__(self, graph: Graph, name: str) -> None:
        self._graph, self._name, self._count = graph, name, symbol(name)
        self._builder = Builder()
        self._own: dict[Value, Value] = {}

    def result(self) -> tuple[Graph, Batching]:
        inputs = []
        for value in self._graph.inputs:
            own = Value(TensorType(value.dtype, self._blocks(value.shape)), name=value.name) if value.rank else value
            inputs.append(own)
            if value.rank:
                self._own[value] = own
        if not self._own:
            raise Ungroupable("no input has an axis")
        if all(value.shape[0] != 1 and not isinstance(value.shape[0], Sym) for value in self._own):
            raise Ungroupable("a fixed batch other than 1 runs as it is")
        for node in self._graph.nodes:
            self._node(node)
        outputs = []
        for label, value in zip(self._graph.output_names, self._graph.outputs, strict=True):
            if value not in self._own or not value.rank:
                raise Ungroupable(f"output {label!r} has no axis or does not depend on the inputs")
            outputs.append(self._own[value])
        batched = tuple(value.rank > 0 for value in inputs)
        made = replace(
            self._graph,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            nodes=live_nodes(self._builder.nodes, tuple(outputs)),
        )
        return made, Batching(self._name, batched, (True,) * len(outputs))

    def _node(self, node: Node) -> None:
        if not any(value in self._own for value in node.inputs):
            self._builder.keep(node)
            return
        self._builder.source = node.source
        if getattr(node.op, "binds", ()) or not getattr(node.op, "deterministic", True):
            raise Ungroupable(f"{node.source} is random, runs a body of its own, or has extents that its data decide")
        try:
            results = self._results(node)
        except InvalidModel as error:
            raise Ungroupable(f"{node.source}: {error}") from error
        for value, result in zip(node.outputs, results, strict=True):
            if result.shape != self._blocks(value.shape):
                raise Ungroupable(f"{node.source} would make {result.type} of {value.type}")
            self._own[value] = result

    def _results(self, node: Node) -> Sequence[Value]:
        op, out = node.op, node.outputs[0].shape
        x = node.inputs[0]
        match op:
            case Map():
                return [self._map(node)]
            case MatMul():
                return [self._product(op, node)]
            case Reshape():
                return [self._emit(Reshape(self._blocks(op.shape)), x)]
            case Reduce(axes=axes) if len(node.inputs) == 1:
                return [self._along(node, replace(op, axes=tuple(a + 1 for a in axes)), 0 not in axes)]
            case ArgReduce(axis=axis) | Softmax(axis=axis) | LocalResponseNorm(axis=axis) | LayerNorm(axis=axis):
                return [self._along(node, replace(op, axis=axis + 1), axis > 0)]
            case Transpose(perm=perm):
                return [self._along(node, Transpose((0, *[axis + 1 for axis in perm])), perm[0] == 0)]
            case Expand(shape=shape) if len(shape) == x.rank and shape[0] == x.shape[0]:
                return [self._emit(Expand(self._blocks(shape)), x)]
            case Expand(shape=shape):
                return [
                    self._merged(self._builder.emit(Expand((self._count, *shape)), self._apart(x, len(shape))), out)
                ]
            case Concat(axis=axis):
                return [self._concat(op, node, axis)]
            case Slice() | Pad():
                return [self._cut(op, node)]
            case Gather():
                return [self._gather(op, node)]
            case GatherElements(axis=axis):
                return [self._all_apart(node, GatherElements(axis + 1), axis > 0)]
            case Attention():
                return [self._all_apart(node, op, False)]
            case Conv() | ConvTranspose() | Pool() | Require():
                return [self._first_only(op, node)]
            case Resize() if keeps_axis(op, 0, x.shape[0]):
                return [self._first_only(replace(op, extents=self._blocks(op.extents)), node)]
            case Recurrent() if "scale" not in op.present:
                return self._recurrent(op, node)
            case Array(mixes=mixes) if mixes is not None and 0 not in mixes and not op_dims(op):
                return self._array(op, node)
        raise Ungroupable(f"{node.source} has no form that keeps several requests apart ({type(op).__name__})")

    def _blocks(self, shape: Shape) -> Shape:
        """The shape for all requests: a block of axis 0 each, an element each of a scalar."""
        return (self._count * shape[0], *shape[1:]) if shape else (self._count,)

    def _emit(self, op: Op, *inputs: Value) -> Value:
        """An operation on blocks."""
        return self._builder.emit(op, *(self._own.get(value, value) for value in inputs))

    def _apart(self, value: Value, rank: int) -> Value:
        """[requests, 1..., *shape] with `rank` axes behind the first; what is the same for all requests stays."""
        own = self._own.get(value)
        if own is None:
            return value
        return self._reshaped(own, (self._count, *[1] * (rank - value.rank), *value.shape))

    def _merged(self, value: Value, shape: Shape) -> Value:
        return self._reshaped(value, self._blocks(shape))

    def _reshaped(self, value: Value, shape: Shape) -> Value:
        return value if value.shape == shape else self._builder.emit(Reshape(shape), value)

    def _only(self, node: Node, *places: int) -> None:
        """Refuse operands that depend on the inputs elsewhere than at `places`."""
        if any(value in self._own and i not in places for i, value in enumerate(node.inputs)):
            raise Ungroupable(f"{node.source} takes more than its first operand from the inputs")

    def _first_only(self, op: Op, node: Node) -> Value:
        self._only(node, 0)
        return self._emit(op, *node.inputs)

    def _along(self, node: Node, behind: Op, direct: bool) -> Value:
        """As it is if axis 0 is not touched, else `behind` the axis of requests."""
        self._only(node, 0)
        x, *rest = node.inputs
        if direct and x.rank:
            return self._emit(node.op, *node.inputs)
        return self._merged(self._builder.emit(behind, self._apart(x, x.rank), *rest), node.outputs[0].shape)

    def _all_apart(self, node: Node, behind: Op, direct: bool) -> Value:
        """All operands side by side: by blocks if axis 0 is not touched, else `behind` the axis of requests."""
        if direct and all(value in self._own for value in node.inputs):
            return self._emit(node.op, *node.inputs)
        rank = max(value.rank for value in node.inputs)
        operands = [self._apart(value, rank) for value in node.inputs]
        return self._merged(self._builder.emit(behind, *operands), node.outputs[0].shape)

    def _map(self, node: Node) -> Value:
        out = node.outputs[0].shape
        direct = bool(out) and all(
            len(value.shape) == len(out) and value.shape[0] == out[0]
            if value in self._own
            else len(value.shape) < len(out) or value.shape[0] == 1
            for value in node.inputs
        )
        if direct:
            return self._emit(node.op, *node.inputs)
        operands = [self._apart(value, len(out)) for value in node.inputs]
        return self._merged(self._builder.emit(node.op, *operands), out)

    def _product(self, op: MatMul, node: Node) -> Value:
        self._only(node, 0, 1)
        a, b, *rest = node.inputs
        out = node.outputs[0].shape
        if b not in self._own and b.rank == 2 and (a.rank > 2 or not op.transpose_a):
            return self._emit(op, *node.inputs)
        if rest:
            raise Ungroupable(f"{node.source} adds to a product of two tensors that depend on the inputs")
        rank = max(a.rank, b.rank)
        return self._merged(self._builder.emit(op, self._apart(a, rank), self._apart(b, rank)), out)

    def _repeated(self, value: Value) -> Value:
        """[requests, *shape], also of what is the same for all."""
        if value in self._own:
            return self._apart(value, value.rank)
        return self._builder.emit(Expand((self._count, *value.shape)), value)

    def _concat(self, op: Concat, node: Node, axis: int) -> Value:
        if axis > 0 and all(value in self._own for value in node.inputs):
            return self._emit(op, *node.inputs)
        joined = self._builder.emit(Concat(axis + 1), *map(self._repeated, node.inputs))
        return self._merged(joined, node.outputs[0].shape)

    def _cut(self, op: Slice | Pad, node: Node) -> Value:
        shape = node.inputs[0].shape
        if isinstance(op, Pad):
            behind: Op = replace(op, before=(0, *op.before), after=(0, *op.after))
            return self._along(node, behind, op.before[0] == 0 and op.after[0] == 0)
        if op.starts[0] == 0 and op.steps[0] == 1 and op.extents[0] == shape[0]:
            return self._first_only(replace(op, extents=self._blocks(op.extents)), node)
        return self._along(node, Slice((0, *op.starts), (1, *op.steps), (self._count, *op.extents)), False)

    def _gather(self, op: Gather, node: Node) -> Value:
        data, indices = node.inputs
        if data in self._own:
            self._only(node, 0)
            return self._along(node, Gather(op.axis + 1), op.axis > 0)
        if op.axis:
            raise Ungroupable(f"{node.source} gathers along axis {op.axis} by indices that depend on the inputs")
        return self._merged(self._emit(op, data, indices), node.outputs[0].shape)

    def _array(self, op: Array, node: Node) -> Sequence[Value]:
        self._only(node, *range(op.aligned))
        shapes = [value.shape for value in node.inputs[: op.aligned]]
        alike = all(value in self._own for value in node.inputs[: op.aligned])
        if not alike or not all(
            shape and shape[0] == shapes[0][0] for shape in [*shapes, *(o.shape for o in op.outputs)]
        ):
            raise Ungroupable(f"{node.source} combines operands whose blocks do not lie side by side")
        kinds = tuple(TensorType(kind.dtype, self._blocks(kind.shape)) for kind in op.outputs)
        operands = [self._own.get(value, value) for value in node.inputs]
        return self._builder.emit_all(replace(op, outputs=kinds), *operands)

    def _recurrent(self, op: Recurrent, node: Node) -> Sequence[Value]:
        """Requests become rows of the network's own batch: axis 1 of its inputs and states, axis 2 of its results."""
        by_rows = {0, *(2 + i for i, name in enumerate(op.present) if name in ("initial_h", "initial_c"))}
        lengths = {2 + i for i, name in enumerate(op.present) if name == "lengths"}
        self._only(node, *by_rows, *lengths)
        operands = []
        for i, value in enumerate(node.inputs):
            if i in by_rows:
                lead, rows, width = value.shape
                turned = self._builder.emit(Transpose((1, 0, 2, 3)), self._repeated(value))
                operands.append(self._reshaped(turned, (lead, self._count * rows, width)))
            elif i in lengths:
                operands.append(self._reshaped(self._repeated(value), self._blocks(value.shape)))
            else:
                operands.append(value)
        found = self._builder.emit_all(op, *operands)
        return [self._back(result, value.shape) for result, value in zip(found, node.outputs, strict=True)]

    def _back(self, value: Value, shape: Shape) -> Value:
        """A result whose rows lie along the last axis but one, as blocks."""
        *lead, rows, width = shape
        apart = self._reshaped(value, (*lead, self._count, rows, width))
        axis = len(lead)
        turned = self._builder.emit(Transpose((axis, *range(axis), axis + 1, axis + 2)), apart)
        return self._merged(turned, shape)
