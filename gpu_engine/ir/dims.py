"""Symbolic extents: integer polynomials over named symbols in a normal form, so that equality is `==`.

A `Dim` is an `int` or a `Sym`. Simplification assumes that every named symbol is at least 1, and an extent that
evaluates below zero counts as 0 (evaluation.py): `x[:, :-1]` of an empty axis stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

from gpu_engine.errors import InvalidModel, UnsupportedModel

MAX_SIZE = 1000
"""How many terms, symbols and functions an extent may be written with: a model can square one again and again."""


class Undecided(Exception):
    """A comparison of symbolic extents whose answer depends on the values of the symbols."""


class TooComplicated(Undecided, UnsupportedModel):
    """Arithmetic on extents that grows beyond all reason."""


@dataclass(frozen=True, order=True)
class Symbol:
    """A named extent, at least 1."""

    name: str

    @property
    def least(self) -> int:
        """1, but 0 for an extent that only a step tells (`Builder.fresh_dim`): it may find nothing."""
        return 0 if self.name[:1] == "u" and self.name[1:].isdigit() else 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """A function that polynomials cannot express: floordiv, mod, min, max, broadcast or many (0 for 1, else 1)."""

    function: str
    args: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.args))})"


Atom = Symbol | Call
Monomial = tuple[Atom, ...]


@dataclass(frozen=True)
class Sym:
    """A sum of integer multiples of products of atoms, sorted; never a plain integer."""

    terms: tuple[tuple[Monomial, int], ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __post_init__(self) -> None:
        if self.size > MAX_SIZE or any(abs(count) >> 63 for _, count in self.terms):
            raise TooComplicated(f"an extent that takes more than {MAX_SIZE} symbols or 64 bits to write")

    @cached_property
    def size(self) -> int:
        return sum(1 + sum(map(_atom_size, monomial)) for monomial, _ in self.terms)

    def __add__(self, other: Dim) -> Dim:
        return _polynomial([*self.terms, *_terms(other)])

    def __neg__(self) -> Dim:
        return _polynomial([(monomial, -count) for monomial, count in self.terms])

    def __sub__(self, other: Dim) -> Dim:
        return _polynomial([*self.terms, *((monomial, -count) for monomial, count in _terms(other))])

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        if isinstance(other, int) and other:
            return self if other == 1 else Sym(tuple((monomial, count * other) for monomial, count in self.terms))
        return _polynomial(
            [(_sorted((*a, *b)), count * times) for a, count in self.terms for b, times in _terms(other)]
        )

    def __floordiv__(self, other: Dim) -> Dim:
        return floor_div(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floor_div(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return modulo(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return modulo(other, self)

    __radd__, __rmul__ = __add__, __mul__

    def __bool__(self) -> bool:
        raise TypeError(f"the truth of the symbolic extent {self} is not known")

    def __str__(self) -> str:
        texts = ("*".join([str(n)] * (n != 1 or not atoms) + list(map(str, atoms))) for atoms, n in self.terms)
        return " + ".join(texts).replace("+ -", "- ")

    __repr__ = __str__


Dim = int | Sym


def symbol(name: str) -> Sym:
    """The extent called `name`."""
    return Sym((((Symbol(name),), 1),))


def number(dim: Dim) -> int:
    """An extent that is an int by now."""
    assert isinstance(dim, int), f"{dim} has no value yet"
    return dim


def product(dims: Iterable[Dim]) -> Dim:
    one: Dim = 1
    return reduce(lambda total, dim: total * dim, dims, one)


def floor_div(a: Dim, b: Dim) -> Dim:
    """floor(a / b) for b > 0; exact wherever every term divides."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if b == 1:
        return a
    if a == b:
        return 1
    exact, rest = _divide_terms(a, b)
    if rest == 0:
        return exact
    if isinstance(b, int):
        divided, kept = _factor(rest, b)
        if isinstance(divided, int) and isinstance(kept, int):
            return exact + divided // kept
        nested = _floored(divided)
        if nested is not None:
            inner, divisor, offset = nested
            return exact + floor_div(inner + offset * divisor, divisor * kept)
        return exact + _call("floordiv", divided, kept)
    return exact + _call("floordiv", rest, b)


def _floored(dim: Dim) -> tuple[Dim, int, int] | None:
    """(a, b, c) if `dim` is floor(a / b) + c with ints b and c, else None."""
    match dim:
        case Sym(terms=(((Call("floordiv", (a, int(b))),), 1),)):
            return a, b, 0
        case Sym(terms=(((Call("floordiv", (a, int(b))),), 1), ((), c))):
            return a, b, c
    return None


def ceil_div(a: Dim, b: Dim) -> Dim:
    """ceil(a / b) for b > 0."""
    return floor_div(a + (b - 1), b)


def modulo(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    _, rest = _divide_terms(a, b)
    if isinstance(rest, int) and isinstance(b, int):
        return rest % b
    return 0 if rest == 0 else _call("mod", rest, b)


def minimum(a: Dim, b: Dim) -> Dim:
    ordered = _ascending(a, b)
    return _call("min", *_ordered(a, b)) if ordered is None else ordered[0]


def maximum(a: Dim, b: Dim) -> Dim:
    ordered = _ascending(a, b)
    return _call("max", *_ordered(a, b)) if ordered is None else ordered[1]


def _ascending(a: Dim, b: Dim) -> tuple[Dim, Dim] | None:
    """(the less, the greater) where that is the same for all values of the symbols, else None."""
    low, high = bounds(b - a)
    if low is not None and low >= 0:
        return a, b
    return (b, a) if high is not None and high <= 0 else None


def broadcast(a: Dim, b: Dim) -> Dim:
    """The extent that a and b broadcast to, by ONNX's multidirectional rule; InvalidModel if they never do."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) and isinstance(b, int):
        raise InvalidModel(f"extents {a} and {b} do not broadcast")
    if isinstance(a, int) or isinstance(b, int):
        return a if isinstance(a, int) else b
    for x, y in ((a, b), (b, a)):
        if y in _operands_of("broadcast", x) or (x in _operands_of("min", y) and bounds(y)[0]):
            return x
    return _call("broadcast", *_ordered(a, b))


def _operands_of(function: str, dim: Dim) -> tuple[Dim, ...]:
    """The extents that `dim` is the broadcast or the minimum of, if it is nothing else."""
    match dim:
        case Sym(terms=(((Call(name, args),), 1),)) if name == function:
            return args
    return ()


def many(dim: Dim) -> Dim:
    """0 if the extent is 1, else 1: the factor of a stride that broadcasting sets to zero."""
    return int(dim != 1) if isinstance(dim, int) else _call("many", dim)


def less_equal(a: Dim, b: Dim) -> bool:
    """Whether a <= b for all values of the symbols; Undecided if that depends on them."""
    low, high = bounds(b - a)
    if (low is not None and low >= 0) or (high is not None and high < 0):
        return low is not None and low >= 0
    raise Undecided(f"{a} <= {b}")


def equal(a: Dim, b: Dim) -> bool:
    """Whether a == b for all values of the symbols; Undecided if that depends on them."""
    low, high = bounds(a - b)
    if low == high == 0:
        return True
    if (low or 0) > 0 or (high or 0) < 0:
        return False
    raise Undecided(f"{a} == {b}")


def bounds(dim: Dim) -> tuple[int | None, int | None]:
    """The least and greatest value of `dim` while no symbol is below its least; None where there is none."""
    if isinstance(dim, int):
        return dim, dim
    low: int | None = 0
    high: int | None = 0
    for monomial, count in dim.terms:
        least, most = _monomial_bounds(monomial)
        ends = (least, most) if count > 0 else (most, least)
        low = None if low is None or ends[0] is None else low + count * ends[0]
        high = None if high is None or ends[1] is None else high + count * ends[1]
    return low, high


def symbols(dim: Dim) -> set[str]:
    """The names in `dim`."""
    atoms = () if isinstance(dim, int) else (atom for monomial, _ in dim.terms for atom in monomial)
    return set().union(*({a.name} if isinstance(a, Symbol) else set().union(*map(symbols, a.args)) for a in atoms))


def substitute(dim: Dim, values: Mapping[str, Dim]) -> Dim:
    """`dim` with symbols replaced."""
    if isinstance(dim, int):
        return dim
    result: Dim = 0
    for monomial, count in dim.terms:
        term: Dim = count
        for atom in monomial:
            term = term * _substitute_atom(atom, values)
        result = result + term
    return result


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    return dim.terms if isinstance(dim, Sym) else (((), int(dim)),)


def _polynomial(terms: Iterable[tuple[Monomial, int]]) -> Dim:
    counts: dict[Monomial, int] = {}
    for monomial, count in terms:
        counts[monomial] = counts.get(monomial, 0) + count
    kept = [(monomial, count) for monomial, count in counts.items() if count]
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    if len(kept) > 1:
        kept.sort(key=lambda term: (-len(term[0]), *map(str, term[0])))
    return Sym(tuple(kept))


def _atom_size(atom: Atom) -> int:
    return 1 if isinstance(atom, Symbol) else 1 + sum(arg.size for arg in atom.args if isinstance(arg, Sym))


def _sorted(atoms: Monomial) -> Monomial:
    return tuple(sorted(atoms, key=str))


def _ordered(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    return (a, b) if str(a) <= str(b) else (b, a)


def _call(function: str, *args: Dim) -> Sym:
    return Sym((((Call(function, args),), 1),))


def _divide_terms(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    """(q, r) with a = q * b + r, where q takes every term that b divides exactly."""
    divisor = _terms(b)
    if len(divisor) != 1:
        scale = _whole_multiple(a, b)
        return (scale, 0) if scale is not None else (0, a)
    (atoms, number), quotient, rest = divisor[0], [], []
    for monomial, count in _terms(a):
        left = _remove(monomial, atoms)
        whole = 0 if left is None else count // number
        quotient.append((left or (), whole))
        rest.append((monomial, count - whole * number))
    return _polynomial(quotient), _polynomial(rest)


def _whole_multiple(a: Dim, b: Dim) -> Dim | None:
    """q with a == q * b for a monomial q, or None."""
    first_a, first_b = _terms(a)[0], _terms(b)[0]
    left = _remove(first_a[0], first_b[0])
    if left is None or first_a[1] % first_b[1]:
        return None
    scale = _polynomial([(left, first_a[1] // first_b[1])])
    return scale if scale * b == a else None


def _remove(monomial: Monomial, atoms: Monomial) -> Monomial | None:
    left = list(monomial)
    for atom in atoms:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


def _factor(a: Dim, b: int) -> tuple[Dim, int]:
    """a and b without the factor that b and all non-constant terms of a share; the constant is floored."""
    common = math.gcd(b, *(count for monomial, count in _terms(a) if monomial))
    return _polynomial([(monomial, count // common) for monomial, count in _terms(a)]), b // common


def _monomial_bounds(monomial: Monomial) -> tuple[int | None, int | None]:
    if len(monomial) == 1:
        return _atom_bounds(monomial[0])
    lows, highs = zip(*map(_atom_bounds, monomial), strict=True) if monomial else ((), ())
    if any(low is None or low < 0 for low in lows):
        return None, None
    return math.prod(lows), None if None in highs else math.prod(highs)


def _atom_bounds(atom: Atom) -> tuple[int | None, int | None]:
    if isinstance(atom, Symbol):
        return atom.least, None
    ends = [bounds(arg) for arg in atom.args]
    lows, highs = ([low for low, _ in ends if low is not None], [high for _, high in ends if high is not None])
    low = min(lows) if len(lows) == len(ends) else None
    high = max(highs) if len(highs) == len(ends) else None
    match atom.function, atom.args:
        case "many", _:
            return 0, 1
        case "mod", (_, divisor):
            return 0, divisor - 1 if isinstance(divisor, int) else None
        case "floordiv", (_, int(divisor)):
            (least, most), _ = ends
            return None if least is None else least // divisor, None if most is None else most // divisor
        case "min", _:
            return low, min(highs, default=None)
        case "max", _:
            return max(lows, default=None), high
        case "broadcast", _:
            return low if low is None or low < 1 else max(lows), high
    return (0 if low is not None and low >= 0 else None), None


def _substitute_atom(atom: Atom, values: Mapping[str, Dim]) -> Dim:
    if isinstance(atom, Symbol):
        return values.get(atom.name, Sym((((atom,), 1),)))
    args = [substitute(arg, values) for arg in atom.args]
    functions: dict[str, Callable[..., Dim]] = {
        "floordiv": floor_div, "mod": modulo, "min": minimum, "max": maximum, "broadcast": broadcast, "many": many,
    }  # fmt: skip
    return functions[atom.function](*args)
