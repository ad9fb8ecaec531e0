"""Register tiles of convolutions: some output pixels times some vectors of output channels, the epilogue in registers.

Channels lie in the lanes. For every step of the depth one row of weights is loaded and one element of every pixel is
spread over the lanes; the depth is `segments` runs of contiguous elements, so that windows over an image need no copy
of their own for every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.epilogues import Epilogue, Place
from cpu_fallback.loops import lane_mask, splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.vector_math import mangled

FIXED = (
    "i64 %rows, i64 %columns, ptr %a, i64 %a_row, i64 %segments, i64 %segment_step, i64 %run, ptr %w, "
    "ptr %c, i64 %c_row, ptr %ahead"
)


LINE = 64


@dataclass(frozen=True)
class TileShape:
    """At most `rows` pixels times `vectors` vectors of `lanes` float32; `few` pixels have a tile of their own."""

    rows: int
    few: int
    vectors: int
    lanes: int
    unroll: int

    @property
    def width(self) -> int:
        """Channels of a full panel of weights."""
        return self.vectors * self.lanes

    def panel_width(self, columns: int) -> int:
        """Channels that a panel of `columns` channels is padded to."""
        return -(-columns // self.lanes) * self.lanes


def tile_shape(target: Target) -> TileShape:
    """14 x 2 of 32 vector registers, 6 x 2 of 16: at the peak of the multipliers, without spills (benchmarks/conv.py).

    Extents of images are multiples of 7 more often than not.
    """
    lanes = target.vector_nbytes // 4
    return TileShape(14, 7, 2, lanes, 2) if target.registers >= 32 else TileShape(6, 3, 2, lanes, 4)


def define_tile(code: Code, target: Target, rows: int, vectors: int, epilogue: Epilogue) -> str:
    """The name of the function that computes a tile; `call_tile` calls it.

    C[rows, columns] = epilogue(A W): row r of A starts at a + r * a_row bytes; segment s of its depth starts
    s * segment_step bytes later and has `run` elements. W is [segments * run, vectors * lanes]. Rows of C are c_row
    bytes apart. All `rows` of A must be readable, only those asked for are stored. A line from `ahead` on is prefetched
    for every step of the depth.
    """
    shape = tile_shape(target)
    name = f"conv_tile{rows}x{vectors}_{shape.lanes}_{epilogue.digest}"
    parameters = FIXED + "".join(f", ptr %e{i}" for i in range(len(epilogue.kinds)))
    writer = _Tile(target, rows, vectors, shape.lanes, min(shape.unroll, max(2, 28 // (rows * vectors))), epilogue)
    code.define(name, parameters, attributes(target), writer.write)
    return name


def call_tile(code: Code, name: str, arguments: Sequence[Reg]) -> None:
    """`arguments` are those of FIXED, then the address of every operand of the epilogue for the first cell."""
    code.do(f"call void @{name}({', '.join(map(str, arguments))})")


@dataclass(frozen=True)
class _Tile:
    target: Target
    rows: int
    vectors: int
    lanes: int
    unroll: int
    epilogue: Epilogue

    def write(self, code: Code) -> None:
        count, columns, a, a_row, segments, step, run, w, c, c_row, ahead = (
            Reg(text.split()[1], text.split()[0]) for text in FIXED.split(", ")
        )
        operands = [Reg(f"%e{i}", "ptr") for i in range(len(self.epilogue.kinds))]
        lines = spaced(code, a, a_row, self.rows)
        place = self._place(code, c, c_row, count, columns)
        for line in spaced(code, c, c_row, self.rows):
            for v in range(self.vectors):
                prefetch(code, code.at(line, i64(4 * self.lanes * v)), write=True)

        def segment(index: Reg, sums: list[Reg]) -> list[Reg]:
            offset = code.binary("mul", index, step)
            start = code.binary("mul", index, run)
            return self._walk(code, [code.at(line, offset) for line in lines], w, ahead, start, run, sums)

        zero = [literal(self._kind, 0)] * (self.rows * self.vectors)
        sums = code.loop(i64(0), segments, i64(1), segment, zero)
        self.epilogue.write_tile(code, self.target, place, sums, operands)

    @property
    def _kind(self) -> str:
        return vector(self.lanes, "float")

    @property
    def _row_nbytes(self) -> int:
        return self.vectors * self.lanes * 4

    def _place(self, code: Code, c: Reg, c_row: Reg, count: Reg, columns: Reg) -> Place:
        """Where the tile is stored; the mask says which lanes of the last vector are."""
        mask = None
        if self.target.masked:
            mask = lane_mask(code, self.lanes, code.binary("sub", columns, i64((self.vectors - 1) * self.lanes)))
        return Place(c, c_row, count, columns, self.rows, self.vectors, self.lanes, mask)

    def _walk(
        self, code: Code, lines: list[Reg], w: Reg, ahead: Reg, start: Reg, run: Reg, sums: list[Reg]
    ) -> list[Reg]:
        """The sums after one segment, whose depth is counted from `start`."""
        panel = code.at(w, code.binary("mul", start, i64(self._row_nbytes)))
        coming = code.at(ahead, code.binary("mul", start, i64(LINE)))

        def steps(count: int, k: Reg, sums: list[Reg]) -> list[Reg]:
            far = code.at(coming, code.binary("mul", k, i64(LINE)))
            for step in range(count):
                prefetch(code, code.at(far, i64(LINE * step)))
            return self._steps(code, count, lines, panel, k, sums)

        whole = code.binary("and", run, i64(-self.unroll))
        sums = code.loop(i64(0), whole, i64(self.unroll), lambda k, x: steps(self.unroll, k, x), sums)
        return code.loop(whole, run, i64(1), lambda k, x: steps(1, k, x), sums)

    def _steps(self, code: Code, count: int, lines: list[Reg], panel: Reg, k: Reg, sums: list[Reg]) -> list[Reg]:
        nbytes = self.lanes * 4
        here = code.at(panel, code.binary("mul", k, i64(self._row_nbytes)))
        offset = code.binary("shl", k, i64(2))
        for step in range(count):
            factors = [
                code.load(self._kind, code.at(here, i64((step * self.vectors + v) * nbytes)), 4)
                for v in range(self.vectors)
            ]
            following = []
            for r, line in enumerate(lines):
                element = code.load("float", code.at(code.at(line, offset), i64(4 * step)), 4)
                spread = splat(code, element, self.lanes)
                for v, factor in enumerate(factors):
                    following.append(fma(code, spread, factor, sums[r * self.vectors + v]))
            sums = following
        return sums


def prefetch(code: Code, place: Reg, *, write: bool = False) -> None:
    """Ask for a cache line: into the second cache to read, into the first to write."""
    hints = [Reg(str(hint), "i32") for hint in ((1, 3, 1) if write else (0, 2, 1))]
    code.call("void", "llvm.prefetch.p0", place, *hints)


def fma(code: Code, a: Reg, b: Reg, c: Reg) -> Reg:
    return code.call(a.type, f"llvm.fma.{mangled(a.type)}", a, b, c)


def spaced(code: Code, base: Reg, step: Reg, count: int) -> list[Reg]:
    """base, base + step, base + 2 step, ...: a new register for every third, so that addressing modes reach the rest."""
    double = code.binary("shl", step, i64(1))
    triple = code.binary("add", double, step)
    found: list[Reg] = []
    for i in range(count):
        if i % 3 == 0:
            base = code.at(base, triple) if i else base
            found.append(base)
        else:
            found.append(code.at(base, step if i % 3 == 1 else double))
    return found
