"""Control flow: If, Loop and Scan over bodies that are graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_engine.errors import DependsOnValues, InvalidModel
from gpu_engine.frontend.bodies import Bodies, Body, Capture, RankConflict, share_captured
from gpu_engine.frontend.model import ModelGraph
from gpu_engine.frontend.registry import normal_axis, operator
from gpu_engine.frontend.sequences import Emitted, SequenceValue
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, INT64
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Gather, Reshape, Slice, Transpose
from gpu_engine.ir.ops.array import unbound_symbols
from gpu_engine.ir.ops.control import If, Loop, Require, bound_inside, free_symbols

MAX_UNROLLED = 4096
SCALAR_INT, SCALAR_BOOL = TensorType(INT64, ()), TensorType(BOOL, ())


@operator("If", since=1)
def if_(
    b: Builder, condition: Value, *, then_branch: ModelGraph, else_branch: ModelGraph, bodies: Bodies
) -> Sequence[Emitted]:
    """https://onnx.ai/onnx/operators/onnx__If.html"""
    known = condition.constant
    if known is not None:
        return bodies.inline(then_branch if bool(known.reshape(-1)[0]) else else_branch, ())
    then, other = bodies.emit(then_branch, ()), bodies.emit(else_branch, ())
    inside = bound_inside(then.graph) | bound_inside(other.graph)
    if any(not _same_kind(one, two) for one, two in zip(then.graph.outputs, other.graph.outputs, strict=True)):
        return _only_branch(b, bodies, condition, then_branch, else_branch)
    outputs = tuple(
        joined_type(b, one.type, two.type, inside)
        for one, two in zip(then.graph.outputs, other.graph.outputs, strict=True)
    )
    then_graph, else_graph, captured = share_captured(then, other)
    names = tuple(sorted(free_symbols(then_graph) | free_symbols(else_graph)))
    inputs = tuple(b.materialize(value) for value in (condition, *captured))
    op = If(then_graph, else_graph, outputs, names, tuple(map(dims.symbol, names)), new_symbols(outputs, names, inputs))
    return b.emit_all(op, *inputs)


def _same_kind(one: Value, two: Value) -> bool:
    return (one.dtype, one.rank) == (two.dtype, two.rank)


def _only_branch(
    b: Builder, bodies: Bodies, condition: Value, then_branch: ModelGraph, else_branch: ModelGraph
) -> Sequence[Emitted]:
    """The branch that the importer chose, in place; running it fails where the condition says the other one."""
    choice = bodies.branches.pick()
    if choice is None:
        raise RankConflict(f"{b.source}: its branches give values of different ranks or dtypes")
    checked = []
    for value in bodies.inline(then_branch if choice else else_branch, ()):
        if not isinstance(value, Value):
            raise DependsOnValues(f"{b.source}: a sequence or optional that one branch gives")
        value = b.materialize(value)
        checked.append(b.emit(Require(choice), value, b.materialize(condition)))
    return checked


def joined_type(b: Builder, one: TensorType, two: TensorType, inside: set[str]) -> TensorType:
    """The type of a value that is of one type or the other; extents that differ get a symbol of their own."""
    if one.dtype != two.dtype or one.rank != two.rank:
        raise DependsOnValues(f"{b.source}: an output is {one} or {two}: the dtype and rank must not depend on data")
    shape = tuple(
        first if first == second and not dims.symbols(first) & inside else b.fresh_dim()
        for first, second in zip(one.shape, two.shape, strict=True)
    )
    return TensorType(one.dtype, shape)


def new_symbols(outputs: Sequence[TensorType], names: Sequence[str], inputs: Sequence[Value]) -> tuple[str, ...]:
    """The extents among the outputs that the operation itself binds."""
    unbound = unbound_symbols(tuple(outputs), tuple(value.type for value in inputs))
    return tuple(name for name in unbound if name not in names)


@operator("Loop", since=1)
def loop(
    b: Builder, trips: Value | None, condition: Value | None = None, *initial: Emitted, body: ModelGraph, bodies: Bodies
) -> Sequence[Emitted]:
    """https://onnx.ai/onnx/operators/onnx__Loop.html"""
    if any(not isinstance(value, Value) for value in initial):
        return unrolled(b, bodies, body, trips, condition, initial)
    if condition is not None and condition.constant is not None and bool(condition.constant.reshape(-1)[0]):
        condition = None
    carried = [value for value in initial if isinstance(value, Value)]
    return emit_loop(b, bodies, body, trips, condition, carried)


def unrolled(
    b: Builder,
    bodies: Bodies,
    body: ModelGraph,
    trips: Value | None,
    condition: Value | None,
    initial: Sequence[Emitted],
) -> Sequence[Emitted]:
    """The iterations one after the other: a sequence may change its length in each, so their number must be known."""
    count = None if trips is None else trips.constant
    going = b.constant(np.bool_(True)) if condition is None else condition
    if count is None or count.item() > MAX_UNROLLED or len(body.outputs) != 1 + len(initial):
        raise DependsOnValues(f"{b.source}: sequences carried through a loop whose iterations only running tells")
    state: Sequence[Emitted] = initial
    for i in range(count.item()):
        if going.constant is None:
            raise DependsOnValues(f"{b.source}: sequences carried through a loop that may end at any iteration")
        if not going.constant.item():
            break
        condition_out, *state = bodies.inline(body, (b.constant(np.int64(i)), going, *state))
        assert isinstance(condition_out, Value)
        going = condition_out
    return state


@operator("SequenceMap", since=17)
def sequence_map(b: Builder, *inputs: Emitted, body: ModelGraph, bodies: Bodies) -> Sequence[SequenceValue]:
    """https://onnx.ai/onnx/operators/onnx__SequenceMap.html"""
    first, *others = inputs
    if not isinstance(first, SequenceValue):
        raise InvalidModel(f"{b.source} wants a sequence")
    results: list[list[Value]] = [[] for _ in body.outputs]
    for i, element in enumerate(first.elements):
        picked = [other.elements[i] if isinstance(other, SequenceValue) else other for other in others]
        for found, result in zip(results, bodies.inline(body, (element, *picked)), strict=True):
            assert isinstance(result, Value)
            found.append(result)
    return [SequenceValue(tuple(found)) for found in results]


def emit_loop(
    b: Builder,
    bodies: Bodies,
    body: ModelGraph,
    trips: Value | None,
    condition: Value | None,
    initial: Sequence[Value],
    scanned: Sequence[tuple[Value, int, bool]] = (),
) -> tuple[Value, ...]:
    """A Loop over `body`; `scanned` are (value, axis, backwards) of which each iteration sees one slice (Scan)."""

    if len(body.outputs) < len(initial) + (not scanned):
        raise InvalidModel(f"a body of {len(body.outputs)} outputs that carries {len(initial)} values")

    def feed(inner: Builder, inputs: Sequence[Value], capture: Capture) -> Sequence[Value]:
        if not scanned:
            return inputs
        slices = [_slice_at(inner, capture(b.materialize(value)), inputs[0], axis, backwards)
                  for value, axis, backwards in scanned]  # fmt: skip
        return (*inputs[2:], *slices)

    types, emitted = _carried_types(b, bodies, body, initial, feed, bool(scanned))
    graph, carried = emitted.graph, len(initial)
    results = graph.outputs[1:] if not scanned else graph.outputs
    if scanned:
        going = b.constant(np.bool_(True))
        graph = type(graph)(graph.inputs, (going, *graph.outputs), graph.nodes, graph.input_names,
                            ("condition", *graph.output_names))  # fmt: skip
    inside = bound_inside(graph) | {
        name for kind, value in zip(types, initial, strict=True) for one, other in
        zip(kind.shape, value.shape, strict=True) if one != other for name in dims.symbols(one)
    }  # fmt: skip
    length = _trip_extent(b, trips if condition is None else None, graph.outputs[0])
    outputs = (
        *(_outer_type(b, kind, inside) for kind in types),
        *(_stacked_type(b, value.type, inside, length) for value in results[carried:]),
    )
    names = tuple(sorted(free_symbols(graph) - inside))
    operands = [value for value in (trips, condition) if value is not None]
    inputs = tuple(b.materialize(value) for value in (*operands, *initial, *emitted.captured))
    op = Loop(
        graph, carried, trips is not None, condition is not None, outputs, names, tuple(map(dims.symbol, names)),
        new_symbols(outputs, names, inputs),
    )  # fmt: skip
    return b.emit_all(op, *inputs)


def _carried_types(
    b: Builder, bodies: Bodies, body: ModelGraph, initial: Sequence[Value], feed: object, scan: bool
) -> tuple[list[TensorType], Body]:
    """The carried types that the body maps to themselves, found by opening extents that change, and the body."""
    types = [value.type for value in initial]
    while True:
        emitted = bodies.emit(body, (SCALAR_INT, SCALAR_BOOL, *types), feed)  # type: ignore[arg-type]
        first = 0 if scan else 1
        found = [value.type for value in emitted.graph.outputs[first : first + len(types)]]
        changed = [joined_type(b, before, after, bound_inside(emitted.graph)) for before, after in
                   zip(types, found, strict=True)]  # fmt: skip
        settled = [_keep_open(before, after) for before, after in zip(types, changed, strict=True)]
        if settled == types:
            return types, emitted
        types = settled


def _keep_open(before: TensorType, after: TensorType) -> TensorType:
    """`after`, but an extent that was opened in an earlier round keeps its symbol."""
    shape = tuple(
        old if isinstance(old, dims.Sym) and str(old).startswith("u") and old == dims.symbol(str(old)) else new
        for old, new in zip(before.shape, after.shape, strict=True)
    )
    return TensorType(after.dtype, shape)


def _slice_at(b: Builder, x: Value, iteration: Value, axis: int, backwards: bool) -> Value:
    if backwards:
        x = _reversed(b, x, axis)
    return b.emit(Gather(axis), x, iteration)


def _reversed(b: Builder, x: Value, axis: int) -> Value:
    starts: list[Dim] = [0] * x.rank
    steps = [1] * x.rank
    starts[axis], steps[axis] = x.shape[axis] - 1, -1
    return b.emit(Slice(tuple(starts), tuple(steps), x.shape), x)


def _trip_extent(b: Builder, trips: Value | None, going: Value) -> Dim:
    """How many iterations there are, where that is known before they run."""
    endless = going.constant is not None and bool(going.constant.reshape(-1)[0])
    if trips is None or not endless or trips.known is None:
        return b.fresh_dim()
    count = trips.known.ravel()[0]
    return count if trips.symbolic else max(0, int(count))


def _outer_type(b: Builder, kind: TensorType, inside: set[str]) -> TensorType:
    return TensorType(
        kind.dtype, tuple(b.fresh_dim() if dims.symbols(extent) & inside else extent for extent in kind.shape)
    )


def _stacked_type(b: Builder, kind: TensorType, inside: set[str], length: Dim) -> TensorType:
    return TensorType(kind.dtype, (length, *_outer_type(b, kind, inside).shape))


@operator("Scan", since=9)
def scan(
    b: Builder,
    *inputs: Value,
    body: ModelGraph,
    num_scan_inputs: int,
    scan_input_axes: tuple[int, ...] = (),
    scan_input_directions: tuple[int, ...] = (),
    scan_output_axes: tuple[int, ...] = (),
    scan_output_directions: tuple[int, ...] = (),
    bodies: Bodies,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__Scan.html

    A Loop whose body picks its own slices of the scanned inputs.
    """
    count = len(inputs) - num_scan_inputs
    if num_scan_inputs < 1 or count < 0:
        raise InvalidModel(f"{num_scan_inputs} scan inputs of {len(inputs)} inputs")
    initial, scanned = inputs[:count], inputs[count:]
    axes = [
        normal_axis(axis, value.rank)
        for axis, value in zip(scan_input_axes or (0,) * len(scanned), scanned, strict=True)
    ]
    backwards = [bool(direction) for direction in scan_input_directions or (0,) * len(scanned)]
    trips = b.shape_constant([scanned[0].shape[axes[0]]])
    trips = b.emit(Reshape(()), trips)
    results = emit_loop(b, bodies, body, trips, None, initial, list(zip(scanned, axes, backwards, strict=True)))
    stacked = []
    for i, value in enumerate(results[count:]):
        if scan_output_directions and scan_output_directions[i]:
            value = _reversed(b, value, 0)
        axis = normal_axis(scan_output_axes[i], value.rank) if scan_output_axes else 0
        order = [*range(1, axis + 1), 0, *range(axis + 1, value.rank)]
        stacked.append(b.emit(Transpose(tuple(order)), value) if axis else value)
    return (*results[:count], *stacked)
