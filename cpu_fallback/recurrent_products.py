"""The product of a few rows of a recurrent state with packed weights: floats, or bytes summed exactly.

Weights are cut into panels of a few vectors of columns, each contiguous: a line of vectors for every step of the depth.
A step takes one element of the state, or four bytes of it (one signed dot instruction, or two for weights whose pairs
do not saturate: see `byte_pairs`), or two (a product of 16-bit integers, whose sum of two no 32-bit integer overflows).
An element, or what a step takes, fills one word of the state.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cpu_fallback.calls import Array
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.loops import splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.packing import parameters
from cpu_fallback.tiles import NBYTES, add, multiply_add, saturating_multiply_add

FLOATS, QUADS, PAIRS, BYTES = "floats", "quads", "pairs", "bytes"
DEPTHS = {FLOATS: 1, QUADS: 4, PAIRS: 2, BYTES: 4}
PARAMETERS = (
    "ptr %state, i64 %state_row, ptr %weights, ptr %sums, i64 %sums_row, i64 %depth, i64 %panels"
)  # fmt: skip
X86 = platform.machine().lower() in ("x86_64", "amd64")
PAIR_PRODUCTS = {16: "llvm.x86.sse2.pmadd.wd", 32: "llvm.x86.avx2.pmadd.wd", 64: "llvm.x86.avx512.pmaddw.d.512"}


@dataclass(frozen=True)
class Form:
    """How weights are packed and multiplied: what a step takes, the LLVM type of a sum, the shape of a panel's line."""

    kind: str
    scalar: str
    lanes: int
    vectors: int
    extra: int = 0
    """Elements of the state that come once more behind it, for what weights of BYTES have too much."""
    even: bool = False
    """Products of any number of rows add in one order."""

    @property
    def quantised(self) -> bool:
        return self.kind != FLOATS

    @property
    def step(self) -> int:
        """Elements of the state that a step takes."""
        return DEPTHS[self.kind]

    @property
    def word(self) -> int:
        """Bytes of the state that a step takes."""
        return NBYTES[self.scalar]

    @property
    def nbytes(self) -> int:
        """Of a vector of weights for one step."""
        return self.lanes * (self.word if self.kind == FLOATS else self.step)

    def panels(self, columns: int) -> int:
        """How many panels so many columns fill."""
        return -(-columns // (self.lanes * self.vectors))

    def depth(self, rows: int) -> int:
        """Steps for so many elements, and the extra ones."""
        return -(-rows // self.step) + self.extra // self.step


def form_of(target: Target, scalar: str, quantised: bool, vectors: int) -> Form:
    """The form for states of `scalar`, quantised to bytes or not, that leaves `vectors` vectors of columns the least
    padding."""
    lanes = target.vector_nbytes // NBYTES[scalar]
    most = min(vectors, 4 if target.registers >= 32 else 2)
    width = min(range(most, most // 2, -1), key=lambda width: -vectors % width)
    if not quantised:
        return Form(FLOATS, scalar, lanes, width)
    return Form(QUADS if _dots(target) else PAIRS, "i32", lanes, width)


def _dots(target: Target) -> bool:
    names = target.features.split(",")
    return "+avx512vnni" in names if target.vector_nbytes == 64 else "+avxvnni" in names


def pack(weights: Array, form: Form) -> Array:
    """weights [D, K, N] as panels [D, panels, steps, vectors, lanes * elements of a step], zeros where there are none.

    The bytes of a step lie together for each column. The rows of BYTES are whole steps already, extra ones behind them.
    """
    directions, rows, columns = weights.shape
    steps, panels, width = form.depth(rows - form.extra), form.panels(columns), form.vectors * form.lanes
    whole = np.zeros((directions, steps * form.step, panels * width), weights.dtype)
    whole[:, :rows, :columns] = weights
    apart = whole.reshape(directions, steps, form.step, panels, form.vectors, form.lanes)
    packed = apart.transpose(0, 3, 1, 4, 5, 2)
    return np.ascontiguousarray(packed).reshape(directions, panels, steps, form.vectors, form.lanes * form.step)


def tallest(form: Form, target: Target) -> int:
    """Rows of the largest tile: its sums leave some vector registers free, and its rows some addresses."""
    return min(8, _budget(target) // form.vectors)


def _budget(target: Target) -> int:
    return 24 if target.registers >= 32 else 12


def product_table(code: Code, target: Target, form: Form, rows: Iterable[int]) -> str:
    """The name of a table of functions, called with PARAMETERS: entry r - 1 multiplies r rows with some panels.

    Rows of the state and of sums lie `state_row` and `sums_row` bytes apart; sums of all panels are contiguous.
    """
    heights = sorted(set(rows))
    stem = f"recurrent_{form.kind}_{form.scalar}{form.lanes}x{form.vectors}{'_even' * form.even}"
    name = "_".join(map(str, (stem, "rows", *heights)))
    if name not in code.definitions:
        for height in heights:
            product = _Product(form, height, target)
            code.define(f"{stem}_{height}", PARAMETERS, attributes(target), product.write)
        entries = ", ".join(f"ptr @{stem}_{row}" if row in heights else "ptr null" for row in range(1, heights[-1] + 1))
        code.definitions[name] = f"@{name} = internal constant [{heights[-1]} x ptr] [{entries}]"
    return name


def call_product(code: Code, table: str, rows: Reg, *arguments: Reg) -> None:
    place = code.at(Reg(f"@{table}", "ptr"), code.binary("shl", code.binary("sub", rows, i64(1)), i64(3)))
    function = code.load("ptr", place, 8)
    code.do(f"call void {function.name}({', '.join(map(str, arguments))})")


@dataclass(frozen=True)
class _Product:
    """A function for a number of rows. With few of them it takes several panels at once, to have enough sums."""

    form: Form
    rows: int
    target: Target

    def write(self, code: Code) -> None:
        state, state_row, weights, sums, sums_row, depth, panels = parameters(PARAMETERS)
        size = code.binary("mul", depth, i64(self.form.nbytes * self.form.vectors))
        span = self.form.vectors * self.form.lanes * self.form.word
        lines = [code.at(state, code.binary("mul", state_row, i64(i))) for i in range(self.rows)]

        def tile(index: Reg, together: int) -> list[Reg]:
            first = code.at(weights, code.binary("mul", index, size))
            places = [code.at(first, code.binary("mul", size, i64(i))) for i in range(together)]
            totals = self._tile(code, lines, places, depth)
            begin = code.at(sums, code.binary("mul", index, i64(span)))
            width = together * self.form.vectors
            for i in range(self.rows):
                line = code.at(begin, code.binary("mul", sums_row, i64(i)))
                for j in range(width):
                    place = code.at(line, i64(j * self.form.lanes * self.form.word))
                    code.store(totals[i * width + j], place, self.form.word)
            return []

        together = max(1, _budget(self.target) * 2 // 3 // (self.rows * self.form.vectors))
        whole = code.binary("mul", code.binary("udiv", panels, i64(together)), i64(together))
        code.loop(i64(0), whole, i64(together), lambda index, _: tile(index, together))
        if together > 1:
            code.loop(whole, panels, i64(1), lambda index, _: tile(index, 1))

    def _tile(self, code: Code, lines: Sequence[Reg], panels: Sequence[Reg], depth: Reg) -> list[Reg]:
        """The sums of all rows with some panels, row by row."""
        form = self.form
        kind = vector(form.lanes, form.scalar)
        cells = self.rows * form.vectors * len(panels)
        line_nbytes = form.nbytes * form.vectors

        def step(index: Reg, totals: list[Reg]) -> list[Reg]:
            offset = code.binary("mul", index, i64(line_nbytes))
            factors = [
                self._weights(code, code.at(place, i64(j * form.nbytes)))
                for panel in panels
                for place in [code.at(panel, offset)]
                for j in range(form.vectors)
            ]
            result = []
            for i, line in enumerate(lines):
                place = code.at(line, code.binary("mul", index, i64(form.word)))
                spread = splat(code, code.load(form.scalar, place, form.word), form.lanes)
                for j, factor in enumerate(factors):
                    result.append(self._multiplied(code, spread, factor, totals[i * len(factors) + j]))
            return result

        chains = 4 if cells < 3 else 2 if cells < 8 else 1
        chains = 1 if form.even else chains
        starts = [literal(kind, 0)] * cells * chains

        def several(index: Reg, totals: list[Reg]) -> list[Reg]:
            result: list[Reg] = []
            for i in range(chains):
                result += step(code.binary("add", index, i64(i)) if i else index, totals[i * cells : (i + 1) * cells])
            return result

        whole = code.binary("and", depth, i64(-chains))
        totals = code.loop(i64(0), whole, i64(chains), several, starts)
        while len(totals) > cells:
            half = len(totals) // 2
            totals = [add(code, a, b) for a, b in zip(totals[:half], totals[half:], strict=True)]
        return code.loop(whole, depth, i64(1), step, totals) if chains > 1 else totals

    def _weights(self, code: Code, place: Reg) -> Reg:
        """A vector for one step, as it enters the product."""
        form = self.form
        if form.kind == FLOATS:
            return code.load(vector(form.lanes, form.scalar), place, form.word)
        if form.kind in (QUADS, BYTES):
            return code.load(vector(form.lanes, "i32"), place, 4)
        return code.convert("sext", code.load(vector(2 * form.lanes, "i8"), place, 2), vector(2 * form.lanes, "i16"))

    def _multiplied(self, code: Code, state: Reg, weights: Reg, total: Reg) -> Reg:
        """total + state * weights."""
        if self.form.kind == FLOATS:
            return multiply_add(code, state, weights, total)
        if self.form.kind == QUADS:
            name = f"llvm.x86.avx512.vpdpbusd.{self.target.vector_nbytes * 8}"
            return code.call(total.type, name, total, state, weights)
        if self.form.kind == BYTES:
            return saturating_multiply_add(code, state, weights, total)
        pairs = code.convert("bitcast", state, weights.type)
        return code.binary("add", total, pair_products(code, pairs, weights, self.target))


def pair_products(code: Code, a: Reg, b: Reg, target: Target) -> Reg:
    """Sums of the products of neighbours of 16 bits, in 32 bits."""
    kind = vector(target.vector_nbytes // 4, "i32")
    if X86:
        return code.call(kind, PAIR_PRODUCTS[target.vector_nbytes], a, b)
    halves = []
    for x in (a, b):
        whole = code.convert("bitcast", x, kind)
        low = code.binary("ashr", code.binary("shl", whole, literal(kind, 16)), literal(kind, 16))
        halves.append((low, code.binary("ashr", whole, literal(kind, 16))))
    (a_low, a_high), (b_low, b_high) = halves
    return code.binary("add", code.binary("mul", a_low, b_low), code.binary("mul", a_high, b_high))
