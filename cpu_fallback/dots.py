"""Products of a few rows with a B whose columns are contiguous, as dot products along the depth: nothing is packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpu_fallback import packing
from cpu_fallback.blocks import most
from cpu_fallback.code import Code, Reg, i64, lane_count, literal, vector
from cpu_fallback.gemm_driver import EPILOGUE, PACKED, PARAMETERS, Arguments
from cpu_fallback.lanes import COMPUTED
from cpu_fallback.loops import lane_mask, least, literal_zero, row_offsets, thread_share
from cpu_fallback.native import Target, attributes
from cpu_fallback.tiles import NBYTES, add, multiply_add
from cpu_fallback.vector_math import mangled
from gpu_engine.ir.dtypes import DType

MOST_ROWS = 4
CHUNK = 240
"""Columns between calls of the epilogue."""


@dataclass(frozen=True)
class Dots:
    """A B over batches for `rows` rows of A, by content; a driver like `gemm_driver.Driver`, with the same words.

    Rows of A and columns of B are contiguous.
    """

    dtype: DType
    rows: int
    rank: int

    b_form = PACKED
    packs = False

    def line_nbytes(self, target: Target) -> int:
        """Bytes of a row of sums as the epilogue gets them."""
        return CHUNK * self.dtype.itemsize

    def define(self, code: Code, target: Target) -> str:
        """The name of the function."""
        name = f"dots_{self.dtype}_{self.rows}_{self.rank}"
        code.define(name, PARAMETERS, attributes(target), lambda inner: _Writer(self, inner, target).write())
        return name


class _Writer:
    def __init__(self, driver: Dots, code: Code, target: Target) -> None:
        self.driver, self.code, self.scalar = driver, code, COMPUTED[driver.dtype]
        self.lanes = target.vector_nbytes // NBYTES[self.scalar]
        self.kind = vector(self.lanes, self.scalar)
        self.columns = 8 if driver.rows < 3 else 4
        self.given = Arguments(driver, code)
        self.line = driver.line_nbytes(target)
        self.sums = code.alloca(f"[{self.line * driver.rows} x i8]", zero=False)

    def write(self) -> None:
        """Threads share out the chunks of columns of all batches."""
        code, given = self.code, self.given
        chunks = packing.ceil_div(code, given.n, CHUNK)

        def chunk(index: Reg, _: list[Reg]) -> list[Reg]:
            batch = code.binary("udiv", index, most(code, chunks, 1))
            column = code.binary("mul", code.binary("urem", index, most(code, chunks, 1)), i64(CHUNK))
            columns = least(code, code.binary("sub", given.n, column), i64(CHUNK))
            offsets = [i64(0)] * 3
            if self.driver.rank:
                offsets = row_offsets(code, batch, given.extents, given.strides)
            self._chunk(code.at(given.a, offsets[0]), code.at(given.b, offsets[1]), column, columns)
            arguments = Reg("%block", "ptr"), batch, i64(0), column, i64(self.driver.rows), columns, self.sums
            packing.call(code, EPILOGUE.name, *arguments)
            return []

        total = code.binary("mul", given.batches, chunks)
        code.loop(*thread_share(code, total, 1), i64(1), chunk)

    def _chunk(self, a: Reg, b: Reg, column: Reg, columns: Reg) -> None:
        """Some columns of a batch; columns that there are not are copies of the last one."""
        code, given = self.code, self.given
        rows = [code.at(a, code.binary("mul", given.a_row, i64(i))) for i in range(self.driver.rows)]
        last = code.binary("sub", given.n, i64(1))

        def tile(index: Reg, _: list[Reg]) -> list[Reg]:
            first = code.binary("add", column, index)
            lines = []
            for j in range(self.columns):
                place = least(code, code.binary("add", first, i64(j)), last)
                lines.append(code.at(b, code.binary("mul", place, given.b_line)))
            self._keep(folded(code, self._dots(rows, lines)), index)
            return []

        code.loop(i64(0), columns, i64(self.columns), tile)

    def _keep(self, found: list[Reg], column: Reg) -> None:
        """Store the sums of a tile, which stand row by row in vectors, from a column on."""
        code, nbytes, lanes = self.code, NBYTES[self.scalar], lane_count(found[0].type)
        place = code.at(self.sums, code.binary("mul", column, i64(nbytes)))
        size = min(self.columns, lanes)
        for i in range(0, self.driver.rows * self.columns, size):
            row, inner = divmod(i, self.columns)
            part = packing.lanes_of(code, found[i // lanes], i % lanes, size)
            code.store(part, code.at(place, i64(row * self.line + inner * nbytes)), nbytes)

    def _dots(self, rows: list[Reg], lines: list[Reg]) -> list[Reg]:
        """Vectors whose lanes add up to the products of every row with every line, row by row."""
        code, given = self.code, self.given
        whole = code.binary("and", given.k, i64(-self.lanes))
        left = code.binary("sub", given.k, whole)

        def load(place: Reg) -> Reg:
            return code.load(self.kind, place, NBYTES[self.scalar])

        def masked(place: Reg) -> Reg:
            mask, align = lane_mask(code, self.lanes, left), Reg(str(NBYTES[self.scalar]), "i32")
            name = f"llvm.masked.load.{mangled(self.kind)}.p0"
            return code.call(self.kind, name, place, align, mask, literal_zero(self.kind))

        def step(k: Reg, sums: list[Reg], get: Callable[[Reg], Reg]) -> list[Reg]:
            places = [code.let("ptr", f"getelementptr {self.scalar}, {line}, {k}") for line in (*rows, *lines)]
            values = list(map(get, places))
            factors = values[len(rows) :]
            pairs = [(x, y) for x in values[: len(rows)] for y in factors]
            return [multiply_add(code, x, y, total) for (x, y), total in zip(pairs, sums, strict=True)]

        zero = [literal(self.kind, 0)] * (len(rows) * len(lines))
        sums = code.loop(i64(0), whole, i64(self.lanes), lambda k, sums: step(k, sums, load), zero)
        some = code.compare("icmp sgt", left, i64(0))
        return code.either(some, lambda: step(whole, sums, masked), lambda: sums)


def folded(code: Code, sums: Sequence[Reg]) -> list[Reg]:
    """The sums over the lanes of each vector, in order, as the lanes of as few vectors as hold them.

    Vectors are joined in pairs, and halves of lanes added, until every lane is one sum.
    """
    kind, size = sums[0].type, lane_count(sums[0].type)
    zero = Reg("zeroinitializer", kind)
    found = [*sums, *[zero] * ((1 << (len(sums) - 1).bit_length()) - len(sums))]
    while size > 1:
        pairs = list(zip(found[::2], found[1::2], strict=True)) if len(found) > 1 else [(found[0], None)]
        found, size = [_halved(code, a, b, size) for a, b in pairs], size // 2
    return found


def _halved(code: Code, a: Reg, b: Reg | None, size: int) -> Reg:
    """Groups of `size` lanes of a, then of b, with their halves added."""
    lanes = lane_count(a.type)
    count = lanes if b is None else 2 * lanes
    first = [start + i for start in range(0, count, size) for i in range(size // 2)]
    other = Reg("poison", a.type) if b is None else b
    halves = (packing.shuffled(code, a, other, [pick + move for pick in first]) for move in (0, size // 2))
    return add(code, *halves)
