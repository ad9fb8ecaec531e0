"""What If and Loop are made of where their bodies are native: jumps over rows of the table, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, literal
from cpu_fallback.interruption import PERIOD, write_look
from cpu_fallback.loops import THREAD, Words, thread_share
from cpu_fallback.native import Target
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.memory import buffer_nbytes
from gpu_engine.plan.words import Address

ROW_NBYTES = 16


@dataclass(frozen=True)
class Jump:
    """No function: the walker itself goes on elsewhere if a byte is what it should be, else with the next row.

    Words: address of the byte, 1 if it should not be 0, bytes from this row of the table to the other one.
    """

    def write(self, code: Code, target: Target) -> None:
        raise AssertionError("the walker knows jumps")


@dataclass(frozen=True)
class LoopKernel:
    """Before the first iteration (`first`) or after one: the number of the next, and whether there is one.

    Words: number int64, whether there is another bool, the condition that the body sees bool; if not `first` whether a
    signal's handler raised bool, and the address of `interruption.STATE`; trips int64 if `counted`; the condition that
    was computed last, bool, if `conditional`.
    """

    first: bool
    counted: bool
    conditional: bool

    def write(self, code: Code, target: Target) -> None:
        """The first thread counts."""
        first = code.compare("icmp eq", THREAD, i64(0))
        code.either(first, lambda: self._count(code), lambda: [])

    def _count(self, code: Code) -> list[Reg]:
        words = Words(code)
        number, more, seen = words.pointers(3)
        raised, state = (None, None) if self.first else words.pointers(2)
        trips = words.take("ptr") if self.counted else None
        condition = words.take("ptr") if self.conditional else None
        count = i64(0) if self.first else code.binary("add", code.load("i64", number, 8), i64(1))
        code.store(count, number, 8)
        going = literal("i8", 1)
        if condition is not None:
            going = code.convert("zext", code.compare("icmp ne", code.load("i8", condition, 1), literal("i8", 0)), "i8")
        code.store(going, seen, 1)
        if trips is not None:
            left = code.compare("icmp slt", count, code.load("i64", trips, 8))
            going = code.binary("and", going, code.convert("zext", left, "i8"))
        code.store(going, more, 1)
        if raised is not None and state is not None:
            due = code.compare("icmp eq", code.binary("and", count, i64(PERIOD - 1)), i64(0))
            (found,) = code.either(due, lambda: [write_look(code, state)], lambda: [i64(0)])
            code.store(code.convert("zext", code.compare("icmp ne", found, i64(0)), "i8"), raised, 1)
        return []


@dataclass(frozen=True)
class CopyKernel:
    """A tensor to another place, or with `stacked` to its place among those of all iterations.

    Words: result, x, bytes, the iteration's number int64 if `stacked`.
    """

    stacked: bool = False

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        out, x, nbytes = *words.pointers(2), words.take()
        if self.stacked:
            number = code.load("i64", words.take("ptr"), 8)
            out = code.at(out, code.binary("mul", number, nbytes))
        start, stop = thread_share(code, nbytes, 64)
        length = code.binary("sub", stop, start)
        places = (code.at(out, start), code.at(x, start))
        code.call("void", "llvm.memcpy.p0.p0.i64", *places, length, Reg("false", "i1"))


def emit_jump(lowering: Lowering, byte: int, when: bool, kept: tuple[int, ...] = ()) -> int:
    """A jump whose target `land` tells; `kept` are buffers that must live until here. Its place among the steps."""
    lowering.emit(Native(Jump(), (Address(byte), int(when), 0)), (byte, *kept), ())
    return len(lowering.steps) - 1


def land(lowering: Lowering, jump: int, target: int) -> None:
    """Have the jump at place `jump` go to the step at `target`, of a run that has no other than native steps."""
    step = lowering.steps[jump]
    words = (*step.kernel.words[:2], ROW_NBYTES * (target - jump))
    lowering.steps[jump] = replace(step, kernel=Native(Jump(), words))


def emit_move(lowering: Lowering, source: int, target: int, number: int | None = None) -> None:
    """Copy a buffer to one of as many elements, or to the place of iteration `number` in a greater one."""
    nbytes = buffer_nbytes(lowering.buffers[source])
    words = (Address(target), Address(source), nbytes, *(() if number is None else (Address(number),)))
    inputs = (source,) if number is None else (source, number)
    lowering.emit(Native(CopyKernel(number is not None), words), inputs, (target,))
