"""Scalar expressions as lines of a Triton kernel.

Between loads and stores values are in computing form: narrow floats as float32, bools as int1, everything else as in
memory. What ir.expr says about rounding, NaN, division by zero and conversion holds here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpu_engine.gpu.float8 import FLOAT8, decoded, encoded, rounded
from gpu_engine.gpu.kernel import TRITON_TYPES, language_dtype
from gpu_engine.ir.dtypes import BOOL, FLOAT32, FLOAT64, INT64, UINT64, DType, compute_dtype, is_float, limits
from gpu_engine.ir.expr import Expr, walk

NAN = "propagate_nan=tl.PropagateNan.ALL"
PRINTED_FLOATS = ("fp32", "fp16", "bf16", "fp64")


def is_printable(root: Expr) -> bool:
    """Whether kernels can compute the expression."""
    return all(_has_form(node) for node in walk(root))


def is_printable_dtype(dtype: DType) -> bool:
    """Whether kernels compute with elements of `dtype`."""
    kind = TRITON_TYPES.get(dtype)
    return kind is not None and (not is_float(dtype) or kind in PRINTED_FLOATS)


def _has_form(node: Expr) -> bool:
    if not is_printable_dtype(node.dtype) and node.dtype not in FLOAT8:
        return False
    if node.op in ("arg", "const", "cast"):
        return True
    operands = node.args[-1].dtype
    if node.op in _LIBRARY or node.op in ("exp", "erf", "sqrt"):
        return is_float(operands)
    return node.op in _FORMS and not (node.op == "pow" and not is_float(operands))


def computing(dtype: DType) -> str:
    """The element type of computing form: "tl.float32"."""
    return "tl.int1" if dtype == BOOL else language_dtype(compute_dtype(dtype))


def loaded(text: str, dtype: DType) -> str:
    """What a load of memory gives, in computing form; a name where it is a float8."""
    if dtype == BOOL:
        return f"{text} != 0"
    if dtype in FLOAT8:
        return f"({decoded(text, dtype)}).to(tl.float32)"
    return text if compute_dtype(dtype) == dtype else f"{text}.to({computing(dtype)})"


def stored(text: str, dtype: DType) -> str:
    """A value in computing form as memory holds it."""
    if dtype in FLOAT8:
        return encoded(text, dtype)
    return f"{text}.to({language_dtype(dtype)})" if dtype == BOOL or compute_dtype(dtype) != dtype else text


def literal(value: Any, dtype: DType) -> str:
    """A scalar in computing form."""
    if dtype == BOOL:
        return f"tl.full([], {int(bool(value))}, tl.int1)"
    if not is_float(dtype):
        return f"tl.full([], {int(value)}, {computing(dtype)})"
    number = float(value)
    text = repr(number) if math.isfinite(number) else f'float("{number}")'
    return f"tl.full([], {text}, {computing(dtype)})"


def print_expr(root: Expr, operands: Mapping[int, str], prefix: str = "t") -> tuple[list[str], str]:
    """(let-lines, the name of the result): `operands` are names of the arguments in computing form; names of the
    lines start with `prefix`. The expression must be printable."""
    names: dict[Expr, str] = {}
    lines: list[str] = []
    for node in walk(root):
        if node.op == "arg":
            names[node] = operands[node.value]
            continue
        args = [names[child] for child in node.args]
        if node.op == "const":
            text = literal(node.value, node.dtype)
        elif node.op == "cast":
            text = _converted(args[0], node.args[0].dtype, node.dtype, bool(node.value))
        elif node.op in _LIBRARY:
            text = f"libdevice.{_LIBRARY[node.op]}({', '.join(args)})"
        else:
            text = _FORMS[node.op](node.args[-1].dtype, *args)
        names[node] = f"{prefix}{len(lines)}"
        lines.append(f"{names[node]} = {text}")
    return lines, names[root]


def _converted(x: str, source: DType, target: DType, saturate: bool) -> str:
    if saturate:
        return _saturated(x, source, target)
    if target == BOOL:
        return f"{x} != 0"
    if source == BOOL:
        return f"{x}.to({computing(target)})"
    if is_float(source) and not is_float(target):
        return _truncated(x, target)
    if is_float(target) and compute_dtype(target) != target:
        wide = x if compute_dtype(source) == FLOAT32 and is_float(source) else f"{x}.to(tl.float32)"
        if target in FLOAT8:
            return rounded(wide, target, saturate=False)
        return f"{wide}.to({language_dtype(target)}).to(tl.float32)"
    return x if compute_dtype(source) == compute_dtype(target) else f"{x}.to({computing(target)})"


def _truncated(x: str, target: DType) -> str:
    """A float to an integer as ir.expr.convert has it: through int64, where what it does not hold is 0 or -2**63."""
    inside = f"(tl.abs({x}) < {2.0**63!r})"
    whole = f"tl.where({inside}, {x}, 0.0).to(tl.int64)"
    if target == INT64:
        return f"tl.where({inside}, {whole}, {-(2**63)})"
    if target != UINT64:
        return f"{whole}.to({computing(target)})"
    above = f"(({x} >= {2.0**63!r}) & ({x} < {2.0**64!r}))"
    high = f"(tl.where({above}, {x}, {2.0**63!r}) - {2.0**63!r}).to(tl.int64) ^ {-(2**63)}"
    return f"tl.where({above}, {high}, tl.where({inside}, {whole}, {-(2**63)})).to(tl.uint64)"


def _saturated(x: str, source: DType, target: DType) -> str:
    """Clipped to the range of `target` first; NaN gives 0 where that is an integer."""
    low, high = limits(target)
    if is_float(target):
        if target.itemsize == 8:
            return f"{x}.to(tl.float64)"
        wide = x if compute_dtype(source) == FLOAT32 else f"{x}.to(tl.float32)"
        if target in FLOAT8:
            return rounded(wide, target, saturate=True)
        clipped = f"tl.clamp({wide}, {float(low)!r}, {float(high)!r}, {NAN})"
        return clipped if target == FLOAT32 else f"{clipped}.to({language_dtype(target)}).to(tl.float32)"
    if not is_float(source):
        if source == BOOL:
            return f"{x}.to({computing(target)})"
        own = np.iinfo(source)
        bounds = (max(int(low), int(own.min)), min(int(high), int(own.max)))
        return f"tl.minimum(tl.maximum({x}, {bounds[0]}), {bounds[1]}).to({computing(target)})"
    inside = f"(({x} > {float(low) - 1!r}) & ({x} < {float(high) + 1!r}))"
    if target.itemsize == 8 or (target.itemsize == 4 and compute_dtype(source) == FLOAT32):
        inside = f"(({x} >= {float(low)!r}) & ({x} < {float(int(high) + 1)!r}))"
    whole = _truncated(f"tl.where({inside}, {x}, 0.0)", target)
    below = f"tl.where({x} <= {float(low)!r}, {literal(low, target)}, {literal(0, target)})"
    return f"tl.where({inside}, {whole}, tl.where({x} >= {float(high)!r}, {literal(high, target)}, {below}))"


def _binary(symbol: str) -> Callable[..., str]:
    return lambda dtype, a, b: f"{a} {symbol} {b}"


def _divided(dtype: DType, a: str, b: str) -> str:
    if is_float(dtype):
        return f"{a} / {b}" if dtype == FLOAT64 else f"tl.div_rn({a}, {b})"
    return f"tl.where({b} == 0, 0, {a} // {_nonzero(b, dtype)}).to({computing(dtype)})"


def _modulo(dtype: DType, a: str, b: str) -> str:
    """With the divisor's sign."""
    if is_float(dtype):
        rest = f"libdevice.fmod({a}, {b})"
        wrong = f"({rest} != 0) & (({rest} < 0) != ({b} < 0))"
        return f"tl.where({wrong}, {rest} + {b}, {rest})"
    rest = f"({a} % {_nonzero(b, dtype)})"
    if dtype.kind != "u":
        rest = f"tl.where(({rest} != 0) & (({rest} < 0) != ({b} < 0)), {rest} + {b}, {rest})"
    return f"tl.where({b} == 0, 0, {rest}).to({computing(dtype)})"


def _remainder(dtype: DType, a: str, b: str) -> str:
    """With the dividend's sign."""
    if is_float(dtype):
        return f"libdevice.fmod({a}, {b})"
    return f"tl.where({b} == 0, 0, {a} % {_nonzero(b, dtype)}).to({computing(dtype)})"


def _nonzero(x: str, dtype: DType) -> str:
    return f"tl.where({x} == 0, 1, {x}).to({computing(dtype)})"


def _bounded(function: str) -> Callable[..., str]:
    def form(dtype: DType, a: str, b: str) -> str:
        if dtype == BOOL:
            return f"{a} {'&' if function == 'minimum' else '|'} {b}"
        return f"tl.{function}({a}, {b}, {NAN})" if is_float(dtype) else f"tl.{function}({a}, {b})"

    return form


def _sign(dtype: DType, x: str) -> str:
    if is_float(dtype):
        return f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, tl.where({x} == 0, 0.0, {x})))"
    return f"tl.where({x} > 0, 1, tl.where({x} < 0, -1, 0)).to({computing(dtype)})"


def _all_ones(dtype: DType) -> int:
    return -1 if dtype.kind == "i" else (1 << (8 * dtype.itemsize)) - 1


def _square_root(dtype: DType, x: str) -> str:
    return f"tl.sqrt({x})" if dtype == FLOAT64 else f"tl.sqrt_rn({x})"


def _shifted(symbol: str) -> Callable[..., str]:
    def form(dtype: DType, a: str, b: str) -> str:
        bits = dtype.itemsize * 8
        bounded = f"tl.minimum({b}, {bits - 1}).to({computing(dtype)})"
        return f"tl.where({b} >= {bits}, 0, {a} {symbol} {bounded}).to({computing(dtype)})"

    return form


_LIBRARY = {
    "log": "log", "sin": "sin", "cos": "cos", "tan": "tan", "asin": "asin", "acos": "acos", "atan": "atan",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "asinh": "asinh", "acosh": "acosh", "atanh": "atanh",
    "round": "rint",
}  # fmt: skip
_FORMS: dict[str, Callable[..., str]] = {
    "add": _binary("+"), "sub": _binary("-"), "mul": _binary("*"), "div": _divided, "mod": _modulo,
    "fmod": _remainder, "min": _bounded("minimum"), "max": _bounded("maximum"),
    "pow": lambda dtype, a, b: f"libdevice.pow({a}, {b})",
    "neg": lambda dtype, x: f"-{x}", "abs": lambda dtype, x: x if dtype.kind == "u" else f"tl.abs({x})",
    "sign": _sign, "floor": lambda dtype, x: f"tl.floor({x})" if is_float(dtype) else x,
    "ceil": lambda dtype, x: f"tl.ceil({x})" if is_float(dtype) else x,
    "sqrt": _square_root, "exp": lambda dtype, x: f"tl.exp({x})", "erf": lambda dtype, x: f"tl.erf({x})",
    "isnan": lambda dtype, x: f"{x} != {x}", "lt": _binary("<"), "le": _binary("<="), "eq": _binary("=="),
    "where": lambda dtype, condition, yes, no: f"tl.where({condition}, {yes}, {no})",
    "and": _binary("&"), "or": _binary("|"), "xor": _binary("^"),
    "not": lambda dtype, x: f"{x} == 0" if dtype == BOOL else f"{x} ^ {literal(_all_ones(dtype), dtype)}",
    "shl": _shifted("<<"), "shr": _shifted(">>"),
}  # fmt: skip
"""form(dtype of the operands, names of the operands); integer division truncates and gives 0 where the divisor is."""
