"""Register tiles of convolutions: some output pixels times some vectors of output channels, the epilogue in registers.

Channels lie in the lanes. For every step of the depth one row of weights is loaded and one element of every pixel is
spread over the lanes; the depth is `segments` runs of contiguous elements, so that windows over an image need no copy
of their own for every pixel. While the depth is walked, lines of memory are asked for that will be needed soon: where
the tile is stored, then what its caller names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.epilogues import Epilogue, Place
from cpu_fallback.loops import lane_mask, splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.vector_math import mangled

UNROLL = 2
LINE = 64
PARAMETERS = (
    "i64 %count, ptr %records, i64 %columns, ptr %a, i64 %a_row, i64 %a_jump, i64 %segments, "
    "i64 %segment_step, i64 %run, ptr %w, ptr %c, i64 %c_row, ptr %ahead, i64 %ahead_tile, i64 %ahead_step"
)
RECORD = 24
"""Bytes of a tile in a list of tiles: where A starts, how many pixels, where C starts; offsets in bytes."""


@dataclass(frozen=True)
class TileShape:
    """At most `rows` pixels times `vectors` vectors of `lanes` float32; `few` pixels have a tile of their own."""

    rows: int
    few: int
    vectors: int
    lanes: int

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
    return TileShape(14, 7, 2, lanes) if target.registers >= 32 else TileShape(6, 3, 2, lanes)


def define_tiles(code: Code, target: Target, rows: int, vectors: int, epilogue: Epilogue, run: int = 0) -> str:
    """The name of the function that computes a list of tiles with one panel of weights; `call_tiles` calls it.

    C[rows, columns] = epilogue(A W) for each: row r of A starts a_row bytes after row r - 1, a_jump more where the
    second half of the tile begins; segment s of its depth starts s * segment_step bytes later and has `run` elements,
    known now if not 0. W is [segments * run, vectors *
    lanes]. Rows of C are c_row bytes apart. All `rows` of A must be readable, only those asked for are stored. While
    step k of the depth of tile i is computed, two lines from ahead + i * ahead_tile + k * ahead_step on are prefetched.
    """
    lanes = target.vector_nbytes // 4
    name = f"conv_tiles{rows}x{vectors}_{lanes}_{run}_{epilogue.digest}"
    parameters = PARAMETERS + "".join(f", ptr %e{i}" for i in range(len(epilogue.kinds)))
    writer = _Tiles(target, rows, vectors, lanes, run, epilogue)
    code.define(name, parameters, attributes(target), writer.write)
    return name


def call_tiles(code: Code, name: str, arguments: Sequence[Reg]) -> None:
    """`arguments` are those of PARAMETERS, then the addresses of the epilogue's operands for result 0 of the panel."""
    code.do(f"call void @{name}({', '.join(map(str, arguments))})")


@dataclass(frozen=True)
class _Stream:
    """What is prefetched: lines of C by row, then those the caller named."""

    count: Reg
    c: Reg
    c_row: Reg
    ahead: Reg
    step: Reg

    def ask(self, code: Code, k: Reg, vectors: int) -> None:
        storing = code.compare("icmp slt", k, self.count)
        base, step = code.select(storing, self.c, self.ahead), code.select(storing, self.c_row, self.step)
        place = code.at(base, code.binary("mul", k, step))
        for v in range(vectors):
            prefetch(code, code.at(place, i64(LINE * v)))


@dataclass(frozen=True)
class _Tiles:
    """The function while it is written."""

    target: Target
    rows: int
    vectors: int
    lanes: int
    run: int
    epilogue: Epilogue

    def write(self, code: Code) -> None:
        number, records, columns, a, a_row, a_jump, segments, step, run, w, c, c_row, ahead, ahead_tile, ahead_step = (
            Reg(text.split()[1], text.split()[0]) for text in PARAMETERS.split(", ")
        )
        operands = [Reg(f"%e{i}", "ptr") for i in range(len(self.epilogue.kinds))]

        def tile(index: Reg, _: list[Reg]) -> list[Reg]:
            record = code.at(records, code.binary("mul", index, i64(RECORD)))
            start, count, offset = (code.load("i64", code.at(record, i64(nbytes)), 8) for nbytes in (0, 8, 16))
            place = self._place(code, code.at(c, offset), c_row, count, columns)
            far = code.at(ahead, code.binary("mul", index, ahead_tile))
            stream = _Stream(count, place.base, c_row, far, ahead_step)
            lines = self._lines(code, code.at(a, start), a_row, a_jump)
            sums = self._product(code, lines, segments, step, run, w, stream)
            self.epilogue.write_tile(code, place, sums, self.epilogue.moved(code, operands, offset))
            return []

        code.loop(i64(0), number, i64(1), tile)

    def _lines(self, code: Code, first: Reg, a_row: Reg, a_jump: Reg) -> list[Reg]:
        half = tile_shape(self.target).few
        if self.rows <= half:
            return spaced(code, first, a_row, self.rows)
        second = code.at(first, code.binary("add", code.binary("mul", a_row, i64(half)), a_jump))
        return spaced(code, first, a_row, half) + spaced(code, second, a_row, self.rows - half)

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

    def _product(
        self, code: Code, lines: list[Reg], segments: Reg, step: Reg, run: Reg, w: Reg, stream: _Stream
    ) -> list[Reg]:
        run = i64(self.run) if self.run else run

        def segment(index: Reg, sums: list[Reg]) -> list[Reg]:
            offset = code.binary("mul", index, step)
            start = code.binary("mul", index, run)
            return self._walk(code, [code.at(line, offset) for line in lines], w, start, run, stream, sums)

        return code.loop(i64(0), segments, i64(1), segment, [literal(self._kind, 0)] * (self.rows * self.vectors))

    def _walk(
        self, code: Code, lines: list[Reg], w: Reg, start: Reg, run: Reg, stream: _Stream, sums: list[Reg]
    ) -> list[Reg]:
        """The sums after one segment, whose depth is counted from `start`."""
        panel = code.at(w, code.binary("mul", start, i64(self._row_nbytes)))

        def steps(count: int, k: Reg, sums: list[Reg]) -> list[Reg]:
            places = [code.binary("add", k, i64(step)) if step else k for step in range(count)]
            for place in places:
                stream.ask(code, code.binary("add", start, place), self.vectors)
            for place in places:
                sums = self._step(code, lines, panel, place, sums)
            return sums

        if self.run:
            return steps(self.run, i64(0), sums)
        whole = code.binary("and", run, i64(-UNROLL))
        sums = code.loop(i64(0), whole, i64(UNROLL), lambda k, x: steps(UNROLL, k, x), sums)
        return code.loop(whole, run, i64(1), lambda k, x: steps(1, k, x), sums)

    def _step(self, code: Code, lines: list[Reg], panel: Reg, k: Reg, sums: list[Reg]) -> list[Reg]:
        here = code.at(panel, code.binary("mul", k, i64(self._row_nbytes)))
        offset = code.binary("shl", k, i64(2))
        factors = [code.load(self._kind, code.at(here, i64(v * self.lanes * 4)), 4) for v in range(self.vectors)]
        following = []
        for r, line in enumerate(lines):
            spread = splat(code, code.load("float", code.at(line, offset), 4), self.lanes)
            for v, factor in enumerate(factors):
                following.append(fma(code, spread, factor, sums[r * self.vectors + v]))
        return following


def prefetch(code: Code, place: Reg) -> None:
    """Ask for a cache line to be brought into the second cache."""
    code.call("void", "llvm.prefetch.p0", place, *(Reg(hint, "i32") for hint in ("0", "2", "1")))


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
