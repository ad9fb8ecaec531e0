"""Checks among native steps: what does not hold ends the run, and a step behind it says what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpu_fallback.calls import Array, ArrayCall, Native
from cpu_fallback.code import Code, Reg, i64, literal
from cpu_fallback.jumps import Jump
from cpu_fallback.loops import Words
from cpu_fallback.native import Target
from gpu_engine.errors import ExecutionError, InputError
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, INT64
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.plan import Plan, Requirement, Step
from gpu_engine.plan.words import Address, Word

BEHIND_ALL = 1 << 40
EQUAL, ONE_OR_EQUAL, GREATER = "equal", "one or equal", "greater"


@dataclass(frozen=True)
class RelationsKernel:
    """Which of several relations is the first that does not hold, counted from 1; 0 if all do.

    Words: that number int64, whether it is 0, then two numbers for each relation.
    """

    relations: tuple[str, ...]

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        found, fine = words.pointers(2)
        pairs = [tuple(words.numbers(2)) for _ in self.relations]
        number = i64(0)
        for place, relation in reversed(list(enumerate(self.relations))):
            number = code.select(self._holds(code, relation, *pairs[place]), number, i64(place + 1))
        _write_verdict(code, number, found, fine)

    def _holds(self, code: Code, relation: str, left: Reg, right: Reg) -> Reg:
        if relation == GREATER:
            return code.compare("icmp sgt", left, right)
        equal = code.compare("icmp eq", left, right)
        return code.binary("or", equal, code.compare("icmp eq", left, i64(1))) if relation == ONE_OR_EQUAL else equal


@dataclass(frozen=True)
class FlagKernel:
    """1 if a byte is not what it should be, else 0. Words: that number int64, whether it is 0, address of the byte."""

    expected: bool

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        found, fine, byte = words.pointers(3)
        condition = code.compare("icmp ne", code.load("i8", byte, 1), literal("i8", 0))
        number = code.convert("zext", condition, "i64")
        _write_verdict(code, code.binary("sub", i64(1), number) if self.expected else number, found, fine)


def _write_verdict(code: Code, number: Reg, found: Reg, fine: Reg) -> None:
    code.store(number, found, 8)
    code.store(code.convert("zext", code.compare("icmp eq", number, i64(0)), "i8"), fine, 1)


@dataclass(frozen=True)
class Verdict:
    """What a check says that found something, counted from 1: one of the `texts` with its `numbers` in it."""

    numbers: tuple[tuple[Dim, ...], ...]
    texts: tuple[str, ...]
    of_values: bool = False


def pronounce(op: Verdict, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
    """InputError if extents contradict the model, ExecutionError if values do."""
    number = int(inputs[0])
    if number:
        text = op.texts[number - 1].format(*op.numbers[number - 1])
        raise ExecutionError(text) if op.of_values else InputError(text)


def is_verdict(step: Step) -> bool:
    return isinstance(step.kernel, ArrayCall) and step.kernel.function is pronounce


def sunk(plan: Plan) -> Plan:
    """What raises where a check did not pass, no sooner than before the next step that is not native: a run has to be
    left only once."""
    steps: list[Step] = []
    waiting: list[Step] = []
    for step in plan.steps:
        if is_verdict(step):
            waiting.append(step)
            continue
        if not isinstance(step.kernel, Native):
            steps, waiting = [*steps, *waiting], []
        steps.append(step)
    return replace(plan, steps=(*steps, *waiting))


def emit_relations(
    lowering: Lowering, relations: Sequence[tuple[str, Dim, Dim, str]], found: int | None = None
) -> Step:
    """End the run if one of (relation, left, right, text) does not hold; the step that then raises is not emitted.

    `found` is the buffer for which of them it was, if there is one already.
    """
    kernel = RelationsKernel(tuple(relation for relation, *_ in relations))
    sides = tuple((left, right) for _, left, right, _ in relations)
    verdict = Verdict(sides, tuple(text for *_, text in relations))
    return _emit(lowering, kernel, [side for pair in sides for side in pair], (), verdict, found)


def emit_flag(lowering: Lowering, byte: int, expected: bool, text: str) -> Step:
    """End the run if a byte is not what it should be; the step that then raises is not emitted."""
    verdict = Verdict(((),), (_plain(f"{lowering.source}: {text}"),), of_values=True)
    return _emit(lowering, FlagKernel(expected), [Address(byte)], (byte,), verdict)


def emit_found(lowering: Lowering, found: int, text: str, numbers: tuple[Dim, ...]) -> Step:
    """End the run if the number in buffer `found` is 1; the step that then raises `text` is not emitted."""
    lowering.emit(Native(Jump(), (Address(found), 1, BEHIND_ALL)), (found,), ())
    verdict = Verdict((numbers,), (_plain(f"{lowering.source}: ") + text,), of_values=True)
    return Step(ArrayCall(pronounce, verdict), (found,), (), lowering.source)


def _emit(
    lowering: Lowering,
    kernel: RelationsKernel | FlagKernel,
    words: Sequence[Word],
    inputs: tuple[int, ...],
    verdict: Verdict,
    found: int | None = None,
) -> Step:
    found, fine = lowering.buffer(INT64, ()) if found is None else found, lowering.buffer(BOOL, ())
    lowering.emit(Native(kernel, (Address(found), Address(fine), *words)), inputs, (found, fine))
    lowering.emit(Native(Jump(), (Address(fine), 0, BEHIND_ALL)), (fine,), ())
    return Step(ArrayCall(pronounce, verdict), (found,), (), lowering.source)


def as_relation(requirement: Requirement) -> tuple[str, Dim, Dim, str]:
    """What binding would check."""
    verb = "does not broadcast to" if requirement.broadcast else "should be"
    left, right, head = (
        _plain(text) for text in (requirement.left, requirement.right, f"{requirement.source}: {requirement.what}")
    )
    text = f"{head}: extent {{0}} ({left}) {verb} {{1}} ({right})"
    return ONE_OR_EQUAL if requirement.broadcast else EQUAL, requirement.left, requirement.right, text


def _plain(text: object) -> str:
    return str(text).replace("{", "{{").replace("}", "}}")
