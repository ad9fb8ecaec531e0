"""Elementwise arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, operator, pointwise
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, is_float
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Value

MOST_OPERANDS = 8
FLOAT32_LIMIT = 3.4028234663852886e38


@pointwise("Add", since=7)
def add(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Add.html"""
    return a + b


@pointwise("Sub", since=7)
def sub(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Sub.html"""
    return a - b


@pointwise("Mul", since=7)
def mul(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Mul.html"""
    return a * b


@pointwise("Div", since=7)
def div(a: Expr, b: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Div.html

    Integers truncate towards zero.
    """
    return a / b


@pointwise("Pow", since=7)
def pow_(x: Expr, y: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Pow.html"""
    return x**y


@pointwise("Mod", since=10)
def mod(a: Expr, b: Expr, *, fmod: int = 0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Mod.html"""
    return expr.fmod(a, b) if fmod else expr.remainder(a, b)


@pointwise("Neg", since=1)
def neg(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Neg.html"""
    return -x


@pointwise("Abs", since=1)
def abs_(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Abs.html"""
    return abs(x)


@pointwise("Sign", since=9)
def sign(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Sign.html"""
    return expr.sign(x)


@pointwise("Reciprocal", since=1)
def reciprocal(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Reciprocal.html"""
    return 1 / x


@pointwise("Sqrt", since=1)
def sqrt(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Sqrt.html"""
    return expr.sqrt(x)


@pointwise("Exp", since=1)
def exp(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Exp.html"""
    return expr.exp(x)


@pointwise("Log", since=1)
def log(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Log.html"""
    return expr.log(x)


@pointwise("Erf", since=9)
def erf(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Erf.html"""
    if is_float(x.dtype):
        return expr.erf(x)
    return cast(expr.erf(cast(x, FLOAT32 if x.dtype.itemsize < 4 else FLOAT64)), x.dtype)


@pointwise("Floor", since=1)
def floor(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Floor.html"""
    return expr.floor(x)


@pointwise("Ceil", since=1)
def ceil(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Ceil.html"""
    return expr.ceil(x)


@pointwise("Round", since=11)
def round_(x: Expr) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Round.html"""
    return expr.round_even(x)


@pointwise("Clip", since=6)
def clip_6(x: Expr, *, min: float = -FLOAT32_LIMIT, max: float = FLOAT32_LIMIT) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Clip.html (bounds as attributes)"""
    return expr.clip(x, min, max)


@pointwise("Clip", since=11)
def clip(x: Expr, min: Expr | None = None, max: Expr | None = None) -> Expr:
    """https://onnx.ai/onnx/operators/onnx__Clip.html"""
    x = x if min is None else expr.maximum(x, min)
    return x if max is None else expr.minimum(x, max)


@operator("Max", since=6)
def max_(b: Builder, *xs: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Max.html"""
    return folded(b, expr.maximum, xs)


@operator("Min", since=6)
def min_(b: Builder, *xs: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Min.html"""
    return folded(b, expr.minimum, xs)


@operator("Sum", since=6)
def sum_(b: Builder, *xs: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Sum.html"""
    return folded(b, Expr.__add__, xs)


@operator("Mean", since=6)
def mean(b: Builder, *xs: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Mean.html"""
    return emit_map(b, lambda total: total / len(xs), folded(b, Expr.__add__, xs))


def folded(b: Builder, function: Callable[[Expr, Expr], Expr], xs: Sequence[Value]) -> Value:
    """All of `xs` joined by `function`, few in a kernel, because a model may give thousands."""
    if not xs:
        raise InvalidModel("at least one input is needed")
    while len(xs) > 1:
        groups = [xs[i : i + MOST_OPERANDS] for i in range(0, len(xs), MOST_OPERANDS)]
        xs = [emit_map(b, lambda *group: reduce(function, group), *group) for group in groups]
    return xs[0]
