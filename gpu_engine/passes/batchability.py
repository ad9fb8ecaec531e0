"""Batchability: a proof that requests may share one execution along axis 0, or the node that makes it impossible.

Along the graph every value is Free (the same whatever the batch is), has Rows (one of its axes consists of N equal
blocks, and block i depends on row i of the batch alone), or is Lost. `batch_rules` says how each operation carries that
on; what it does not know loses the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.ir.dims import Dim, Sym, symbol, symbols
from gpu_engine.ir.graph import Graph, Value
from gpu_engine.passes.batch_rules import FREE, Lost, Rows, State, multiple, node_states
from gpu_engine.plan.plan import Batching


def prove(graph: Graph, shares_outputs: bool = False) -> Batching:
    """Which extent is the batch and which ports carry it, or why there is none.

    The batch is a symbol that is the whole extent of axis 0 of some inputs and occurs nowhere else in an input. All
    outputs must have one equal block of axis 0 for every row; with `shares_outputs` at least one, and those that do not
    depend on the batch are the same for all. Where several symbols qualify the first that is proven counts, and the
    first one's reason if none is.
    """
    refusals = []
    for name in candidates(graph):
        refused = misplaced(graph, name)
        if not refused:
            states = _states(graph, name)
            carried = tuple(not shares_outputs or state != FREE for state in states)
            refused = _broken(graph, name, states, carried)
        if not refused:
            batched = tuple(value.rank > 0 and value.shape[0] == symbol(name) for value in graph.inputs)
            return Batching(name, batched, carried)
        refusals.append(refused)
    reason = refusals[0] if refusals else _without_candidate(graph)
    return Batching(None, (False,) * len(graph.inputs), (False,) * len(graph.outputs), reason)


def candidates(graph: Graph) -> list[str]:
    """The symbols that are the extent of axis 0 of an input, in order."""
    found: dict[str, None] = {}
    for value in graph.inputs:
        extent = value.shape[0] if value.rank else 1
        names = symbols(extent)
        if len(names) == 1 and extent == symbol(*names):
            found |= dict.fromkeys(names)
    return list(found)


def misplaced(graph: Graph, name: str) -> str:
    """Where an input has the batch symbol other than as the extent of axis 0; empty if nowhere."""
    for label, value in zip(graph.input_names, graph.inputs, strict=True):
        for axis, extent in enumerate(value.shape):
            if name in symbols(extent) and not (axis == 0 and extent == symbol(name)):
                return f"input {label!r} has the batch extent {name!r} in axis {axis}: {extent}"
    return ""


def _without_candidate(graph: Graph) -> str:
    for label, value in zip(graph.input_names, graph.inputs, strict=True):
        if value.rank:
            return (
                f"axis 0 of input {label!r} has the fixed extent {value.shape[0]}"
                if is_fixed(value)
                else (f"axis 0 of input {label!r} is not a symbol of its own: {value.shape[0]}")
            )
    return "no input has an axis"


def is_fixed(value: Value) -> bool:
    return not isinstance(value.shape[0], Sym)


def _states(graph: Graph, name: str) -> list[State]:
    """What becomes of the batch in every output."""
    batch = symbol(name)
    states: dict[Value, State] = {}
    for value in graph.inputs:
        states[value] = Rows(0) if value.rank and value.shape[0] == batch else FREE
    for node in graph.nodes:
        operands = tuple(states.get(value) or _of_constant(value, name) for value in node.inputs)
        states |= dict(zip(node.outputs, node_states(node, operands, name), strict=True))
    return [states.get(value) or _of_constant(value, name) for value in graph.outputs]


def _broken(graph: Graph, name: str, states: Sequence[State], carried: Sequence[bool]) -> str:
    """Why an output that is to carry the batch does not, or that none does; empty if all is well."""
    refused = ""
    for label, value, state, carries in zip(graph.output_names, graph.outputs, states, carried, strict=True):
        if carries or not any(carried):
            refused = refused or _refused_output(label, value.shape, state, symbol(name))
    return refused


def _of_constant(value: Value, name: str) -> State:
    """The state of a value that no node makes."""
    if value.known is not None and value.symbolic and any(name in symbols(extent) for extent in value.known.flat):
        return Lost(f"a constant counts the batch {name!r}")
    return FREE


def _refused_output(label: str, shape: tuple[Dim, ...], state: State, batch: Sym) -> str:
    match state:
        case Lost(reason):
            return reason
        case Rows(axis) if axis == 0 and multiple(shape[0], batch) is not None:
            return ""
        case Rows(axis):
            return f"output {label!r} has the rows of the batch along axis {axis}, not axis 0"
    return f"output {label!r} does not depend on the batch"
