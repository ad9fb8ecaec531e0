"""Expressions as vector instructions: every operation of `ir.expr` on registers of N lanes.

Float16 and bfloat16 are stored as they are and computed in float32, bool is stored as a byte and computed as a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cpu_fallback import vector_math
from cpu_fallback.code import Code, Reg, element, literal, retyped, vector
from cpu_fallback.native import Target
from cpu_fallback.vector_math import Num, lanewise
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DType,
    compute_dtype,
    is_float,
    limits,
)
from gpu_engine.ir.expr import Expr, walk

INTEGERS = {
    INT8: "i8",
    INT16: "i16",
    INT32: "i32",
    INT64: "i64",
    UINT8: "i8",
    UINT16: "i16",
    UINT32: "i32",
    UINT64: "i64",
}
COMPUTED = {FLOAT32: "float", FLOAT64: "double", FLOAT16: "float", BFLOAT16: "float", BOOL: "i1", **INTEGERS}
STORED = {**COMPUTED, FLOAT16: "half", BFLOAT16: "i16", BOOL: "i8"}
Operation = Callable[..., Num]


def widened(code: Code, x: Reg, dtype: DType) -> Reg:
    """From the form in memory to the form for computing."""
    number = Num(code, x)
    if dtype == FLOAT16:
        return number.cast("fpext", "float").reg
    if dtype == BFLOAT16:
        return number.cast("zext", "i32").shift("shl", 16).cast("bitcast", "float").reg
    return number.test("ne", 0).reg if dtype == BOOL else x


def narrowed(code: Code, x: Reg, dtype: DType) -> Reg:
    """From the form for computing to the form in memory; floats round to nearest, ties to even."""
    number = Num(code, x)
    if dtype == FLOAT16:
        return number.cast("fptrunc", "half").reg
    if dtype == BFLOAT16:
        bits = number.cast("bitcast", "i32")
        rounded = (bits + 0x7FFF + (bits.shift("lshr", 16) & 1)).shift("lshr", 16)
        quiet = bits.shift("lshr", 16) | 0x40
        return number.test("uno", number).select(quiet, rounded).cast("trunc", "i16").reg
    return number.cast("zext", "i8").reg if dtype == BOOL else x


def write_expr(code: Code, expr: Expr, operands: Mapping[int, Reg], lanes: int) -> Reg:
    """The expression over operands in computing form; the result in computing form."""
    values: dict[Expr, Num] = {}
    for node in walk(expr):
        kind = vector(lanes, COMPUTED[node.dtype])
        if node.op == "arg":
            values[node] = Num(code, operands[node.value])
        elif node.op == "const":
            values[node] = Num(code, literal(kind, node.value.item() if node.dtype != BFLOAT16 else float(node.value)))
        elif node.op == "cast":
            values[node] = converted(values[node.args[0]], node.args[0].dtype, node.dtype, node.value)
        elif (exponent := _logistic_exponent(node)) is not None:
            values[node] = vector_math.logistic_of_negated(values[exponent])
        elif (divisor := _known_divisor(node)) is not None:
            values[node] = vector_math.divided(values[node.args[0]], divisor)
        else:
            operation = find_operation(node.op, node.args[-1].dtype)
            assert operation is not None
            values[node] = operation(*(values[child] for child in node.args))
    return values[expr].reg


def _known_divisor(node: Expr) -> float | None:
    """What a float32 is divided by, if multiplying does the same in less time."""
    if node.op != "div" or node.dtype != FLOAT32 or node.args[1].op != "const":
        return None
    divisor = float(node.args[1].value)
    return divisor if 2.0**-60 <= abs(divisor) <= 2.0**60 else None


def _logistic_exponent(node: Expr) -> Expr | None:
    """x of 1 / (1 + exp(x)) in float32: together these need no denormal numbers, so that scaling is cheap."""
    if node.op != "div" or compute_dtype(node.dtype) != FLOAT32:
        return None
    one, total = node.args
    parts = [part for part in total.args if part.op == "exp"] if total.op == "add" else []
    ones = [one, *(part for part in total.args if part not in parts)]
    if len(parts) != 1 or not all(part.op == "const" and part.value == 1 for part in ones):
        return None
    return parts[0].args[0]


def is_supported(expr: Expr, target: Target) -> bool:
    """Whether every operation of the expression has a vector form."""
    return all(_node_supported(node, target) for node in walk(expr))


def _node_supported(node: Expr, target: Target) -> bool:
    if node.dtype not in COMPUTED or (node.dtype == FLOAT16 and not target.halves):
        return False
    if node.op in ("arg", "const"):
        return True
    source = node.args[-1].dtype
    if node.op == "cast":
        if node.value and (source == BOOL or node.dtype not in INTEGERS):
            return False
        return source in COMPUTED and (source, node.dtype) != (FLOAT64, FLOAT16)
    return source in COMPUTED and find_operation(node.op, source) is not None


def find_operation(op: str, dtype: DType) -> Operation | None:
    """The vector form of an operation on operands of `dtype`; None if there is none."""
    if op == "where":
        return lambda condition, yes, no: condition.select(yes, no)
    if dtype == BOOL:
        return BITS.get(op)
    if is_float(dtype):
        wide = compute_dtype(dtype)
        return FLOATS.get(op) or (FLOATS64 if wide == FLOAT64 else FLOATS32).get(op)
    return WHOLE.get(op) or (SIGNED if dtype.kind == "i" else UNSIGNED).get(op)


def _binary(op: str) -> Operation:
    return lambda a, b: Num(a.code, a.code.binary(op, a.reg, b.reg))


def _test(condition: str) -> Operation:
    return lambda a, b: a.test(condition, b)


def _intrinsic(name: str) -> Operation:
    return lambda *args: args[0].intrinsic(name, *args[1:])


def _library(name: str) -> Operation:
    return lambda *args: Num(args[0].code, lanewise(args[0].code, name, *(x.reg for x in args)))


def _maximum(a: Num, b: Num) -> Num:
    return _extreme("ogt", a, b)


def _minimum(a: Num, b: Num) -> Num:
    return _extreme("olt", a, b)


def _extreme(condition: str, a: Num, b: Num) -> Num:
    """NaN if either is: a comparison that fails takes its second operand, so a constant goes first."""
    if b.reg.name.startswith("splat"):
        a, b = b, a
    chosen = a.test(condition, b).select(a, b)
    return chosen if a.reg.name.startswith("splat") else a.test("uno", a).select(a, chosen)


def _float_sign(x: Num) -> Num:
    positive = x.test("ogt", 0.0).select(Num(x.code, literal(x.kind, 1.0)), x)
    signed = x.test("olt", 0.0).select(-1.0, positive)
    return x.test("oeq", 0.0).select(0.0, signed)


def _float_remainder(a: Num, b: Num, *, library: str) -> Num:
    """a modulo b with the sign of b, as Python's and NumPy's."""
    rest = _library(library)(a, b)
    zero = Num(a.code, literal(a.kind, 0.0))
    differs = rest.test("olt", 0.0) ^ b.test("olt", 0.0)
    moved = differs.select(rest + b, rest)
    return rest.test("oeq", 0.0).select(zero.signed_as(b), moved)


def _divided(op: str, a: Num, b: Num, *, signed: bool) -> Num:
    """Truncated quotient or remainder that never traps: 0 for a zero divisor, and MIN / -1 wraps."""
    zero, one = b.test("eq", 0), Num(b.code, literal(b.kind, 1))
    unsafe = zero | b.test("eq", -1) if signed else zero
    result = Num(a.code, a.code.binary(op, a.reg, unsafe.select(one, b).reg))
    if signed:
        special = (Num(a.code, literal(a.kind, 0)) - a) if op == "sdiv" else Num(a.code, literal(a.kind, 0))
        result = b.test("eq", -1).select(special, result)
    return zero.select(0, result)


def _small_quotient(a: Num, b: Num, *, signed: bool) -> Num:
    """The truncated quotient of integers of at most 32 bits, exact through float64."""
    wide = "double" if element(a.kind) == "i32" else "float"
    to_float, to_whole = ("sitofp", "fptosi") if signed else ("uitofp", "fptoui")
    zero = b.test("eq", 0)
    divisor = zero.select(1, b).cast(to_float, wide)
    quotient = a.cast(to_float, wide) / divisor
    between = "i64" if wide == "double" else "i32"
    whole = quotient.cast(to_whole, between).cast("trunc", element(a.kind))
    return zero.select(0, whole)


def _quotient(a: Num, b: Num, *, signed: bool) -> Num:
    if element(a.kind) == "i64":
        return _divided("sdiv" if signed else "udiv", a, b, signed=signed)
    return _small_quotient(a, b, signed=signed)


def _c_remainder(a: Num, b: Num, *, signed: bool) -> Num:
    """The remainder with the sign of a; 0 for a zero divisor."""
    if element(a.kind) == "i64":
        return _divided("srem" if signed else "urem", a, b, signed=signed)
    rest = a - _small_quotient(a, b, signed=signed) * b
    return b.test("eq", 0).select(0, rest)


def _floor_remainder(a: Num, b: Num) -> Num:
    """The remainder with the sign of b."""
    rest = _c_remainder(a, b, signed=True)
    differs = rest.test("ne", 0) & (rest ^ b).test("slt", 0)
    return differs.select(rest + b, rest)


def _signed_sign(x: Num) -> Num:
    return x.test("sgt", 0).cast("zext", element(x.kind)) - x.test("slt", 0).cast("zext", element(x.kind))


def _signed_abs(x: Num) -> Num:
    return x.test("slt", 0).select(Num(x.code, literal(x.kind, 0)) - x, x)


def _shifted(op: str, a: Num, b: Num) -> Num:
    """0 if all bits leave."""
    bits = int(element(a.kind)[1:])
    fits = b.test("ult", bits)
    amount = fits.select(b, 0)
    return fits.select(Num(a.code, a.code.binary(op, a.reg, amount.reg)), 0)


def _negated(x: Num) -> Num:
    return Num(x.code, literal(x.kind, 0)) - x


def _float_negated(x: Num) -> Num:
    return Num(x.code, x.code.let(x.kind, f"fneg {x.reg}"))


LOGIC: dict[str, Operation] = {
    "and": _binary("and"), "or": _binary("or"), "xor": _binary("xor"), "not": lambda x: x ^ -1,
}  # fmt: skip
BITS: dict[str, Operation] = {
    **LOGIC,
    "eq": _test("eq"), "lt": _test("ult"), "le": _test("ule"), "min": _binary("and"), "max": _binary("or"),
}  # fmt: skip
WHOLE: dict[str, Operation] = {
    **LOGIC,
    "add": _binary("add"), "sub": _binary("sub"), "mul": _binary("mul"), "neg": _negated, "eq": _test("eq"),
    "shl": partial(_shifted, "shl"),
}  # fmt: skip
SIGNED: dict[str, Operation] = {
    "div": partial(_quotient, signed=True), "mod": _floor_remainder, "fmod": partial(_c_remainder, signed=True),
    "lt": _test("slt"), "le": _test("sle"), "min": _intrinsic("smin"), "max": _intrinsic("smax"), "abs": _signed_abs,
    "sign": _signed_sign, "shr": partial(_shifted, "ashr"),
}  # fmt: skip
UNSIGNED: dict[str, Operation] = {
    "div": partial(_quotient, signed=False), "mod": partial(_c_remainder, signed=False),
    "fmod": partial(_c_remainder, signed=False), "lt": _test("ult"), "le": _test("ule"), "min": _intrinsic("umin"),
    "max": _intrinsic("umax"), "abs": lambda x: x, "sign": lambda x: x.test("ne", 0).cast("zext", element(x.kind)),
    "shr": partial(_shifted, "lshr"),
}  # fmt: skip
FLOATS: dict[str, Operation] = {
    "add": _binary("fadd"), "sub": _binary("fsub"), "mul": _binary("fmul"), "div": _binary("fdiv"),
    "min": _minimum, "max": _maximum, "neg": _float_negated, "abs": _intrinsic("fabs"), "sign": _float_sign,
    "floor": _intrinsic("floor"), "ceil": _intrinsic("ceil"), "round": _intrinsic("rint"), "sqrt": _intrinsic("sqrt"),
    "isnan": lambda x: x.test("uno", x), "lt": _test("olt"), "le": _test("ole"), "eq": _test("oeq"),
}  # fmt: skip
LIBRARY_NAMES = ("tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "fmod")
FLOATS32: dict[str, Operation] = {
    "exp": vector_math.exp, "log": vector_math.log, "tanh": vector_math.tanh, "erf": vector_math.erf,
    "sin": vector_math.sin, "cos": vector_math.cos, "pow": vector_math.pow32,
    "mod": partial(_float_remainder, library="fmodf"), **{name: _library(name + "f") for name in LIBRARY_NAMES},
}  # fmt: skip
FLOATS64: dict[str, Operation] = {
    "mod": partial(_float_remainder, library="fmod"),
    **{name: _library(name) for name in (*LIBRARY_NAMES, "exp", "log", "tanh", "erf", "sin", "cos", "pow")},
}  # fmt: skip


def converted(x: Num, source: DType, target: DType, saturate: Any) -> Num:
    """x as `expr.convert` converts it, in computing form."""
    if is_float(source):
        if is_float(target):
            return _to_float(x, target)
        return _saturated(x, target) if saturate else _truncated(x, target)
    if is_float(target):
        op = "uitofp" if source == BOOL or source.kind == "u" else "sitofp"
        return _to_float(x.cast(op, COMPUTED[compute_dtype(target)]), target)
    if target == BOOL:
        return x if source == BOOL else x.test("ne", 0)
    if saturate:
        x = _integer_clipped(x, source, target)
    return _resized(x, COMPUTED[target], signed=source.kind == "i")


def _to_float(x: Num, target: DType) -> Num:
    scalar = COMPUTED[compute_dtype(target)]
    if element(x.kind) != scalar:
        x = x.cast("fptrunc" if scalar == "float" else "fpext", scalar)
    if target in (FLOAT16, BFLOAT16):
        return Num(x.code, widened(x.code, narrowed(x.code, x.reg, target), target))
    return x


def _resized(x: Num, scalar: str, *, signed: bool) -> Num:
    before, after = (int(kind[1:]) for kind in (element(x.kind), scalar))
    if before == after:
        return x
    return x.cast("trunc" if after < before else "sext" if signed and before > 1 else "zext", scalar)


def _integer_clipped(x: Num, source: DType, target: DType) -> Num:
    (low, high), (least, greatest) = limits(source), limits(target)
    prefix = "s" if source.kind == "i" else "u"
    return x.intrinsic(f"{prefix}max", max(low, least)).intrinsic(f"{prefix}min", min(high, greatest))


def _saturated(x: Num, target: DType) -> Num:
    """NaN becomes 0. Bounds of at most 16 bits are floats, so that clipping first is exact, and fast."""
    if target.itemsize <= 2:
        low, high = (float(bound) for bound in limits(target))
        number = x.test("olt", low).select(low, x)
        number = number.test("ogt", high).select(high, number)
        number = x.test("uno", x).select(0.0, number)
        return number.cast("fptosi", "i32").cast("trunc", COMPUTED[target])
    name = "fptosi" if target.kind == "i" else "fptoui"
    kind = retyped(x.kind, COMPUTED[target])
    full = f"llvm.{name}.sat.{vector_math.mangled(kind)}.{vector_math.mangled(x.kind)}"
    return Num(x.code, x.code.call(kind, full, x.reg))


def _truncated(x: Num, target: DType) -> Num:
    """Toward zero; what does not fit wraps through 64 bits as `expr.convert` says."""
    if target == BOOL:
        return x.test("une", 0.0)
    if target.itemsize < 8:
        number = x.test("uno", x).select(0.0, x)
        number = number.test("olt", -(2.0**62)).select(-(2.0**62), number)
        number = number.test("ogt", 2.0**62).select(2.0**62, number)
        return number.cast("fptosi", "i64").cast("trunc", COMPUTED[target])
    inside = x.abs().test("olt", 2.0**63)
    whole = inside.select(x, 0.0).cast("fptosi", "i64")
    if target.kind == "u":
        above = x.test("oge", 2.0**63) & x.test("olt", 2.0**64)
        high = above.select(x - 2.0**63, 0.0).cast("fptosi", "i64") ^ -(2**63)
        whole = above.select(high, whole)
        inside = inside | above
    return inside.select(whole, -(2**63))
