"""Matrices transposed in blocks of registers: what turns images from channels first to channels last and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, lane_count, vector
from cpu_fallback.integers import least, plus, times
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.native import Target
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.plan.words import Address

SCALARS = {4: "i32", 8: "i64"}


@dataclass(frozen=True)
class TransposeKernel:
    """Matrices [batch, rows, columns] of elements of `nbytes` bytes as [batch, columns, rows].

    Words: addresses of the source and the result; batch, rows, columns.
    """

    nbytes: int

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        source, out = words.pointers(2)
        batch, rows, columns = words.numbers(3)
        lanes = target.vector_nbytes // self.nbytes
        large = code.compare("icmp sge", least(code, rows, columns), i64(lanes))
        writer = _Writer(code, source, out, rows, columns, lanes, self.nbytes)
        code.either(large, lambda: writer.blocks(batch), lambda: writer.elements(batch))


@dataclass(frozen=True)
class _Writer:
    """The kernel while it is written."""

    code: Code
    source: Reg
    out: Reg
    rows: Reg
    columns: Reg
    lanes: int
    nbytes: int

    @property
    def _scalar(self) -> str:
        return SCALARS[self.nbytes]

    def blocks(self, batch: Reg) -> list[Reg]:
        """Square blocks; those at the ends reach back. Threads share the blocks of columns."""
        code, lanes = self.code, i64(self.lanes)
        down = self._blocks(self.columns)

        def column(index: Reg, _: list[Reg]) -> list[Reg]:
            matrix, block = code.binary("udiv", index, down), code.binary("urem", index, down)
            first = least(code, times(code, block, lanes), code.binary("sub", self.columns, lanes))
            base = times(code, matrix, self.rows, self.columns)

            def row(start: Reg, _: list[Reg]) -> list[Reg]:
                place = least(code, start, code.binary("sub", self.rows, lanes))
                self._block(base, place, first)
                return []

            code.loop(i64(0), self.rows, lanes, row)
            return []

        code.loop(*thread_share(code, times(code, batch, down), 1), i64(1), column)
        return []

    def _blocks(self, extent: Reg) -> Reg:
        return self.code.binary("udiv", plus(self.code, extent, i64(self.lanes - 1)), i64(self.lanes))

    def _block(self, base: Reg, row: Reg, column: Reg) -> None:
        code, kind = self.code, vector(self.lanes, self._scalar)
        step = times(code, self.columns, i64(self.nbytes))
        place = self._at(self.source, plus(code, base, times(code, row, self.columns), column))
        lines = []
        for i in range(self.lanes):
            place = code.at(place, step) if i else place
            lines.append(code.load(kind, place, self.nbytes))
        step = times(code, self.rows, i64(self.nbytes))
        place = self._at(self.out, plus(code, base, times(code, column, self.rows), row))
        for i, line in enumerate(transposed(code, lines)):
            place = code.at(place, step) if i else place
            code.store(line, place, self.nbytes)

    def elements(self, batch: Reg) -> list[Reg]:
        """One element at a time, threads sharing the columns."""
        code = self.code

        def column(index: Reg, _: list[Reg]) -> list[Reg]:
            matrix, place = code.binary("udiv", index, self.columns), code.binary("urem", index, self.columns)
            base = times(code, matrix, self.rows, self.columns)
            start, end = plus(code, base, place), plus(code, base, times(code, place, self.rows))

            def row(i: Reg, _: list[Reg]) -> list[Reg]:
                from_place = self._at(self.source, plus(code, start, times(code, i, self.columns)))
                value = code.load(self._scalar, from_place, self.nbytes)
                code.store(value, self._at(self.out, plus(code, end, i)), self.nbytes)
                return []

            code.loop(i64(0), self.rows, i64(1), row)
            return []

        code.loop(*thread_share(code, times(code, batch, self.columns), 16), i64(1), column)
        return []

    def _at(self, base: Reg, element: Reg) -> Reg:
        return self.code.at(base, times(self.code, element, i64(self.nbytes)))


def transposed(code: Code, lines: Sequence[Reg]) -> list[Reg]:
    """As many lines as they have lanes, transposed: neighbours are interleaved, then pairs, then fours, ..."""
    lines, lanes = list(lines), lane_count(lines[0].type)
    width = 1
    while width < lanes:
        following = list(lines)
        for i in range(lanes):
            if i & width == 0:
                following[i], following[i + width] = _exchanged(code, lines[i], lines[i + width], width)
        lines, width = following, 2 * width
    return lines


def _exchanged(code: Code, a: Reg, b: Reg, width: int) -> tuple[Reg, Reg]:
    """a and b with the odd runs of `width` lanes of a swapped for the even runs of b."""
    lanes = lane_count(a.type)
    low = [i if i & width == 0 else lanes + i - width for i in range(lanes)]
    high = [i + width if i & width == 0 else lanes + i for i in range(lanes)]
    found = []
    for places in (low, high):
        mask = ", ".join(f"i32 {place}" for place in places)
        found.append(code.let(a.type, f"shufflevector {a}, {b}, <{lanes} x i32> <{mask}>"))
    return found[0], found[1]


def transpose_call(source: int, target: int, batch: Dim, rows: Dim, columns: Dim, nbytes: int) -> Native:
    """Buffer `source` [batch, rows, columns] as [batch, columns, rows] into buffer `target`."""
    return Native(TransposeKernel(nbytes), (Address(source), Address(target), batch, rows, columns))


def as_matrices(shape: Sequence[Dim], perm: Sequence[int]) -> tuple[Dim, Dim, Dim] | None:
    """(batch, rows, columns) of a transpose that swaps two groups of neighbouring axes behind the first ones."""
    kept = 0
    while kept < len(perm) and perm[kept] == kept:
        kept += 1
    rest = list(perm[kept:])
    if not rest:
        return None
    if rest != [*range(rest[0], len(perm)), *range(kept, rest[0])]:
        return None
    return dims.product(shape[:kept]), dims.product(shape[kept : rest[0]]), dims.product(shape[rest[0] :])
