"""Scalar expressions: one value per output element, shared by every device.

Expressions are interned: the same expression is the same object, so `is` compares them and a fused kernel computes
a shared subexpression once. Devices print them as let-lines in `walk` order; `evaluate` runs them over NumPy.
Arithmetic on floats narrower than float32 happens in float32 and rounds once, where the result is stored or cast.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir.dtypes import BOOL, DType, compute_dtype, is_float, is_integer, limits

Scalar = float | int | bool | np.generic
_INTERNED: weakref.WeakValueDictionary[Any, Expr] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class Expr:
    """op over args with a result dtype; `value` is the index of an "arg", the scalar of a "const".

    Not constructed directly: use `arg`, `const`, `cast`, `apply` and the functions and operators below.
    """

    op: str
    args: tuple[Expr, ...]
    dtype: DType
    value: Any = None

    def __add__(self, other: Expr | Scalar) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Scalar) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Expr | Scalar) -> Expr:
        return apply("sub", self, other)

    def __rsub__(self, other: Scalar) -> Expr:
        return apply("sub", other, self)

    def __mul__(self, other: Expr | Scalar) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Scalar) -> Expr:
        return apply("mul", other, self)

    def __truediv__(self, other: Expr | Scalar) -> Expr:
        return apply("div", self, other)

    def __rtruediv__(self, other: Scalar) -> Expr:
        return apply("div", other, self)

    def __pow__(self, exponent: Expr | Scalar) -> Expr:
        return power(self, exponent)

    def __neg__(self) -> Expr:
        return apply("neg", self)

    def __abs__(self) -> Expr:
        return apply("abs", self)

    def __lt__(self, other: Expr | Scalar) -> Expr:
        return apply("lt", self, other)

    def __le__(self, other: Expr | Scalar) -> Expr:
        return apply("le", self, other)

    def __gt__(self, other: Expr | Scalar) -> Expr:
        return apply("lt", other, self)

    def __ge__(self, other: Expr | Scalar) -> Expr:
        return apply("le", other, self)

    def __and__(self, other: Expr | Scalar) -> Expr:
        return apply("and", self, other)

    def __or__(self, other: Expr | Scalar) -> Expr:
        return apply("or", self, other)

    def __xor__(self, other: Expr | Scalar) -> Expr:
        return apply("xor", self, other)

    def __invert__(self) -> Expr:
        return apply("not", self)

    def __repr__(self) -> str:
        return text(self)

    @cached_property
    def below(self) -> tuple[Expr, ...]:
        """Every distinct subexpression but itself, operands before users."""
        order: dict[Expr, None] = {}
        stack = [(child, False) for child in reversed(self.args)]
        while stack:
            node, ready = stack.pop()
            if node in order:
                continue
            if ready:
                order[node] = None
            else:
                stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.args))
        return tuple(order)


def arg(index: int, dtype: DType) -> Expr:
    """Element of the kernel's operand number `index`."""
    return _intern("arg", (), dtype, index)


def const(value: Scalar, dtype: DType) -> Expr:
    """A literal, rounded to `dtype`."""
    return _intern("const", (), dtype, np.asarray(value).astype(dtype)[()])


def cast(x: Expr, dtype: DType, *, saturate: bool = False) -> Expr:
    """x converted as ONNX Cast does; with `saturate`, clipped to the range of `dtype` first."""
    if x.dtype == dtype:
        return x
    if x.op == "const" and not saturate:
        return const(x.value, dtype)
    return _intern("cast", (x,), dtype, saturate)


def apply(op: str, *operands: Expr | Scalar) -> Expr:
    """The named operation; Python scalars take the dtype of the expression beside them."""
    dtype = next(operand.dtype for operand in reversed(operands) if isinstance(operand, Expr))
    args = tuple(x if isinstance(x, Expr) else const(x, dtype) for x in operands)
    values = args[1:] if op == "where" else args
    if any(x.dtype != values[0].dtype for x in values):
        raise TypeError(f"{op} of {', '.join(str(x.dtype) for x in values)}")
    result = BOOL if op in PREDICATES else values[0].dtype
    if all(x.op == "const" for x in args):
        value: Any = evaluate(_intern(op, args, result), [])[()]
        return const(value, result)
    return _simplified(op, args) or _intern(op, args, result)


def where(condition: Expr, yes: Expr | Scalar, no: Expr | Scalar) -> Expr:
    if not isinstance(yes, Expr):
        assert isinstance(no, Expr)
        yes = const(yes, no.dtype)
    return apply("where", condition, yes, no if isinstance(no, Expr) else const(no, yes.dtype))


def power(x: Expr, exponent: Expr | Scalar) -> Expr:
    """x ** exponent in x's dtype; small integral constants become products."""
    if isinstance(exponent, Expr) and exponent.op == "const":
        exponent = exponent.value
    if not isinstance(exponent, Expr):
        if exponent == 2:
            return x * x
        if exponent == 3:
            return x * x * x
        if exponent == 1:
            return x
        if exponent == 0.5 and is_float(x.dtype):
            return apply("sqrt", x)
        if is_float(x.dtype):
            return apply("pow", x, exponent)
        exponent = const(exponent, np.asarray(exponent).dtype)
    if exponent.dtype == x.dtype:
        return apply("pow", x, exponent)
    wide = compute_dtype(x.dtype) if is_float(x.dtype) else np.dtype(np.float64)
    if is_integer(x.dtype) and is_integer(exponent.dtype):
        return apply("pow", x, cast(exponent, x.dtype))
    return cast(apply("pow", cast(x, wide), cast(exponent, wide)), x.dtype)


def _unary(op: str) -> Callable[[Expr], Expr]:
    def function(x: Expr) -> Expr:
        return apply(op, x)

    function.__name__ = op
    return function


def _binary(op: str) -> Callable[[Expr | Scalar, Expr | Scalar], Expr]:
    def function(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
        return apply(op, a, b)

    function.__name__ = op
    return function


exp, log, sqrt, erf = _unary("exp"), _unary("log"), _unary("sqrt"), _unary("erf")
sin, cos, tan = _unary("sin"), _unary("cos"), _unary("tan")
asin, acos, atan = _unary("asin"), _unary("acos"), _unary("atan")
sinh, cosh, tanh = _unary("sinh"), _unary("cosh"), _unary("tanh")
asinh, acosh, atanh = _unary("asinh"), _unary("acosh"), _unary("atanh")
floor, ceil, round_even, sign, isnan = _unary("floor"), _unary("ceil"), _unary("round"), _unary("sign"), _unary("isnan")
equal, minimum, maximum = _binary("eq"), _binary("min"), _binary("max")
remainder, fmod = _binary("mod"), _binary("fmod")
shift_left, shift_right = _binary("shl"), _binary("shr")


def not_equal(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return ~equal(a, b)


def isinf(x: Expr) -> Expr:
    return equal(abs(x), math.inf)


def sigmoid(x: Expr) -> Expr:
    return 1 / (1 + exp(-x))


def clip(x: Expr, low: Expr | Scalar, high: Expr | Scalar) -> Expr:
    """min(max(x, low), high); NaN stays NaN."""
    return minimum(maximum(x, low), high)


PREDICATES = frozenset({"lt", "le", "eq", "isnan"})
"""Operations whose result is bool whatever their operands are."""


def _truncated_div(a: Any, b: Any) -> Any:
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    quotient = np.floor_divide(a, b)
    return quotient + ((np.remainder(a, b) != 0) & ((np.less(a, 0)) != np.less(b, 0))).astype(quotient.dtype)


def _power(a: Any, b: Any) -> Any:
    """a ** b; an integer to a negative power is truncated: 0 but for 1 and -1."""
    if b.dtype.kind != "i":
        return np.power(a, b)
    whole = np.power(a, np.maximum(b, 0))
    unit = np.where(np.equal(a, 1) | np.equal(np.bitwise_and(b, 1), 0), 1, -1)
    return np.where(np.less(b, 0), np.where(np.equal(np.abs(a), 1), unit, 0), whole).astype(whole.dtype)


def _logical(bitwise: Callable[..., Any], logical: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *x: logical(*x) if x[0].dtype == BOOL else bitwise(*x)


def _shift(function: Callable[..., Any]) -> Callable[..., Any]:
    def shifted(a: Any, b: Any) -> Any:
        bits = a.dtype.itemsize * 8
        return np.where(b >= bits, np.zeros_like(a), function(a, np.minimum(b, bits - 1)))

    return shifted


NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _truncated_div, "mod": np.remainder,
    "fmod": np.fmod, "pow": _power, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
    "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.rint, "sqrt": np.sqrt, "exp": np.exp,
    "log": np.log, "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh,
    "atanh": np.arctanh, "erf": np.vectorize(math.erf, otypes=[np.float64]), "isnan": np.isnan, "lt": np.less,
    "le": np.less_equal, "eq": np.equal, "where": np.where, "and": _logical(np.bitwise_and, np.logical_and),
    "or": _logical(np.bitwise_or, np.logical_or), "xor": _logical(np.bitwise_xor, np.logical_xor),
    "not": _logical(np.bitwise_not, np.logical_not), "shl": _shift(np.left_shift), "shr": _shift(np.right_shift),
}  # fmt: skip
"""Every operation but arg, const and cast, over arrays of the compute dtype. Integer division truncates, as a negative
integer power does; mod takes the divisor's sign; min and max propagate NaN; round is half to even."""


def walk(expr: Expr) -> Sequence[Expr]:
    """Every distinct subexpression, operands before users."""
    return (*expr.below, expr)


def text(expr: Expr) -> str:
    """Let-lines that spell the expression completely: equal texts, equal kernels."""
    names: dict[Expr, str] = {}
    lines = []
    for node in walk(expr):
        names[node] = f"t{len(names)}"
        value = "" if node.value is None else f" {node.value!r}"
        lines.append(f"{names[node]}:{node.dtype} = {node.op}{value} {' '.join(names[x] for x in node.args)}".rstrip())
    return "; ".join(lines)


def arg_count(expr: Expr) -> int:
    """One more than the highest operand index."""
    return 1 + max((node.value for node in walk(expr) if node.op == "arg"), default=-1)


def substitute(expr: Expr, replacements: Mapping[int, Expr]) -> Expr:
    """`expr` with operands replaced by expressions of the same dtype."""
    args = [node for node in walk(expr) if node.op == "arg" and node.value in replacements]
    return replace(expr, {node: replacements[node.value] for node in args})


def replace(expr: Expr, replacements: Mapping[Expr, Expr]) -> Expr:
    """`expr` with subexpressions replaced by others of the same dtype."""
    built: dict[Expr, Expr] = {}
    for node in walk(expr):
        if node in replacements:
            built[node] = replacements[node]
        elif any(built[child] is not child for child in node.args):
            args = tuple(built[child] for child in node.args)
            built[node] = cast(args[0], node.dtype, saturate=node.value) if node.op == "cast" else apply(node.op, *args)
        else:
            built[node] = node
    return built[expr]


def evaluate(expr: Expr, operands: Sequence[NDArray[Any]], xp: Any = np) -> NDArray[Any]:
    """The expression over broadcastable arrays of the module `xp`; the result has the expression's dtype."""
    values: dict[Expr, Any] = {}
    with np.errstate(all="ignore"):
        for node in walk(expr):
            wide = compute_dtype(node.dtype)
            match node.op:
                case "arg":
                    values[node] = xp.asarray(operands[node.value]).astype(wide, copy=False)
                case "const":
                    values[node] = np.asarray(node.value).astype(wide)[()]
                case "cast":
                    values[node] = convert(values[node.args[0]], node.dtype, node.value).astype(wide, copy=False)
                case op:
                    result = NUMPY[op](*(values[child] for child in node.args))
                    values[node] = result.astype(wide, copy=False)
        found: NDArray[Any] = xp.asarray(values[expr])
        return found.astype(expr.dtype, copy=False)


def convert(x: NDArray[Any], dtype: DType, saturate: bool = False) -> NDArray[Any]:
    """x as `dtype` by ONNX's Cast; with `saturate`, clipped to the finite range first.

    A float becomes an integer by truncation. What ONNX leaves open is the same everywhere: integers of less than 64
    bits take the low bits, NaN and what no int64 holds give 0; 64-bit ones give -2**63 (its bits, where unsigned).
    Saturated, NaN gives 0.
    """
    if saturate:
        return _saturated(x, dtype)
    if x.dtype.kind == "f" and dtype.kind in "iu":
        if dtype.itemsize == 8:
            return _wide_integers(x, dtype)
        x = np.nan_to_num(np.trunc(x), nan=0.0, posinf=2.0**63, neginf=-(2.0**63))
        x = np.clip(x, -(2.0**62), 2.0**62).astype(np.int64)
    return x.astype(dtype)


def _wide_integers(x: NDArray[Any], dtype: DType) -> NDArray[Any]:
    inside = np.abs(x) < 2.0**63
    result = np.where(inside, np.where(inside, x, 0).astype(np.int64), np.iinfo(np.int64).min)
    if dtype.kind == "u":
        above = (x >= 2.0**63) & (x < 2.0**64)
        result = np.where(above, (np.where(above, x, 2.0**63) - 2.0**63).astype(np.int64) ^ np.int64(-(2**63)), result)
    return result.astype(dtype)


def _saturated(x: NDArray[Any], dtype: DType) -> NDArray[Any]:
    low, high = limits(dtype)
    if is_float(dtype):
        return x.astype(dtype) if dtype.itemsize == 8 else np.clip(x, float(low), float(high)).astype(dtype)
    if x.dtype.kind in "iu" and dtype.kind in "iu":
        own = np.iinfo(x.dtype)
        clipped: NDArray[Any] = np.clip(x, x.dtype.type(max(low, own.min)), x.dtype.type(min(high, own.max)))
        return clipped.astype(dtype)
    whole = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = np.where((whole >= float(low)) & (whole < float(high)), whole, 0)
    result = _wide_integers(inside, dtype) if dtype.itemsize == 8 else inside.astype(np.int64).astype(dtype)
    result = np.where(whole >= float(high), dtype.type(high), np.where(whole < float(low), dtype.type(low), result))
    return result.astype(dtype)


def _simplified(op: str, args: tuple[Expr, ...]) -> Expr | None:
    """An operand that equals the operation bit for bit, or None."""
    match op, args:
        case "mul" | "div", (x, Expr(op="const", value=1)):
            return x
        case "mul", (Expr(op="const", value=1), x):
            return x
        case "add" | "sub", (x, Expr(op="const", value=0)) if is_integer(x.dtype):
            return x
        case "add", (Expr(op="const", value=0), x) if is_integer(x.dtype):
            return x
        case (("and" | "or"), ((x, Expr(op="const", value=bound)) | (Expr(op="const", value=bound), x))):
            return x if x.dtype == BOOL and bound == (op == "and") else None
        case "where", (Expr(op="const", value=condition), yes, no):
            return yes if condition else no
        case "not", (Expr(op="not", args=(x,)),):
            return x
    return None


def _intern(op: str, args: tuple[Expr, ...], dtype: DType, value: Any = None) -> Expr:
    exact = value.tobytes() if isinstance(value, np.generic) else value
    key = (op, tuple(map(id, args)), dtype, exact)
    found = _INTERNED.get(key)
    if found is None:
        found = Expr(op, args, dtype, value)
        _INTERNED[key] = found
    return found
