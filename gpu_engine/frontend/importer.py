"""Model -> Graph: every node emitted through the registry, function bodies inlined, shapes made symbolic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gpu_engine.errors import (
    DependsOnValues,
    GpuEngineError,
    InputError,
    InvalidModel,
    OutOfMemory,
    UnsupportedModel,
)
from gpu_engine.frontend import operators
from gpu_engine.frontend.bodies import Body, BodyNames, Branches, Feed, RankConflict
from gpu_engine.frontend.legacy import OLDEST_OPSET, upgrade
from gpu_engine.frontend.model import (
    AttributeReference,
    DimText,
    Model,
    ModelFunction,
    ModelGraph,
    ModelNode,
    TensorInfo,
    nested_nodes,
)
from gpu_engine.frontend.order import sort_nodes
from gpu_engine.frontend.registry import Operator, bind_attributes, lookup
from gpu_engine.frontend.sequences import (
    AbsentValue,
    Emitted,
    MapsValue,
    PairsValue,
    SequenceValue,
    structure_of_emitted,
    tensors_of,
)
from gpu_engine.frontend.tables import read_rows_first
from gpu_engine.ir import dim_text, dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value, live_nodes
from gpu_engine.ir.structure import Known, Pairs, Structure, flat_names

MAX_INLINE_DEPTH = 64
MAX_BODY_DEPTH = 32
MAX_CHOICES = 8
LEAST_EXPANSION, EXPANSION_FACTOR = 50_000, 100


class FunctionBodies(Protocol):
    """Where operators that the registry lacks get a body from: the specification."""

    def has(self, domain: str, name: str, version: int) -> bool: ...

    def body(self, node: ModelNode, version: int, types: Sequence[TensorType | None]) -> ModelFunction | None: ...


class Expansion:
    """How many more nodes functions and bodies may grow to: a few lines can call for more than any machine holds."""

    def __init__(self, model: Model) -> None:
        functions = (node for function in model.functions.values() for node in function.nodes)
        written = sum(1 for _ in nested_nodes((*model.graph.nodes, *functions)))
        self.limit = self.left = max(LEAST_EXPANSION, EXPANSION_FACTOR * written)

    def grow(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise InvalidModel(f"functions and bodies grow to more than {self.limit:,} nodes")


@dataclass(frozen=True)
class Scope:
    """What names mean while nodes are emitted: `values` by name, the opsets in force, how deep functions (`depth`) and
    bodies (`nesting`) nest."""

    values: dict[str, Emitted]
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str], ModelFunction]
    bodies: FunctionBodies
    attributes: Mapping[str, Any]
    branches: Branches
    expansion: Expansion
    depth: int = 0
    nesting: int = 0


def import_model(model: Model, bodies: FunctionBodies, structures: Mapping[str, Structure] | None = None) -> Graph:
    """The graph of `model`; `structures` gives the inputs whose declaration leaves theirs open (`open_inputs`).

    UnsupportedModel lists every operator that is missing, with domain, opset and count; InvalidModel says which node
    contradicts the specification.
    """
    refuse_unsupported(model, bodies)
    expansion = Expansion(model)
    model = replace(model, graph=read_rows_first(model.graph))
    return _with_choices(lambda choices: _import(model, bodies, structures or {}, Branches(choices), expansion), ())


def _with_choices(attempt: Callable[[tuple[bool, ...]], Graph], choices: tuple[bool, ...]) -> Graph:
    """The graph where each If whose branches differ in rank stands for the only branch that the rest can work with.

    Exporters write a squeeze whose extent they could not know as such an If. RankConflict if both branches work.
    """
    try:
        return attempt(choices)
    except RankConflict as conflict:
        found = []
        for choice in (True, False) if len(choices) < MAX_CHOICES else ():
            with suppress(InvalidModel):
                found.append(_with_choices(attempt, (*choices, choice)))
        if len(found) != 1:
            raise conflict
        return found[0]


def _import(
    model: Model,
    bodies: FunctionBodies,
    structures: Mapping[str, Structure],
    branches: Branches,
    expansion: Expansion,
) -> Graph:
    builder, values = Builder(), {}  # type: tuple[Builder, dict[str, Emitted]]
    for name, array in model.graph.initializers.items():
        values[name] = builder.constant(array, name)
    inputs: list[Value] = []
    for info in caller_inputs(model):
        structure = structures.get(info.name, ())
        if isinstance(structure, Known):
            values[info.name] = builder.constant(structure.array, info.name)
        else:
            values[info.name] = input_value(info, structure, inputs) if is_open(info) else tensor_input(info, inputs)
    scope = Scope(values, model.opsets, model.functions, bodies, {}, branches, expansion)
    emit_nodes(builder, model.graph.nodes, scope)
    builder.source = "the graph's outputs"
    missing = [info.name for info in model.graph.outputs if info.name not in values]
    if missing:
        raise InvalidModel(f"no node makes the outputs {', '.join(missing)}")
    results = {info.name: values[info.name] for info in model.graph.outputs}
    outputs = tuple(builder.materialize(value) for result in results.values() for value in tensors_of(result))
    made = tuple((name, structure_of_emitted(result)) for name, result in results.items())
    return Graph(
        inputs=tuple(inputs),
        outputs=outputs,
        nodes=live_nodes(builder.nodes, outputs),
        input_names=tuple(value.name for value in inputs),
        output_names=tuple(leaf for name, structure in made for leaf in flat_names(name, structure)),
        output_structures=() if all(isinstance(structure, int) for _, structure in made) else made,
    )


def caller_inputs(model: Model) -> list[TensorInfo]:
    """The inputs that a caller gives: those without an initializer."""
    return [info for info in model.graph.inputs if info.name not in model.graph.initializers]


def is_open(info: TensorInfo) -> bool:
    """Whether only a caller's value tells how many tensors an input is, and of what rank."""
    return bool(info.wrappers) or info.shape is None


def tensor_input(info: TensorInfo, inputs: list[Value]) -> Value:
    """A graph input, added to `inputs`; an extent without a usable name gets one of its own."""
    if info.dtype is None or info.shape is None:
        raise UnsupportedModel(f"input {info.name!r} declares no element type")
    extents = tuple(_declared_extent(extent, f"{info.name}.{axis}") for axis, extent in enumerate(info.shape))
    inputs.append(Value(TensorType(info.dtype, extents), name=info.name))
    return inputs[-1]


def input_value(info: TensorInfo, structure: Structure, inputs: list[Value]) -> Emitted:
    """What an open input means for a value of this structure; its tensors are added to `inputs`."""
    if (info.wrappers[:1] == ("map",)) != isinstance(structure, Pairs):
        wanted = "a dict" if info.wrappers[:1] == ("map",) else "no dict"
        raise InputError(f"input {info.name!r} wants {wanted}")
    if structure is None:
        return AbsentValue()
    if isinstance(structure, Pairs):
        parts = ((f"{info.name}.keys", info.key), (f"{info.name}.values", info.dtype))
        return PairsValue(*(tensor_input(TensorInfo(*part, (f"{info.name}.size",)), inputs) for part in parts))
    if isinstance(structure, tuple):
        items = enumerate(structure)
        anyhow = None if info.shape is None else tuple(e if isinstance(e, int) else None for e in info.shape)
        own = replace(info, shape=anyhow)
        elements = [input_value(replace(own, name=f"{info.name}[{i}]"), item, inputs) for i, item in items]
        return SequenceValue(tuple(_tensor(element, info.name) for element in elements))
    assert isinstance(structure, int)
    declared = info.shape if info.shape is not None and len(info.shape) == structure else (None,) * structure
    return tensor_input(replace(info, shape=declared), inputs)


def _declared_extent(extent: DimText, fallback: str) -> Dim:
    if isinstance(extent, int):
        return extent if extent >= 0 else dims.symbol(fallback)
    parsed = dim_text.parse(extent) if extent else None
    if parsed is None:
        return dims.symbol(extent if extent and extent != "?" else fallback)
    return parsed


def missing_operators(model: Model, bodies: FunctionBodies) -> Counter[tuple[str, str, int]]:
    """How many nodes call for each (domain, operator, opset, 0 if not imported) that nothing here can run."""
    missing: Counter[tuple[str, str, int]] = Counter()

    def visit(nodes: Sequence[ModelNode], opsets: Mapping[str, int]) -> None:
        for node in nested_nodes(nodes):
            version = opsets.get(node.domain)
            known = (node.domain, node.op_type) in model.functions or (
                version is not None
                and (
                    lookup(node.domain, node.op_type, version if node.domain else max(version, OLDEST_OPSET))
                    or bodies.has(node.domain, node.op_type, version)
                )
            )
            if not known:
                missing[node.domain, node.op_type, version or 0] += 1

    visit(model.graph.nodes, model.opsets)
    for function in model.functions.values():
        visit(function.nodes, function.opsets or model.opsets)
    return missing


def refuse_unsupported(model: Model, bodies: FunctionBodies) -> None:
    """UnsupportedModel naming every operator of the model that nothing here can run."""
    if missing := missing_operators(model, bodies):
        listed = ", ".join(
            f"{domain or 'ai.onnx'}::{name} (opset {version or 'not imported'}) x {count}"
            for (domain, name, version), count in sorted(missing.items())
        )
        raise UnsupportedModel(f"operators that the engine does not have: {listed}")


def emit_nodes(builder: Builder, nodes: Sequence[ModelNode], scope: Scope) -> None:
    """Emit `nodes` in an order that respects their names, adding what they make to `scope.values`.

    Whatever an operator makes of numbers it did not expect is an InvalidModel.
    """
    scope.expansion.grow(len(nodes) if scope.depth or scope.nesting else 0)
    for node in sort_nodes(nodes, scope.values):
        outer, label = builder.source, f"{node.op_type} {node.name!r}" if node.name else node.op_type
        if scope.depth == 0:
            builder.source = f"{label} (opset {scope.opsets.get(node.domain, '?')})"
        try:
            emit_node(builder, node, scope)
        except InvalidModel as error:
            if builder.source in str(error):
                raise
            raise InvalidModel(f"{builder.source}: {error}") from error
        except GpuEngineError:
            raise
        except MemoryError as error:
            raise OutOfMemory(f"{builder.source}: {error or 'no memory is left'}") from error
        except Exception as error:
            raise InvalidModel(f"{builder.source} does not work: {type(error).__name__}: {error}") from error
        builder.source = outer if scope.depth else builder.source


def emit_node(builder: Builder, node: ModelNode, scope: Scope) -> None:
    """Emit one node in the form of an opset that the registry knows."""
    version = scope.opsets.get(node.domain, 0)
    if node.domain or version >= OLDEST_OPSET or (node.domain, node.op_type) in scope.functions:
        return _emit(builder, node, scope, version)
    values = [scope.values.get(name) for name in node.inputs]
    ranks = [value.rank if isinstance(value, Value) else None for value in values]
    for part in upgrade(node, version, ranks):
        _emit(builder, part, scope, OLDEST_OPSET)


def _emit(builder: Builder, node: ModelNode, scope: Scope, version: int) -> None:
    """Emit one node: a model-local function, a registered operator, or the specification's body of it."""
    inputs = [scope.values[name] if name else None for name in node.inputs]
    attributes = {
        name: scope.attributes.get(value.name) if isinstance(value, AttributeReference) else value
        for name, value in node.attributes.items()
    }
    attributes = {name: value for name, value in attributes.items() if value is not None}
    function = scope.functions.get((node.domain, node.op_type))
    entry = None if function else lookup(node.domain, node.op_type, version)
    if entry is not None:
        special = {"output_count": len(node.outputs), "version": version, "bodies": ScopedBodies(builder, scope)}
        results = call_operator(builder, entry, inputs, attributes, special)
    else:
        if function is None:
            types = [value.type if isinstance(value, Value) else None for value in inputs]
            function = scope.bodies.body(replace(node, attributes=attributes), version, types)
        if function is None:
            raise UnsupportedModel(f"{builder.source}: operator {node.op_type} has no form for these inputs")
        results = inline(builder, function, inputs, attributes, scope)
    for name, result in zip(node.outputs, results, strict=False):
        if name and result is not None:
            scope.values[name] = result


def call_operator(
    builder: Builder,
    entry: Operator,
    inputs: Sequence[Emitted | None],
    attributes: Mapping[str, Any],
    special: Mapping[str, Any],
) -> Sequence[Emitted | None]:
    """The outputs of a registered operator."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    if len(inputs) < entry.required or (not entry.variadic and len(inputs) > len(entry.inputs)):
        raise InvalidModel(f"{entry.name} takes {len(entry.inputs)} inputs, got {len(inputs)}")
    keywords = bind_attributes(entry, attributes) | {name: special[name] for name in entry.special}
    results = entry.emit(builder, *inputs, **keywords)
    return (results,) if isinstance(results, (Value, SequenceValue, AbsentValue, MapsValue, PairsValue)) else results


@dataclass(frozen=True)
class ScopedBodies:
    """Bodies of the node that is being emitted; see bodies.Bodies."""

    builder: Builder
    scope: Scope

    @property
    def branches(self) -> Branches:
        return self.scope.branches

    def inline(self, graph: ModelGraph, inputs: Sequence[Emitted]) -> tuple[Emitted, ...]:
        values = copy(self.scope.values)
        values.update(self._formal(self.builder, graph, inputs))
        emit_nodes(self.builder, graph.nodes, replace(self.scope, values=values, nesting=self._nesting()))
        return tuple(values[info.name] for info in graph.outputs)

    def emit(self, graph: ModelGraph, types: Sequence[TensorType], feed: Feed | None = None) -> Body:
        inner, names = self.builder.nested(), BodyNames(self.scope.values)
        inputs = tuple(Value(kind) for kind in types)
        given = feed(inner, inputs, names.capture) if feed is not None else inputs
        names.update(self._formal(inner, graph, given))
        emit_nodes(inner, graph.nodes, replace(self.scope, values=names, nesting=self._nesting()))
        outputs = tuple(inner.materialize(_tensor(names[info.name], info.name)) for info in graph.outputs)
        inputs += tuple(names.captured.values())
        labels = tuple(f"in{i}" for i in range(len(inputs)))
        results = tuple(info.name for info in graph.outputs)
        found = Graph(inputs, outputs, live_nodes(inner.nodes, outputs), labels, results)
        return Body(found, tuple(names.captured))

    def _formal(self, builder: Builder, graph: ModelGraph, inputs: Sequence[Emitted]) -> dict[str, Emitted]:
        if len(inputs) != len(graph.inputs):
            raise InvalidModel(f"a body takes {len(graph.inputs)} inputs, {len(inputs)} are given")
        constants = {name: builder.constant(array, name) for name, array in graph.initializers.items()}
        return {**constants, **{info.name: value for info, value in zip(graph.inputs, inputs, strict=True)}}

    def _nesting(self) -> int:
        if self.scope.nesting >= MAX_BODY_DEPTH:
            raise InvalidModel(f"bodies nest deeper than {MAX_BODY_DEPTH}")
        return self.scope.nesting + 1


def _tensor(value: Emitted, name: str) -> Value:
    """The value itself; DependsOnValues for a sequence or an optional that must outlive the import."""
    if not isinstance(value, Value):
        raise DependsOnValues(f"{name} is a sequence or an optional, not a tensor")
    return value


def inline(
    builder: Builder,
    function: ModelFunction,
    inputs: Sequence[Emitted | None],
    attributes: Mapping[str, Any],
    scope: Scope,
) -> Sequence[Emitted | None]:
    """The outputs of a function body emitted in place, with names of its own."""
    if scope.depth >= MAX_INLINE_DEPTH:
        raise InvalidModel(f"function {function.name} calls itself, or nests deeper than {MAX_INLINE_DEPTH}")
    values = {name: value for name, value in zip(function.inputs, inputs, strict=False) if value is not None}
    inner = replace(
        scope,
        values=values,
        opsets=function.opsets or scope.opsets,
        attributes={**function.defaults, **attributes},
        depth=scope.depth + 1,
    )
    absent = set(function.inputs) - set(values)
    nodes = [_without(node, absent) for node in function.nodes] if absent else function.nodes
    emit_nodes(builder, nodes, inner)
    return [values.get(name) for name in function.outputs]


def _without(node: ModelNode, absent: Set[str]) -> ModelNode:
    """The node with the names of inputs that the caller left out made empty."""
    return replace(node, inputs=tuple("" if name in absent else name for name in node.inputs))


assert operators  # imported for its registrations
