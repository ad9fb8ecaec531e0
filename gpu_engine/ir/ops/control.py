"""Control flow: operations whose bodies are graphs of their own.

A body's inputs are its formal inputs, then the values it captures from outside, which are the operation's last
operands in the same order. `symbols` are the outer extents that the bodies need, by name in `names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Graph, TensorType, Value
from gpu_engine.ir.interpreter import run_graph
from gpu_engine.ir.parameters import op_dims


@dataclass(frozen=True)
class If:
    """The outputs of `then_branch` if operand 0 (one bool) is true, else of `else_branch`; all other operands are
    captured by both. Output extents on which the branches differ are bound when it has run (`binds`)."""

    then_branch: Graph
    else_branch: Graph
    outputs: tuple[TensorType, ...]
    names: tuple[str, ...]
    symbols: tuple[Dim, ...]
    binds: tuple[str, ...] = ()
    deterministic = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return self.outputs

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        condition, *captured = arrays
        branch = self.then_branch if bool(condition.reshape(())) else self.else_branch
        return run_graph(xp, branch, captured, bound_symbols(self.names, self.symbols))


@dataclass(frozen=True)
class Require:
    """Operand 0 if operand 1 (one bool) is `expected`, else an error: the branch that was left out is wanted."""

    expected: bool

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (inputs[0],)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, condition = arrays
        if bool(condition.reshape(())) != self.expected:
            raise ValueError(self.refusal())
        return (x,)

    def refusal(self) -> str:
        branch, value = ("then_branch", "false") if self.expected else ("else_branch", "true")
        return f"only its {branch} gives what the rest of the graph can take, and the condition is {value}"


@dataclass(frozen=True)
class Loop:
    """https://onnx.ai/onnx/operators/onnx__Loop.html

    Operands: the trip count if `counted`, the condition if `conditional`, `carried` initial values, captured values.
    The body takes the iteration number (int64 []), the condition (bool []), the carried and the captured values; it
    gives the condition, the carried values and one slice of each of the remaining outputs, which are stacked.
    """

    body: Graph
    carried: int
    counted: bool
    conditional: bool
    outputs: tuple[TensorType, ...]
    names: tuple[str, ...]
    symbols: tuple[Dim, ...]
    binds: tuple[str, ...] = ()
    deterministic = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return self.outputs

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        known = bound_symbols(self.names, self.symbols)
        return run_loop(self, xp, arrays, lambda inputs: run_graph(xp, self.body, inputs, known))


def stacked(xp: Any, found: list[Any], kind: TensorType) -> Any:
    """The slices that a loop's iterations gave, along a new first axis."""
    if found:
        return xp.stack(found)
    return xp.empty((0, *(extent if isinstance(extent, int) else 0 for extent in kind.shape[1:])), kind.dtype)


def run_loop(
    op: Loop, xp: Any, arrays: Sequence[Any], run_body: Any, stack: Callable[..., Any] = stacked
) -> tuple[Any, ...]:
    """The iterations of `op`; `run_body(inputs)` gives the outputs of one, `stack` what their slices make."""
    operands = list(arrays)
    trips = int(operands.pop(0).reshape(())) if op.counted else None
    going = bool(operands.pop(0).reshape(())) if op.conditional else True
    state, captured = operands[: op.carried], operands[op.carried :]
    slices: list[list[Any]] = [[] for _ in op.outputs[op.carried :]]
    iteration = 0
    while going and (trips is None or iteration < trips):
        condition, *results = run_body(
            [np.int64(iteration).reshape(()), np.bool_(going).reshape(()), *state, *captured]
        )
        state = results[: op.carried]
        for parts, result in zip(slices, results[op.carried :], strict=True):
            parts.append(result)
        going = bool(condition.reshape(()))
        iteration += 1
    kinds = [_with_known_extents(kind, bound_symbols(op.names, op.symbols)) for kind in op.outputs[op.carried :]]
    return (*state, *(stack(xp, found, kind) for found, kind in zip(slices, kinds, strict=True)))


def _with_known_extents(kind: TensorType, known: Mapping[str, int]) -> TensorType:
    return TensorType(kind.dtype, tuple(dims.substitute(extent, known) for extent in kind.shape))


def bound_symbols(names: Sequence[str], symbols: Sequence[Dim]) -> dict[str, int]:
    """The values of outer extents in an operation whose symbols are resolved."""
    return {name: value for name, value in zip(names, symbols, strict=True) if isinstance(value, int)}


def bound_inside(graph: Graph) -> set[str]:
    """The names of extents that steps of the graph bind."""
    return {name for node in graph.nodes for name in getattr(node.op, "binds", ())}


def free_symbols(graph: Graph) -> set[str]:
    """The names of the extents that the graph mentions and does not bind."""
    values: list[Value] = [*graph.inputs, *graph.outputs]
    mentioned: list[Dim] = []
    for node in graph.nodes:
        values += [*node.inputs, *node.outputs]
        mentioned += op_dims(node.op)
    mentioned += [extent for value in values for extent in _extents(value)]
    return {name for extent in mentioned for name in dims.symbols(extent)} - bound_inside(graph)


def _extents(value: Value) -> Iterable[Dim]:
    yield from value.shape
    if value.symbolic and value.known is not None:
        yield from value.known.flat
