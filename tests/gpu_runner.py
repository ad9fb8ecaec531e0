"""One engine operation on the GPU's plan, interpreted on the host, beside its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.kernel import TritonKernel
from gpu_engine.gpu.launches import ArrayCall, Launch
from gpu_engine.ir.graph import Graph, Node, Op, TensorType, Value
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.plan.plan import Plan

Array = NDArray[Any]


def graph_of(op: Op, types: Sequence[TensorType], constants: dict[int, Array] | None = None) -> Graph:
    """A graph of one node; operands in `constants` are known, the others are inputs."""
    known = constants or {}
    values = [Value(kind, known.get(i)) for i, kind in enumerate(types)]
    outputs = tuple(Value(kind) for kind in op.infer(*types))
    inputs = tuple(value for i, value in enumerate(values) if i not in known)
    node = Node(op, tuple(values), outputs, "the node")
    names = tuple(f"x{i}" for i in range(len(inputs)))
    return Graph(inputs, outputs, (node,), names, tuple(f"y{i}" for i in range(len(outputs))))


def lowered(graph: Graph) -> Plan:
    return InterpretDevice().lower(graph, NOT_BATCHED)


def kernels(plan: Plan) -> list[TritonKernel]:
    """The kernels of a plan, in the order of its launches."""
    return [step.kernel.kernel for step in plan.steps if isinstance(step.kernel, Launch)]


def array_steps(plan: Plan) -> list[str]:
    """The sources of what no kernel does."""
    return [step.source for step in plan.steps if isinstance(step.kernel, ArrayCall)]


def execute(plan: Plan, inputs: Sequence[Array], seed: int = 0) -> list[Array]:
    """The outputs of a plan whose symbols are single extents of its inputs, every program in an order of `seed`."""
    extents = {
        str(dim): extent
        for port, array in zip(plan.input_ports, inputs, strict=True)
        for dim, extent in zip(port.shape, array.shape, strict=True)
        if not isinstance(dim, int)
    }
    (stream,) = InterpretDevice(seed=seed).open(plan, 1, 1, None)
    slot = stream.slots[0]
    for staged, array in zip(slot.stage(tuple(extents[name] for name in plan.symbols)), inputs, strict=True):
        staged[...] = array
    slot.launch()
    return [np.array(array) for array in slot.wait()]


def run_op(op: Op, arrays: Sequence[Array], types: Sequence[TensorType] | None = None, seed: int = 0) -> list[Array]:
    """The outputs of `op` for `arrays`, whose types may have symbolic extents; fails where no kernel does it."""
    kinds = types or [TensorType(array.dtype, array.shape) for array in arrays]
    plan = lowered(graph_of(op, kinds))
    assert not array_steps(plan), f"{op} has no kernel for {', '.join(map(str, kinds))}"
    return execute(plan, arrays, seed)
