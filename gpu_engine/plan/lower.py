"""Lowering, the part that every device shares: values become numbered buffers, nodes become a device's steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import GpuEngineError, OutOfMemory
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import STRING, DType
from gpu_engine.ir.folding import hidden_nbytes
from gpu_engine.ir.graph import Graph, Node, TensorType, Value
from gpu_engine.ir.ops import Reshape
from gpu_engine.plan.plan import LARGEST, LARGEST_EMPTY, Batching, Buffer, Plan, Port, Step, root
from gpu_engine.plan.requirements import node_requirements


class Lowering:
    """Numbers buffers and appends steps; handed to a device's lowering of each node."""

    def __init__(
        self, lower_node: LowerNode, arrange: Arrange = lambda graph: graph, room_nbytes: int = LARGEST
    ) -> None:
        self._lower_node, self._arrange, self._room_nbytes = lower_node, arrange, room_nbytes
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.source = ""
        self._numbers: dict[Value, int] = {}

    def buffer(self, dtype: DType, shape: tuple[Dim, ...]) -> int:
        """A new tensor that steps write: an output or scratch."""
        nbytes = dims.product(shape) * dtype.itemsize
        walked = math.prod(max(extent, 1) for extent in shape if isinstance(extent, int))
        if (isinstance(nbytes, int) and nbytes > LARGEST) or walked > (LARGEST_EMPTY if nbytes == 0 else LARGEST):
            raise OutOfMemory(f"{self.source}: no machine holds {TensorType(dtype, shape)}")
        return self._add(Buffer(dtype, shape))

    def constant(self, array: Any) -> int:
        """A tensor known now, such as a packed weight. The plan keeps it C-contiguous, aligned and read-only."""
        return self._add(Buffer(array.dtype, array.shape, array))

    def alias(self, buffer: int, shape: tuple[Dim, ...]) -> int:
        """The same elements under another shape."""
        return self._add(Buffer(self.buffers[buffer].dtype, shape, alias=buffer))

    def emit(
        self,
        kernel: Any,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        scratch: tuple[int, ...] = (),
        binds: tuple[str, ...] = (),
        in_place: tuple[int, ...] = (),
    ) -> None:
        """Append a step for the node being lowered."""
        self.steps.append(Step(kernel, inputs, outputs, self.source, binds, scratch, in_place))

    def number(self, value: Value) -> int:
        """The buffer of `value`, made when first asked for."""
        found = self._numbers.get(value)
        if found is None:
            known = value.constant
            found = self.buffer(value.dtype, value.shape) if known is None else self.constant(known)
            self._numbers[value] = found
        return found

    def body(self, graph: Graph, names: tuple[str, ...]) -> Plan:
        """The plan of a body: the values of `names` come first among its symbols, then what its inputs' shapes bind."""
        return lower_graph(graph, NOT_BATCHED, self._lower_node, self._arrange, names, self._room_nbytes)

    def lower(self, node: Node) -> None:
        """Append the node's steps; a Reshape is an alias and has none."""
        self.source = node.source
        inputs = tuple(map(self.number, node.inputs))
        if isinstance(node.op, Reshape):
            self._numbers[node.outputs[0]] = self.alias(inputs[0], node.outputs[0].shape)
            return
        self._lower_node(self, node, inputs, tuple(map(self.number, node.outputs)))

    def _add(self, buffer: Buffer) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1


LowerNode = Callable[[Lowering, Node, tuple[int, ...], tuple[int, ...]], None]
"""lower_node(lowering, node, input buffers, output buffers): appends the steps of one node."""
Arrange = Callable[[Graph], Graph]
"""The graph in a device's own operations and layouts: what extents must be was said by those before it."""


NOT_BATCHED = Batching(None, (), (), "a body")


def lower_graph(
    graph: Graph,
    batching: Batching,
    lower_node: LowerNode,
    arrange: Arrange = lambda graph: graph,
    names: tuple[str, ...] = (),
    room_nbytes: int = LARGEST,
) -> Plan:
    """The plan of `graph` for the device that arranges it, then lowers one node after the other.

    `names` are symbols that binding gets the values of before those that the inputs' shapes bind. OutOfMemory if
    constants that take no memory yet would take more than `room_nbytes`.
    """
    refuse_repeats(graph, room_nbytes)
    lowering = Lowering(lower_node, arrange, room_nbytes)
    requirements = dict.fromkeys(requirement for node in graph.nodes for requirement in node_requirements(node))
    graph = arrange(graph)
    inputs = tuple(map(lowering.number, graph.inputs))
    for node in graph.nodes:
        lowering.lower(node)
    outputs = tuple(map(lowering.number, graph.outputs))
    return Plan(
        steps=tuple(lowering.steps),
        buffers=tuple(map(frozen, without_unused(lowering.buffers, lowering.steps, outputs))),
        inputs=inputs,
        outputs=outputs,
        input_ports=_ports(graph.input_names, graph.inputs),
        output_ports=_ports(graph.output_names, graph.outputs),
        symbols=tuple(dict.fromkeys((*names, *_input_symbols(graph)))),
        batching=batching,
        requirements=tuple(requirements),
        output_structures=graph.output_structures,
    )


def refuse_repeats(graph: Graph, room_nbytes: int) -> None:
    """OutOfMemory if constants that repeat their elements take more than this once kernels need them whole."""
    known = {value: node.source for node in graph.nodes for value in node.inputs if value.constant is not None}
    sizes = {value: hidden_nbytes(value.constant) for value in known if value.constant is not None}
    if sum(sizes.values()) > room_nbytes:
        largest = max(sizes, key=sizes.__getitem__)
        raise OutOfMemory(
            f"{known[largest]}: constants that repeat their elements, as {largest.type} does, take "
            f"{sum(sizes.values()):,} bytes, and {room_nbytes:,} are left"
        )


def without_unused(buffers: Sequence[Buffer], steps: Sequence[Step], outputs: Sequence[int]) -> tuple[Buffer, ...]:
    """The buffers, without the contents of constants that no step reads: a packed weight stands for its original."""
    found = tuple(buffers)
    named = {index for step in steps for index in (*step.inputs, *step.outputs, *step.scratch)} | set(outputs)
    used = {root(found, index) for index in named}
    return tuple(
        buffer if buffer.constant is None or i in used else dataclasses.replace(buffer, constant=None)
        for i, buffer in enumerate(found)
    )


def frozen(buffer: Buffer) -> Buffer:
    """The buffer as a plan keeps it."""
    return buffer if buffer.constant is None else dataclasses.replace(buffer, constant=frozen_array(buffer.constant))


def frozen_array(array: Any) -> Any:
    """`array` C-contiguous, aligned and read-only, without a copy where it is so already and not a piece of the model
    file, which must neither stay open nor change the plan when it changes."""
    result = np.require(array, requirements=() if array.dtype == STRING else ("C", "A"))
    owner = result
    while isinstance(owner, np.ndarray):
        owner = owner.base
    result = (result.copy() if isinstance(owner, memoryview) and owner.readonly else result).view()
    result.flags.writeable = False
    return result


def _ports(names: tuple[str, ...], values: tuple[Value, ...]) -> tuple[Port, ...]:
    return tuple(Port(name, value.dtype, value.shape) for name, value in zip(names, values, strict=True))


def _input_symbols(graph: Graph) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for value in graph.inputs:
        for extent in value.shape:
            found |= dict.fromkeys(sorted(dims.symbols(extent)))
    return tuple(found)


def segments(plan: Plan) -> list[tuple[int, int, tuple[str, ...]]]:
    """(first step, last step + 1, names of the extents known by then): a plan cut behind every step that binds."""
    cuts, start, known = [], 0, plan.symbols
    for i, step in enumerate(plan.steps):
        if step.binds:
            cuts.append((start, i + 1, known))
            start, known = i + 1, (*known, *(name for name in step.binds if name not in known))
    cuts.append((start, len(plan.steps), known))
    _check_names(plan, known)
    return cuts


def _check_names(plan: Plan, known: tuple[str, ...]) -> None:
    for step in plan.steps:
        for buffer in (*step.inputs, *step.outputs):
            for extent in plan.buffers[buffer].shape:
                missing = dims.symbols(extent) - set(known)
                if missing:
                    raise GpuEngineError(f"{step.source}: no input and no step binds the extent {sorted(missing)[0]}")
