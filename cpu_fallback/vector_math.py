"""Elementary functions on vectors: polynomials for float32, the C library lane by lane for the rest.

Coefficients are Chebyshev interpolants, or weighted fits, made in float64 at import. Bounds against float64, special
values and denormals included, which tests/test_vector_math.py holds: exp 1 ulp, log 1, tanh 3, erf 2, sin and cos 2,
pow 1. Float32 pow works in float64 inside. Sine and cosine of arguments beyond `SINE_END` go to the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_fallback.code import Code, Reg, element, i64, lane_count, literal, retyped


@dataclass(frozen=True, slots=True)
class Num:
    """A register with arithmetic: `a * b + 1` writes the instructions. Python numbers become literals."""

    code: Code
    reg: Reg

    @property
    def kind(self) -> str:
        return self.reg.type

    def _with(self, op: str, other: Num | float) -> Num:
        prefix = "f" if element(self.kind) in ("float", "double") else ""
        return Num(self.code, self.code.binary(prefix + op, self.reg, self.same(other)))

    def same(self, other: Num | float) -> Reg:
        return other.reg if isinstance(other, Num) else literal(self.kind, other)

    def __add__(self, other: Num | float) -> Num:
        return self._with("add", other)

    def __sub__(self, other: Num | float) -> Num:
        return self._with("sub", other)

    def __mul__(self, other: Num | float) -> Num:
        return self._with("mul", other)

    def __truediv__(self, other: Num | float) -> Num:
        return self._with("div", other)

    def __and__(self, other: Num | int) -> Num:
        return Num(self.code, self.code.binary("and", self.reg, self.same(other)))

    def __or__(self, other: Num | int) -> Num:
        return Num(self.code, self.code.binary("or", self.reg, self.same(other)))

    def __xor__(self, other: Num | int) -> Num:
        return Num(self.code, self.code.binary("xor", self.reg, self.same(other)))

    def shift(self, op: str, count: int) -> Num:
        """`op` is shl, lshr or ashr."""
        return Num(self.code, self.code.binary(op, self.reg, literal(self.kind, count)))

    def test(self, condition: str, other: Num | float) -> Num:
        """`condition` as in fcmp and icmp."""
        compare = "fcmp" if element(self.kind) in ("float", "double") else "icmp"
        return Num(self.code, self.code.compare(f"{compare} {condition}", self.reg, self.same(other)))

    def select(self, yes: Num | float, no: Num | float) -> Num:
        """Of a condition: yes where it holds. One of the two must be a Num."""
        pattern = yes if isinstance(yes, Num) else no
        assert isinstance(pattern, Num)
        return Num(self.code, self.code.select(self.reg, pattern.same(yes), pattern.same(no)))

    def cast(self, op: str, scalar: str) -> Num:
        return Num(self.code, self.code.convert(op, self.reg, retyped(self.kind, scalar)))

    def fma(self, factor: Num | float, addend: Num | float) -> Num:
        """self * factor + addend, rounded once."""
        return self.intrinsic("fma", factor, addend)

    def intrinsic(self, name: str, *others: Num | float) -> Num:
        full = f"llvm.{name}.{mangled(self.kind)}"
        return Num(self.code, self.code.call(self.kind, full, self.reg, *map(self.same, others)))

    def abs(self) -> Num:
        return self.intrinsic("fabs")

    def signed_as(self, other: Num) -> Num:
        return self.intrinsic("copysign", other)

    def horner(self, coefficients: Sequence[float]) -> Num:
        """The polynomial with these coefficients, the constant first."""
        result = Num(self.code, literal(self.kind, coefficients[-1]))
        for coefficient in coefficients[-2::-1]:
            result = result.fma(self, coefficient)
        return result


def mangled(kind: str) -> str:
    """The suffix of an overloaded intrinsic."""
    name = {"float": "f32", "double": "f64", "half": "f16"}.get(element(kind), element(kind))
    return f"v{lane_count(kind)}{name}" if kind.startswith("<") else name


def fitted(
    function: Callable[[float], float],
    low: float,
    high: float,
    degree: int,
    weight: Callable[[float], float] | None = None,
) -> list[float]:
    """Monomial coefficients, the constant first, of the Chebyshev interpolant of `function` on [low, high].

    With a weight, of the polynomial whose weighted error at many more Chebyshev points is least.
    """
    half, middle = (high - low) / 2, (high + low) / 2
    if weight is None:
        series = np.polynomial.chebyshev.chebinterpolate(
            np.vectorize(lambda t: function(half * t + middle), otypes=[float]), degree
        )
    else:
        nodes = np.polynomial.chebyshev.chebpts1(8 * degree)
        places = [float(half * t + middle) for t in nodes]
        series = np.polynomial.chebyshev.chebfit(nodes, [*map(function, places)], degree, w=[*map(weight, places)])
    scaled = np.polynomial.Polynomial(np.polynomial.chebyshev.cheb2poly(series))
    shifted: Any = scaled(np.polynomial.Polynomial([-middle / half, 1 / half]))
    return [float(c) for c in shifted.coef]


LN2 = math.log(2)
LN2_HIGH, LN2_LOW = 0.693359375, LN2 - 0.693359375
HALF_PI = (1.5707963705062866, -4.371138828673793e-08, -1.7151245100058e-15)
ROUNDER = 1.5 * 2**23  # adding it leaves the nearest integer in the low bits of a float32
ROUNDER_BITS = 0x4B400000
EXPONENT_ROUNDER = ROUNDER + 127  # n more in the low bits, shifted by 23, are those of 2.0**n
SINE_END = 48000.0  # n * HALF_PI[0] stays exact below
LOG_SPLIT = 0x3F2AAAAB  # 2/3: the significand lies in [2/3, 4/3)


def _series(function: Callable[[float], float], at_zero: float) -> Callable[[float], float]:
    return lambda x: function(x) if abs(x) > 1e-3 else at_zero


def _log1p_rest(x: float) -> float:
    return -0.5 + x / 3 - x * x / 4 if abs(x) < 1e-4 else (math.log1p(x) - x) / (x * x)


def _expm1_rest(x: float) -> float:
    return 0.5 + x / 6 + x * x / 24 if abs(x) < 1e-4 else (math.expm1(x) - x) / (x * x)


def _log2_erfc(x: float) -> float:
    """log2(1 - erf(x)) / x."""
    return math.log2(math.erfc(x)) / x


def _log2_erfc_weight(x: float) -> float:
    """How much more `_log2_erfc` shows in erf(x), relatively."""
    return x * math.erfc(x) / math.erf(x)


def _exp2m1(r: float) -> float:
    """(2**r - 1) / r."""
    return math.expm1(r * LN2) / r if r else LN2


def _sine_rest(s: float) -> float:
    root = math.sqrt(abs(s))
    return (math.sin(root) / root - 1) / s if root > 1e-2 else -1 / 6 + s / 120 - s * s / 5040


def _cosine_rest(s: float) -> float:
    root = math.sqrt(abs(s))
    return (math.cos(root) - 1 + s / 2) / (s * s) if root > 5e-2 else 1 / 24 - s / 720 + s * s / 40320


EXPM1 = fitted(_expm1_rest, -LN2 / 2, LN2 / 2, 5)
SHORT_EXPM1 = fitted(_expm1_rest, -LN2 / 2, LN2 / 2, 4)
"""For a sum with 1 whose reciprocal is rounded too."""
LOG1P = fitted(_log1p_rest, -1 / 3, 1 / 3, 8)
EXP2M1 = fitted(_exp2m1, -0.5, 0.5, 5)
ERF_END = 3.92
"""From here on erf rounds to 1."""
LOG2_ERFC = fitted(_log2_erfc, 0.0, ERF_END, 8, _log2_erfc_weight)
SINE = fitted(_sine_rest, 0.0, (math.pi / 4) ** 2, 3)
COSINE = fitted(_cosine_rest, 0.0, (math.pi / 4) ** 2, 3)
LOG2_SERIES = [2 / LN2 / (2 * k + 1) for k in range(9)]
EXP2 = fitted(lambda t: 2.0**t, -0.5, 0.5, 9)


def exp(x: Num) -> Num:
    below = x.test("olt", -104.0).select(-104.0, x)
    return _exp_core(below.test("ogt", 89.0).select(89.0, below))


def exp_of_negative(x: Num) -> Num:
    """exp where x is at most 1; results below the least normal number are 0."""
    return exp2_of_negative(x, 1 / LN2)


def exp2_of_negative(x: Num, factor: float) -> Num:
    """2**(factor x) with a positive factor where that is at most 1; 0 below the least normal number, NaN of NaN.

    Two ulp off, and as much more as rounding the factor to float32 moves the exponent.
    """
    least = -127 / factor
    x = x.test("olt", least).select(least, x)
    shifted = x.fma(factor, EXPONENT_ROUNDER)
    r = x.fma(factor, Num(x.code, literal(x.kind, EXPONENT_ROUNDER)) - shifted)
    power = _shifted_power(shifted)
    return (r * r.horner(EXP2M1)).fma(power, power)


def _shifted_power(shifted: Num) -> Num:
    """2**n of n + EXPONENT_ROUNDER; 0 if n is -127."""
    return shifted.cast("bitcast", "i32").shift("shl", 23).cast("bitcast", "float")


def _reduced(x: Num) -> tuple[Num, Num]:
    """(n, expm1(r)) with x = n ln 2 + r, n as int32."""
    shifted = x.fma(1 / LN2, ROUNDER)
    n = shifted - ROUNDER
    r = n.fma(-LN2_LOW, n.fma(-LN2_HIGH, x))
    return shifted.cast("bitcast", "i32") - ROUNDER_BITS, (r * r).fma(r.horner(EXPM1), r)


def _power_of_two(n: Num) -> Num:
    return (n + 127).shift("shl", 23).cast("bitcast", "float")


def _exp_core(x: Num) -> Num:
    """exp on [-104, 89]; scaled in two steps so that denormal results come out."""
    n, p = _reduced(x)
    half = n.shift("ashr", 1)
    first, second = _power_of_two(half), _power_of_two(n - half)
    return p.fma(first, first) * second


def divided(x: Num, divisor: float) -> Num:
    """x / divisor in float32, rounded as a division is but where the quotient is denormal; 2**-60 to 2**60 in size.

    P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", theorem 8.5: the product
    with a correctly rounded reciprocal, corrected once. A rest that is no number is that of an infinite quotient.
    """
    reciprocal = float(np.float32(1) / np.float32(divisor))
    quotient = x * reciprocal
    if math.frexp(divisor)[0] in (0.5, -0.5):
        return quotient
    rest = quotient.fma(-divisor, x)
    return rest.test("uno", rest).select(quotient, rest.fma(reciprocal, quotient))


def logistic_of_negated(x: Num) -> Num:
    """1 / (1 + exp(x)); exp(88) where that is more: no result is below the least normal number by much."""
    above = x.test("olt", -87.0).select(-87.0, x)
    x = above.test("ogt", 88.0).select(88.0, above)
    shifted = x.fma(1 / LN2, EXPONENT_ROUNDER)
    n = shifted - EXPONENT_ROUNDER
    r = n.fma(-LN2_LOW, n.fma(-LN2_HIGH, x))
    grown = r.horner((1.0, 1.0, *SHORT_EXPM1)).fma(_shifted_power(shifted), 1.0)
    return Num(x.code, literal(x.kind, 1.0)) / grown


def log(x: Num) -> Num:
    tiny = x.test("olt", 1.1754943508222875e-38)
    scaled = tiny.select(x * 2.0**23, x)
    bits = scaled.cast("bitcast", "i32")
    e = (bits - LOG_SPLIT).shift("ashr", 23)
    f = (bits - e.shift("shl", 23)).cast("bitcast", "float") - 1.0
    exponent = e.cast("sitofp", "float") + tiny.select(Num(x.code, literal(x.kind, -23.0)), 0.0)
    rest = exponent.fma(LN2_LOW, (f * f) * f.horner(LOG1P))
    result = exponent.fma(LN2_HIGH, f + rest)
    result = x.test("oeq", math.inf).select(x, result)
    result = x.test("oeq", 0.0).select(-math.inf, result)
    return x.test("ult", 0.0).select(math.nan, result)


def tanh(x: Num) -> Num:
    size = x.abs()
    size = size.test("ogt", 10.0).select(10.0, size)
    n, p = _reduced(size + size)
    scale = _power_of_two(n)
    grown = p.fma(scale, scale - 1.0)
    return (grown / (grown + 2.0)).signed_as(x)


def erf(x: Num) -> Num:
    """1 - 2**t with t = log2(erfc(|x|)): as 2**n - 1 is exact, 1 - 2**n - 2**n expm1 is precise near 0 too."""
    bits = x.cast("bitcast", "i32")
    sign = bits & -(2**31)
    size = (bits ^ sign).cast("bitcast", "float")
    size = size.test("ogt", ERF_END).select(ERF_END, size)
    t = size * size.horner(LOG2_ERFC)
    shifted = t + EXPONENT_ROUNDER
    r = t - (shifted - EXPONENT_ROUNDER)
    power = _shifted_power(shifted)
    grown = r.fma(EXP2M1[0], (r * r) * r.horner(EXP2M1[1:]))
    value = Num(x.code, literal(x.kind, 1.0)) - power
    value = (grown * -1.0).fma(power, value)
    return (value.cast("bitcast", "i32") | sign).cast("bitcast", "float")


def sin(x: Num) -> Num:
    return _circular(x, "sinf", 0)


def cos(x: Num) -> Num:
    return _circular(x, "cosf", 1)


def _circular(x: Num, library: str, quarter: int) -> Num:
    code = x.code
    large = x.abs().test("ult", SINE_END) ^ 1  # infinities and NaN too
    some = (
        code.call("i1", f"llvm.vector.reduce.or.{mangled(large.kind)}", large.reg)
        if lane_count(x.kind) > 1
        else large.reg
    )
    (result,) = code.either(
        some, lambda: [lanewise(code, library, x.reg)], lambda: [_reduced_circular(x, quarter).reg]
    )  # fmt: skip
    return Num(code, result)


def _reduced_circular(x: Num, quarter: int) -> Num:
    shifted = x.fma(2 / math.pi, ROUNDER)
    n = shifted - ROUNDER
    r = n.fma(-HALF_PI[2], n.fma(-HALF_PI[1], n.fma(-HALF_PI[0], x)))
    turn = shifted.cast("bitcast", "i32") - (ROUNDER_BITS - quarter)
    s = r * r
    sine = (s * r).fma(s.horner(SINE), r)
    cosine = (s * s).fma(s.horner(COSINE), s.fma(-0.5, 1.0))
    value = (turn & 1).test("eq", 0).select(sine, cosine)
    flipped = value.cast("bitcast", "i32") ^ (turn & 2).shift("shl", 30)
    return flipped.cast("bitcast", "float")


def pow32(x: Num, y: Num) -> Num:
    """x ** y of float32 through float64, with the special cases of C's pow."""
    wide, exponent = x.cast("fpext", "double"), y.cast("fpext", "double")
    size = _exp2(exponent * _log2(wide.abs())).cast("fptrunc", "float")
    half = exponent * 0.5
    whole = exponent.intrinsic("trunc").test("oeq", exponent)
    odd = whole & (half.intrinsic("trunc").test("une", half))
    negative = wide.cast("bitcast", "i64").test("slt", 0)
    result = (odd & negative).select(size * -1.0, size)
    finite = x.abs().test("olt", math.inf)
    invalid = x.test("olt", 0.0) & finite & (whole ^ 1)
    result = invalid.select(math.nan, result)
    result = (x.test("uno", x) | y.test("uno", y)).select(math.nan, result)
    one = x.test("oeq", 1.0) | y.test("oeq", 0.0) | (x.test("oeq", -1.0) & y.abs().test("oeq", math.inf))
    return one.select(1.0, result)


def _log2(x: Num) -> Num:
    """log2 of a float64 that was a float32, at least 0; -inf of 0, inf of inf."""
    bits = x.cast("bitcast", "i64")
    offset = 0x3FE6A09E667F3BCD
    e = (bits - offset).shift("ashr", 52)
    m = (bits - e.shift("shl", 52)).cast("bitcast", "double")
    s = (m - 1.0) / (m + 1.0)
    result = s.fma((s * s).horner(LOG2_SERIES), e.cast("trunc", "i32").cast("sitofp", "double"))
    result = x.test("oeq", math.inf).select(math.inf, result)
    return x.test("oeq", 0.0).select(-math.inf, result)


def _exp2(x: Num) -> Num:
    low = x.test("olt", -200.0).select(-200.0, x)
    clamped = low.test("ogt", 200.0).select(200.0, low)
    rounder = 1.5 * 2.0**52
    shifted = clamped + rounder
    r = clamped - (shifted - rounder)
    scale = (shifted.cast("bitcast", "i64") + 1023).shift("shl", 52).cast("bitcast", "double")
    return r.horner(EXP2) * scale


def lanewise(code: Code, function: str, *args: Reg) -> Reg:
    """A function of the C library called for every lane, in a loop."""
    kind, scalar, lanes = args[0].type, element(args[0].type), lane_count(args[0].type)
    if lanes == 1:
        return code.call(scalar, function, *args)
    nbytes = 8 if scalar == "double" else 4
    places = [code.alloca(kind) for _ in args]
    for place, value in zip(places, args, strict=True):
        code.store(value, place, 64)

    def body(index: Reg, _: list[Reg]) -> list[Reg]:
        offset = code.binary("mul", index, i64(nbytes))
        lane = [code.load(scalar, code.at(place, offset), nbytes) for place in places]
        code.store(code.call(scalar, function, *lane), code.at(places[0], offset), nbytes)
        return []

    code.loop(i64(0), i64(lanes), i64(1), body)
    return code.load(kind, places[0], 64)
