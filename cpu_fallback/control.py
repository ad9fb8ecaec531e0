"""If and Loop: bodies are plans of their own, compiled with the plan around them, run by one step of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_fallback.calls import Array, ArrayCall, copy_exactly
from cpu_fallback.cores import free_memory
from cpu_fallback.inlining import can_inline, inline_if, inline_loop
from cpu_fallback.program import with_program
from cpu_fallback.stream import CpuSlot, CpuStream
from gpu_engine.errors import OutOfMemory
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.control import If, Loop, bound_symbols, run_loop
from gpu_engine.plan.binding import solve_binds
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.plan import Plan

CHECKED_NBYTES = 64 << 20


class Body:
    """A body's plan, with the slots that no execution uses at the moment."""

    def __init__(self, plan: Plan) -> None:
        self._plan = with_program(plan)
        self._shapes = [port.shape for port in plan.input_ports]
        self._idle: deque[CpuSlot] = deque()

    def acquire(self) -> CpuSlot:
        """A slot for one execution; put it back with `release`."""
        try:
            return self._idle.pop()
        except IndexError:
            return CpuStream(self._plan, 1, (), 1).slots[0]

    def release(self, slot: CpuSlot) -> None:
        self._idle.append(slot)

    def launch(self, slot: CpuSlot, inputs: Sequence[Array], known: dict[str, int]) -> Sequence[Array]:
        """Run on the slot; the outputs are valid until its next launch."""
        if len(known) < len(self._plan.symbols):
            known = known | solve_binds(self._shapes, [array.shape for array in inputs], known)
        for target, source in zip(slot.stage(tuple([known[name] for name in self._plan.symbols])), inputs, strict=True):
            target[...] = source
        slot.launch()
        return slot.wait()


@dataclass(frozen=True)
class Branch:
    """The two bodies of an If."""

    then_branch: Body
    else_branch: Body

    def __call__(self, op: If, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> Any:
        condition, *captured = inputs
        body = self.then_branch if condition.reshape(()) else self.else_branch
        slot = body.acquire()
        try:
            results = body.launch(slot, captured, bound_symbols(op.names, op.symbols))
            if op.binds:
                return tuple(result.copy() for result in results)
            for out, result in zip(outputs, results, strict=True):
                copy_exactly(out, result)
        finally:
            body.release(slot)


class Room:
    """Whether what a loop carries and stacks still fits: nobody knows how long it will go on."""

    def __init__(self) -> None:
        self._stacked, self._checked = 0, CHECKED_NBYTES

    def check(self, results: Sequence[Array], carried: int) -> None:
        """Count the results of an iteration, of which those behind the first `carried` are kept; OutOfMemory before
        the next one could take what is left. Carried values are held several times over while they change hands."""
        self._stacked += sum(result.nbytes for result in results[carried:])
        needed = 3 * self._stacked + 8 * sum(result.nbytes for result in results[:carried])
        if needed > self._checked:
            self._checked = 2 * needed
            if needed > (free := free_memory()):
                raise OutOfMemory(f"a loop needs {needed:,} bytes for another iteration, {free:,} are free")


@dataclass(frozen=True)
class Iteration:
    """The body of a Loop."""

    body: Body

    def __call__(self, op: Loop, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> Any:
        known = bound_symbols(op.names, op.symbols)
        slot = self.body.acquire()

        room = Room()

        def once(arrays: Sequence[Array]) -> list[Array]:
            results = [result.copy() for result in self.body.launch(slot, arrays, known)]
            room.check(results, 1 + op.carried)
            return results

        try:
            results = run_loop(op, np, inputs, once)
        finally:
            self.body.release(slot)
        if op.binds:
            return results
        for out, result in zip(outputs, results, strict=True):
            copy_exactly(out, result)


def lower_control(lowering: Lowering, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    """The bodies in place if they can be, else one step that runs them."""
    match node.op:
        case If() as op:
            plans = [lowering.body(graph, op.names) for graph in (op.then_branch, op.else_branch)]
            if can_inline(lowering, op, plans, inputs, outputs):
                inline_if(lowering, plans, inputs, outputs)
            else:
                lowering.emit(ArrayCall(Branch(*map(Body, plans)), op), inputs, outputs, binds=op.binds)
        case Loop() as op:
            plan = lowering.body(op.body, op.names)
            if can_inline(lowering, op, [plan], inputs, outputs):
                inline_loop(lowering, op, plan, inputs, outputs)
            else:
                lowering.emit(ArrayCall(Iteration(Body(plan)), op), inputs, outputs, binds=op.binds)
