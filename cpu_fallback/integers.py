"""Arithmetic on extents inside kernels: 64-bit registers."""

from __future__ import annotations

from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.loops import THREAD


def most(code: Code, a: Reg, b: Reg) -> Reg:
    return code.call("i64", "llvm.smax.i64", a, b)


def least(code: Code, a: Reg, b: Reg) -> Reg:
    return code.call("i64", "llvm.smin.i64", a, b)


def clamp(code: Code, x: Reg, low: Reg, high: Reg) -> Reg:
    return least(code, most(code, x, low), high)


def ceil_div(code: Code, a: Reg, b: Reg) -> Reg:
    """Of a >= 0 and b > 0."""
    return code.binary("udiv", code.binary("add", a, code.binary("sub", b, i64(1))), b)


def times(code: Code, *factors: Reg) -> Reg:
    """The product; factors that are literals are multiplied now."""
    return _folded(code, "mul", 1, factors)


def plus(code: Code, *terms: Reg) -> Reg:
    """The sum; terms that are literals are added now."""
    return _folded(code, "add", 0, terms)


def _folded(code: Code, op: str, neutral: int, operands: tuple[Reg, ...]) -> Reg:
    number, result = neutral, None
    for operand in operands:
        if operand.name.lstrip("-").isdigit():
            number = number * int(operand.name) if op == "mul" else number + int(operand.name)
        else:
            result = operand if result is None else code.binary(op, result, operand)
    if result is None or (op == "mul" and number == 0):
        return i64(number)
    return result if number == neutral else code.binary(op, result, i64(number))


def share(code: Code, total: Reg, team: Reg) -> tuple[Reg, Reg]:
    """[start, stop) of this thread in `total` among the first `team` threads; nothing for the others."""
    ends = []
    for index in (THREAD, plus(code, THREAD, i64(1))):
        ends.append(least(code, code.binary("udiv", times(code, total, index), team), total))
    return ends[0], ends[1]


def in_equal_parts(code: Code, total: Reg, limit: Reg) -> Reg:
    """The least size of as many parts as parts of `limit` are, at least 1: none is nearly empty."""
    parts = most(code, ceil_div(code, total, most(code, limit, i64(1))), i64(1))
    return most(code, ceil_div(code, total, parts), i64(1))
