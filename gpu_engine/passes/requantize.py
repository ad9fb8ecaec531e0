"""Epilogues of integer products without detours: what is rounded and clipped stays a float until it is stored.

QuantizeLinear and DequantizeLinear in a row convert to bytes and back; the same value is the float that is rounded and
clipped, which saves the conversions. Divisions by constant scales become multiplications by their reciprocals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT16, INT32, UINT8, limits
from gpu_engine.ir.expr import Expr, cast, maximum, minimum, round_even
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Conv, MatMul
from gpu_engine.passes.operands import fewest

SMALLEST_DIVISOR, GREATEST_DIVISOR = 2.0**-100, 2.0**100


def shorten_requantization(graph: Graph) -> Graph:
    """The graph with shorter epilogues of products in int32, equal up to the rounding of a scale."""
    return rewrite(graph, _rewritten)


def _rewritten(node: Node, builder: Builder) -> Sequence[Value] | None:
    op = node.op
    if not isinstance(op, Conv | MatMul) or op.accumulate != INT32 or op.epilogue is None:
        return None
    product = Value(dataclasses.replace(op, epilogue=None).infer(*(value.type for value in node.inputs[:2]))[0])
    shorter = Shortening([product, *node.inputs[2:]], builder)
    root, operands = fewest(shorter.of(op.epilogue), tuple(shorter.operands))
    if root is op.epilogue or operands[:1] != (product,):
        return None
    return (builder.emit(dataclasses.replace(op, epilogue=root), *node.inputs[:2], *operands[1:]),)


@dataclasses.dataclass(frozen=True)
class Shortening:
    """An expression while it is made shorter; scaled constants become operands behind those it has."""

    operands: list[Value]
    builder: Builder
    scaled: dict[tuple[int, float], Expr] = dataclasses.field(default_factory=dict)

    def of(self, root: Expr) -> Expr:
        """`root` with bytes as clipped floats where they are read again, and with products for quotients."""
        found: dict[Expr, Expr] = {}
        for node in (*expr.walk(root),):
            found[node] = self._shorter(node, tuple(found[child] for child in node.args))
        return found[root]

    def _shorter(self, node: Expr, args: tuple[Expr, ...]) -> Expr:
        if not args:
            return node
        match node.op, args:
            case "div", (x, Expr(op="const", value=divisor)) if node.dtype == FLOAT32 and _has_reciprocal(divisor):
                return self._times(x, 1 / float(divisor))
            case "mul", (x, Expr(op="const", value=factor)) if node.dtype == FLOAT32:
                return self._times(x, float(factor))
            case "cast", (x,) if not node.value and (real := _whole_number(x)) is not None:
                if node.dtype == FLOAT32:
                    return real
                return cast(real, node.dtype, saturate=True) if node.dtype == INT16 else cast(x, node.dtype)
            case "cast", (x,):
                return cast(x, node.dtype, saturate=bool(node.value))
        return expr.apply(node.op, *args) if args != node.args else node

    def _times(self, x: Expr, factor: float) -> Expr:
        """x times a number, which constants that x is made of take in where there are any."""
        if x.op == "mul" and self._is_free(x):
            return x.args[0] * self._times(x.args[1], factor)
        if x.op == "const":
            return expr.const(float(x.value) * factor, FLOAT32)
        if x.op == "arg" and self._is_free(x):
            return self._operand(x.value, factor)
        if x.op == "add" and any(map(self._is_free, x.args)):
            return self._times(x.args[0], factor) + self._times(x.args[1], factor)
        return x * expr.const(factor, FLOAT32)

    def _is_free(self, x: Expr) -> bool:
        """Whether a factor costs nothing."""
        if x.op == "mul":
            return x.args[1].op in ("arg", "const") and self._is_free(x.args[1])
        known = x.op == "arg" and self.operands[x.value].constant is not None
        return x.dtype == FLOAT32 and (x.op == "const" or known)

    def _operand(self, index: int, factor: float) -> Expr:
        """A constant operand times a number, as another operand."""
        if (index, factor) not in self.scaled:
            held = self.operands[index].constant
            assert held is not None
            self.scaled[index, factor] = expr.arg(len(self.operands), FLOAT32)
            self.operands.append(self.builder.constant((held.astype(np.float64) * factor).astype(np.float32)))
        return self.scaled[index, factor]


def _has_reciprocal(divisor: object) -> bool:
    return SMALLEST_DIVISOR < abs(float(divisor)) < GREATEST_DIVISOR  # type: ignore[arg-type]


def _whole_number(x: Expr) -> Expr | None:
    """The float32 that equals an integer of bytes: a rounded, shifted and clipped one, its shift taken back."""
    zero = 0
    if x.op == "sub" and x.dtype == INT32 and x.args[1].op == "const":
        zero, x = int(x.args[1].value), x.args[0]
    if x.op == "cast" and x.dtype == INT32 and not x.value:
        x = x.args[0]
    if x.op != "cast" or x.dtype not in (INT8, UINT8) or not x.value or x.args[0].dtype != FLOAT32:
        return None
    low, high = limits(x.dtype)
    real = x.args[0]
    if real.op == "add" and real.args[1].op == "const" and float(real.args[1].value) == zero:
        real = real.args[0]
    elif zero:
        return None
    if real.op != "round":
        return None
    return round_even(minimum(maximum(real.args[0], float(low - zero)), float(high - zero)))
