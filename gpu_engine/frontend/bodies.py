"""What the operators of control flow ask of the importer: their bodies, inlined or as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpu_engine.errors import DependsOnValues
from gpu_engine.frontend.model import ModelGraph
from gpu_engine.frontend.sequences import AbsentValue, Emitted, MapsValue, PairsValue, SequenceValue
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value

Capture = Callable[[Value], Value]
Feed = Callable[[Builder, Sequence[Value], Capture], Sequence[Value]]
"""feed(builder, inputs, capture): what the body's formal inputs are, made from the inputs of its graph."""


@dataclass(frozen=True)
class Body:
    """A body as a graph: its inputs are those asked for, then one for each captured outer value."""

    graph: Graph
    captured: tuple[Value, ...]


class RankConflict(DependsOnValues):
    """The branches of an If give values of different ranks or dtypes, and nothing says yet which one is meant."""


class Branches:
    """Which branch is meant by each If whose branches differ in rank, in the order in which they are met."""

    def __init__(self, choices: Sequence[bool] = ()) -> None:
        self._choices = iter(choices)

    def pick(self) -> bool | None:
        """The choice for the next such If; None if there is none yet."""
        return next(self._choices, None)


class Bodies(Protocol):
    """Emits graph attributes where an operator stands."""

    @property
    def branches(self) -> Branches: ...

    def inline(self, graph: ModelGraph, inputs: Sequence[Emitted]) -> tuple[Emitted, ...]:
        """The outputs of the graph emitted in place."""
        ...

    def emit(self, graph: ModelGraph, types: Sequence[TensorType], feed: Feed | None = None) -> Body:
        """The graph as one of its own with inputs of these types."""
        ...


class BodyNames(dict[str, Emitted]):
    """The names inside a body; a name from outside becomes an input when it is first used, a constant stays one."""

    def __init__(self, outer: dict[str, Emitted]) -> None:
        super().__init__()
        self.outer = outer
        self.captured: dict[Value, Value] = {}

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or name in self.outer

    def __missing__(self, name: str) -> Emitted:
        self[name] = inner = self.capture_any(self.outer[name])
        return inner

    def capture_any(self, outer: Emitted) -> Emitted:
        if isinstance(outer, SequenceValue):
            return SequenceValue(tuple(map(self.capture, outer.elements)))
        if isinstance(outer, MapsValue):
            return MapsValue(self.capture(outer.rows), outer.keys)
        if isinstance(outer, PairsValue):
            return PairsValue(self.capture(outer.keys), self.capture(outer.values))
        return outer if isinstance(outer, AbsentValue) else self.capture(outer)

    def capture(self, outer: Value) -> Value:
        """What stands for an outer value inside."""
        if outer.known is not None:
            return outer
        return self.captured.setdefault(outer, Value(outer.type, name=outer.name))


def share_captured(first: Body, second: Body) -> tuple[Graph, Graph, tuple[Value, ...]]:
    """Both graphs with the inputs of either, in one order, and the outer values they stand for."""
    captured = tuple(dict.fromkeys((*first.captured, *second.captured)))
    return _with_inputs(first, captured), _with_inputs(second, captured), captured


def _with_inputs(body: Body, captured: Sequence[Value]) -> Graph:
    formal = len(body.graph.inputs) - len(body.captured)
    inner = dict(zip(body.captured, body.graph.inputs[formal:], strict=True))
    inputs = (*body.graph.inputs[:formal], *(inner.get(outer) or Value(outer.type) for outer in captured))
    names = tuple(f"in{i}" for i in range(len(inputs)))
    return Graph(inputs, body.graph.outputs, body.graph.nodes, names, body.graph.output_names)
