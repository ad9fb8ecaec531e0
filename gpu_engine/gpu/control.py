"""If and Loop: bodies are plans of their own, prepared with the plan around them, run by one step of it.

What bodies take and give stays on the device. The host reads conditions and trip counts that only running tells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gpu_engine.gpu.launches import BodyCall
from gpu_engine.gpu.program import with_program
from gpu_engine.gpu.text import array_dtype
from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.graph import Node, TensorType
from gpu_engine.ir.ops.control import If, Loop, bound_symbols, run_loop, stacked
from gpu_engine.plan.binding import solve_binds
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.plan import Plan, constant_of, root


class BodySlot(Protocol):
    """Room for one execution of a body."""

    def run(self, extents: tuple[int, ...], inputs: Sequence[Any]) -> list[Any]:
        """The outputs for arrays of the device or the host, valid until the next run."""
        ...


class Body:
    """A body's plan on a device, with the slots that no execution uses at the moment."""

    def __init__(self, plan: Plan, open_slot: Callable[[], BodySlot]) -> None:
        self._symbols, self._open_slot = plan.symbols, open_slot
        self._first, self._passes_first = _first_output(plan)
        self._shapes = [port.shape for port in plan.input_ports]
        self._idle: deque[BodySlot] = deque()

    def acquire(self) -> BodySlot:
        """A slot for one execution; put it back with `release`."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._open_slot()

    def release(self, slot: BodySlot) -> None:
        self._idle.append(slot)

    def run(self, slot: BodySlot, inputs: Sequence[Any], known: dict[str, int]) -> list[Any]:
        """The outputs of one execution on the slot, valid until its next."""
        if len(known) < len(self._symbols):
            known = known | solve_binds(self._shapes, [array.shape for array in inputs], known)
        return slot.run(tuple([known[name] for name in self._symbols]), inputs)

    def condition(self, given: Any, found: Any) -> Any:
        """The condition of the next iteration, on the host if that takes no waiting; `given` is that of this one."""
        return given if self._passes_first else found if self._first is None else self._first


def _first_output(plan: Plan) -> tuple[Any, bool]:
    """The first output if it is known, and whether it is the second input."""
    if len(plan.inputs) < 2 or not plan.outputs:
        return None, False
    return constant_of(plan, plan.outputs[0]), root(plan.buffers, plan.outputs[0]) == plan.inputs[1]


def run_bodies(
    xp: Any, op: If | Loop, bodies: Sequence[Body], inputs: Sequence[Any], keep: Callable[[Sequence[Any]], None]
) -> None:
    """Run `op`; `keep(results)` takes the outputs, which are valid until it returns."""
    if isinstance(op, If):
        _run_if(op, bodies, inputs, keep)
    else:
        _run_loop(xp, op, bodies[0], inputs, keep)


def _run_if(op: If, bodies: Sequence[Body], inputs: Sequence[Any], keep: Callable[[Sequence[Any]], None]) -> None:
    condition, *captured = inputs
    body = bodies[0] if bool(condition.reshape(())) else bodies[1]
    slot = body.acquire()
    try:
        keep(body.run(slot, captured, bound_symbols(op.names, op.symbols)))
    finally:
        body.release(slot)


def _run_loop(
    xp: Any, op: Loop, body: Body, inputs: Sequence[Any], keep: Callable[[Sequence[Any]], None]
) -> None:  # fmt: skip
    known, slot = bound_symbols(op.names, op.symbols), body.acquire()

    def once(arrays: Sequence[Any]) -> list[Any]:
        condition, *results = body.run(slot, arrays, known)
        return [body.condition(arrays[1], condition), *(array.copy() for array in results)]

    try:
        keep(run_loop(op, xp, inputs, once, _stacked))
    finally:
        body.release(slot)


def _stacked(xp: Any, found: list[Any], kind: TensorType) -> Any:
    hosted = kind.dtype == STRING
    return stacked(np if hosted else xp, found, kind if hosted else TensorType(array_dtype(kind.dtype), kind.shape))


def controls(op: If | Loop) -> int:
    """How many of the first operands the host reads: the condition of an If; the trip count and condition of a Loop."""
    return 1 if isinstance(op, If) else op.counted + op.conditional


def lower_control(lowering: Lowering, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    """One step that runs the bodies."""
    op = node.op
    assert isinstance(op, If | Loop)
    graphs = (op.then_branch, op.else_branch) if isinstance(op, If) else (op.body,)
    plans = tuple(with_program(lowering.body(graph, op.names)) for graph in graphs)
    lowering.emit(BodyCall(op, plans), inputs, outputs, binds=op.binds)
