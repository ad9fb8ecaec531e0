"""Bodies in place: the steps of a body's plan, if all of them are native, among those of the plan around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cpu_fallback.calls import Native
from cpu_fallback.checks import BEHIND_ALL, as_relation, emit_relations, is_verdict
from cpu_fallback.interruption import STATE
from cpu_fallback.jumps import Jump, LoopKernel, emit_jump, emit_move, land
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Call, Dim
from gpu_engine.ir.dtypes import BOOL, INT64
from gpu_engine.ir.ops.control import If, Loop
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.plan import Plan, Step, root
from gpu_engine.plan.words import Address, Word

Buffers = Sequence[int]


def can_inline(lowering: Lowering, op: If | Loop, plans: Sequence[Plan], inputs: Buffers, outputs: Buffers) -> bool:
    """Whether the bodies of `op` may be bound with the plan around them, whichever of them will run."""
    if op.binds or any(symbol != dims.symbol(name) for name, symbol in zip(op.names, op.symbols, strict=True)):
        return False
    if not all(_is_native(plan) and set(plan.symbols) <= set(op.names) for plan in plans):
        return False
    given = [lowering.buffers[i].shape for i in inputs]
    made = [lowering.buffers[i].shape for i in outputs]
    if isinstance(op, If):
        return all(_shapes(plan, plan.inputs) == given[1:] and _shapes(plan, plan.outputs) == made for plan in plans)
    operands, carried = given[op.counted + op.conditional :], op.carried
    inside, results = _shapes(plans[0], plans[0].inputs)[2:], _shapes(plans[0], plans[0].outputs)[1:]
    stacked = [shape[1:] for shape in made[carried:]]
    return inside == operands and results == operands[:carried] + stacked and made[:carried] == operands[:carried]


def _shapes(plan: Plan, buffers: Buffers) -> list[tuple[Dim, ...]]:
    return [plan.buffers[i].shape for i in buffers]


def _is_native(plan: Plan) -> bool:
    """Whether the plan needs nothing but native code, and extents that can always be computed."""
    if any(buffer.dtype.hasobject for buffer in plan.buffers):
        return False
    steps = [step for step in plan.steps if not is_verdict(step)]
    if not all(isinstance(step.kernel, Native) for step in steps):
        return False
    needed = {extent for buffer in plan.buffers for extent in buffer.shape}
    needed |= {word.offset if isinstance(word, Address) else word for step in steps for word in step.kernel.words}
    needed |= {side for requirement in plan.requirements for side in (requirement.left, requirement.right)}
    return all(map(_always_computes, needed))


def _always_computes(dim: Dim) -> bool:
    """Whether the extent has a value whatever its symbols are."""
    if isinstance(dim, int):
        return True
    calls = [atom for monomial, _ in dim.terms for atom in monomial if isinstance(atom, Call)]
    for call in calls:
        if call.function == "broadcast" or not all(map(_always_computes, call.args)):
            return False
        if call.function in ("floordiv", "mod") and not isinstance(call.args[1], int):
            return False
    return True


def inline_if(lowering: Lowering, plans: Sequence[Plan], inputs: Buffers, outputs: Buffers) -> None:
    """Jump to one of two bodies, and behind both."""
    condition, *captured = inputs
    bodies = [_Inlined(lowering, plan) for plan in plans]
    skip = emit_jump(lowering, condition, when=False)
    bodies[0].emit(captured, outputs)
    over = emit_jump(lowering, lowering.constant(np.ones((), BOOL)), when=True)
    land(lowering, skip, len(lowering.steps))
    bodies[1].emit(captured, outputs)
    land(lowering, over, len(lowering.steps))
    for body in bodies:
        body.pronounce()


def inline_loop(lowering: Lowering, op: Loop, plan: Plan, inputs: Buffers, outputs: Buffers) -> None:
    """Carried values live in the results; each iteration computes new ones, then moves them there."""
    operands = list(inputs)
    trips = operands.pop(0) if op.counted else None
    first = operands.pop(0) if op.conditional else None
    initial, captured = operands[: op.carried], operands[op.carried :]
    number, more, seen = lowering.buffer(INT64, ()), lowering.buffer(BOOL, ()), lowering.buffer(BOOL, ())
    state = list(outputs[: op.carried])
    body = _Inlined(lowering, plan)
    for source, target in zip(initial, state, strict=True):
        emit_move(lowering, source, target)
    stacked = tuple(outputs[op.carried :])
    _advance(lowering, (number, more, seen), trips, first, before=stacked)
    away = emit_jump(lowering, more, when=False)
    condition, *results = body.emit((number, seen, *state, *captured))
    for result, target in zip(results[op.carried :], stacked, strict=True):
        emit_move(lowering, result, target, number)
    condition = _apart(lowering, condition, state)
    changed = [pair for pair in zip(results[: op.carried], state, strict=True) if not _is(lowering, *pair)]
    for source, target in [(_apart(lowering, result, state), target) for result, target in changed]:
        emit_move(lowering, source, target)
    _advance(lowering, (number, more, seen), trips, condition)
    kept = (*state, *captured, number, seen, *(() if trips is None else (trips,)), *stacked)
    back = emit_jump(lowering, more, when=True, kept=(*kept, *body.verdicts))
    land(lowering, back, away + 1)
    land(lowering, away, len(lowering.steps))
    body.pronounce()


def _apart(lowering: Lowering, result: int, state: Buffers) -> int:
    """A result of a body that is one of the values carried into it, out of the way of those that are moved there."""
    if not any(_is(lowering, result, value) for value in state):
        return result
    buffer = lowering.buffers[result]
    copy = lowering.buffer(buffer.dtype, buffer.shape)
    emit_move(lowering, result, copy)
    return copy


def _is(lowering: Lowering, result: int, value: int) -> bool:
    """Whether both are one memory."""
    buffers = tuple(lowering.buffers)
    return root(buffers, result) == root(buffers, value)


def _advance(
    lowering: Lowering,
    changed: tuple[int, int, int],
    trips: int | None,
    condition: int | None,
    before: tuple[int, ...] | None = None,
) -> None:
    """The number of the next iteration; of the first one if `before` names what all iterations together fill, whose
    memory is theirs from here on. The run ends where a signal's handler raised: no loop around this one goes on."""
    given = tuple(buffer for buffer in (trips, condition) if buffer is not None)
    kernel = LoopKernel(before is not None, trips is not None, condition is not None)
    if before is not None:
        lowering.emit(Native(kernel, tuple(map(Address, (*changed, *given)))), given, (*changed, *before))
        return
    raised = lowering.buffer(BOOL, ())
    words: tuple[Word, ...] = (*map(Address, (*changed, raised)), STATE, *map(Address, given))
    lowering.emit(Native(kernel, words), (*given, *changed), (*changed, raised))
    lowering.emit(Native(Jump(), (Address(raised), 1, BEHIND_ALL)), (raised,), ())


class _Inlined:
    """A body's plan on its way into the plan around it. Its checks begin as passed, in case that it does not run."""

    def __init__(self, lowering: Lowering, plan: Plan) -> None:
        self._lowering, self._plan = lowering, plan
        self._zero = lowering.constant(np.zeros((), INT64))
        self._places: dict[int, int] = {}
        self._after: list[Step] = []
        self.verdicts: list[int] = []
        for step in plan.steps:
            if is_verdict(step):
                self._places[step.inputs[0]] = self._passed()
        self._demanded = self._passed() if plan.requirements else None

    def emit(self, inputs: Buffers, outputs: Buffers = ()) -> list[int]:
        """Append the steps over these inputs; the outputs, which where `outputs` are given are moved there."""
        plan, lowering, outer = self._plan, self._lowering, self._lowering.source
        self._place(inputs, outputs)
        if self._demanded is not None:
            demands = [as_relation(requirement) for requirement in plan.requirements]
            self._after.append(emit_relations(lowering, demands, self._demanded))
        for step in plan.steps:
            lowering.source = step.source
            if is_verdict(step):
                self._after.append(replace(step, inputs=(self._places[step.inputs[0]],)))
            else:
                self._step(step)
        lowering.source = outer
        found = [self._places[index] for index in plan.outputs]
        for result, target in zip(found, outputs, strict=False):
            if result != target:
                emit_move(lowering, result, target)
        return found

    def pronounce(self) -> None:
        """Append what raises where a check did not pass."""
        self._lowering.steps += self._after

    def _passed(self) -> int:
        verdict = self._lowering.buffer(INT64, ())
        emit_move(self._lowering, self._zero, verdict)
        self.verdicts.append(verdict)
        return verdict

    def _place(self, inputs: Buffers, outputs: Buffers) -> None:
        """A buffer outside for each one inside; results that the body itself makes are those outside at once."""
        plan, lowering, places = self._plan, self._lowering, self._places
        places.update(zip(plan.inputs, inputs, strict=True))
        for index, target in zip(plan.outputs, outputs, strict=False):
            own = plan.buffers[index]
            if index not in places and own.constant is None and own.alias is None:
                places[index] = target
        for index, buffer in enumerate(plan.buffers):
            if index in places:
                continue
            if buffer.alias is not None:
                places[index] = lowering.alias(places[buffer.alias], buffer.shape)
            elif buffer.constant is not None:
                places[index] = lowering.constant(buffer.constant)
            else:
                places[index] = lowering.buffer(buffer.dtype, buffer.shape)

    def _step(self, step: Step) -> None:
        places = self._places
        words = tuple(replace(w, buffer=places[w.buffer]) if isinstance(w, Address) else w for w in step.kernel.words)
        inputs, outputs, scratch = (
            tuple(places[i] for i in part) for part in (step.inputs, step.outputs, step.scratch)
        )
        kernel = Native(step.kernel.kernel, words)
        self._lowering.emit(kernel, inputs, outputs, scratch=scratch, in_place=step.in_place)
