"""Register tiles of integer convolutions: int16 in pairs, sums in int32, as `conv_tiles` has them for float32.

An element of an image and of weights is 32 bits that hold two neighbouring channels; one instruction multiplies both
pairs in every lane and adds the two products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.conv_tiles import LINE, PARAMETERS, RECORD, UNROLL, hidden, prefetch, tied, tile_shape
from cpu_fallback.integer_epilogues import IntegerEpilogue, Tile, narrow
from cpu_fallback.loops import splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.tiles import pair_multiply_add

TERMS = 2


def define_integer_table(code: Code, target: Target, vectors: Sequence[int], epilogue: IntegerEpilogue) -> str:
    """The name of a table of functions as `conv_tiles.define_table` makes it, for pairs of int16.

    Offsets into the result and its operands count bytes of int32 elements, whatever they hold.
    """
    shape = tile_shape(target)
    suffix = f"{shape.lanes}_{epilogue.digest}"
    name = "_".join(map(str, ("integer_conv_table", *vectors, suffix)))
    entries = []
    for rows in (shape.rows, shape.few):
        for width in range(1, shape.vectors + 1):
            tile = f"integer_conv_tiles{rows}x{width}_{suffix}"
            entries.append(f"ptr @{tile}" if width in vectors else "ptr null")
            if width in vectors:
                writer = _Tiles(target, rows, width, shape.lanes, epilogue)
                code.define(tile, PARAMETERS, attributes(target), writer.write)
    code.definitions[name] = f"@{name} = internal constant [{len(entries)} x ptr] [{', '.join(entries)}]"
    return name


@dataclass(frozen=True)
class _Tiles:
    """The function while it is written."""

    target: Target
    rows: int
    vectors: int
    lanes: int
    epilogue: IntegerEpilogue

    def write(self, code: Code) -> None:
        number, records, columns, a, a_row, a_jump, segments, step, run, w, c, c_row, ahead, ahead_tile, far, *rest = (
            Reg(text.split()[1], text.split()[0]) for text in PARAMETERS.split(", ")
        )
        words, channel = rest
        operands = self.epilogue.addresses(code, words, channel)
        back = code.binary("sub", narrow(code, channel, self.epilogue.dtype), channel)
        base = code.at(c, back)

        def tile(index: Reg, _: list[Reg]) -> list[Reg]:
            record = code.at(records, code.binary("mul", index, i64(RECORD)))
            start, count, offset = (code.load("i64", code.at(record, i64(nbytes)), 8) for nbytes in (0, 8, 16))
            place = code.at(base, narrow(code, offset, self.epilogue.dtype))
            for r in range(self.rows):
                line = narrow(code, code.binary("mul", c_row, i64(r)), self.epilogue.dtype) if r else i64(0)
                prefetch(code, code.at(place, line))
            lines = self._lines(code, code.at(a, start), a_row, a_jump)
            coming = code.at(ahead, code.binary("mul", index, ahead_tile))
            sums = self._product(code, lines, a_row, segments, step, run, w, coming, far)
            written = Tile(place, c_row, count, columns, self.rows, self.vectors, self.lanes)
            self.epilogue.write_tile(code, self.target, written, sums, self.epilogue.moved(code, operands, offset))
            return []

        code.loop(i64(0), number, i64(1), tile)

    def _lines(self, code: Code, first: Reg, a_row: Reg, a_jump: Reg) -> list[Reg]:
        """Every third row from the first on, in both halves of the tile: addressing modes reach the others."""
        half = tile_shape(self.target).few
        third = code.binary("mul", a_row, i64(3))
        found = [code.at(first, code.binary("mul", third, i64(i))) for i in range(-(-min(half, self.rows) // 3))]
        if self.rows > half:
            second = code.at(first, code.binary("add", code.binary("mul", a_row, i64(half)), a_jump))
            count = -(-(self.rows - half) // 3)
            found += [code.at(second, code.binary("mul", third, i64(i))) for i in range(count)]
        return found

    @property
    def _kind(self) -> str:
        return vector(self.lanes, "i32")

    def _product(
        self, code: Code, lines: list[Reg], a_row: Reg, segments: Reg, step: Reg, run: Reg, w: Reg, ahead: Reg, far: Reg
    ) -> list[Reg]:
        """The sums of a tile, row by row."""
        zero = [literal(self._kind, 0)] * (self.rows * self.vectors)

        def segment(index: Reg, carried: list[Reg]) -> list[Reg]:
            offset = code.binary("mul", index, step)
            moved = [hidden(code, code.at(line, offset)) for line in lines]
            whole = code.binary("and", run, i64(-UNROLL))
            both = [*carried, *moved]
            both = code.loop(i64(0), whole, i64(UNROLL), lambda _, x: self._steps(code, UNROLL, a_row, far, x), both)
            both = code.loop(whole, run, i64(1), lambda _, x: self._steps(code, 1, a_row, far, x), both)
            return both[: len(carried)]

        return code.loop(i64(0), segments, i64(1), segment, [w, ahead, *zero])[2:]

    def _steps(self, code: Code, count: int, a_row: Reg, far: Reg, carried: list[Reg]) -> list[Reg]:
        """Some steps of the depth; carried are the addresses of weights and of what is prefetched, sums, lines."""
        w, ahead, *rest = carried
        sums, lines = rest[: self.rows * self.vectors], rest[self.rows * self.vectors :]
        row_nbytes = self.vectors * self.lanes * 4
        for line in range(max(1, count * row_nbytes // LINE)):
            prefetch(code, code.at(ahead, i64(LINE * line)))
        twice = code.binary("shl", a_row, i64(1))
        for step in range(count):
            if step:
                w, sums[-1] = tied(code, w, sums[-1], self.target)
            factors = [
                code.load(self._kind, code.at(w, i64(step * row_nbytes + v * self.lanes * 4)), 4)
                for v in range(self.vectors)
            ]
            following = []
            for r in range(self.rows):
                line, third = self._line(r)
                place = lines[line] if not third else code.at(lines[line], a_row if third == 1 else twice)
                spread = splat(code, code.load("i32", code.at(place, i64(4 * step)), 4), self.lanes)
                for v, factor in enumerate(factors):
                    following.append(pair_multiply_add(code, self.target, spread, factor, sums[r * self.vectors + v]))
            sums = following
        moved = [hidden(code, code.at(line, i64(4 * count))) for line in lines]
        return [code.at(w, i64(count * row_nbytes)), code.at(ahead, far), *sums, *moved]

    def _line(self, row: int) -> tuple[int, int]:
        """(the number of the line that `row` is reached from, how many rows further it is)."""
        half = tile_shape(self.target).few
        if row < half:
            return row // 3, row % 3
        return -(-half // 3) + (row - half) // 3, (row - half) % 3
