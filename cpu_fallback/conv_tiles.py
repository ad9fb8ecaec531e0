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
from cpu_fallback.epilogues import Epilogue, Place, stack
from cpu_fallback.integers import least
from cpu_fallback.loops import lane_mask, splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.vector_math import mangled

UNROLL = 4
"""Steps of the depth between two tests for its end."""
CHAIN = 128
"""Products in a sum, behind which it is put aside."""
LINE = 64
AHEAD = 32 << 10
"""Bytes of weights between what is read and what is asked for: memory answers meanwhile (benchmarks/conv.py)."""
PARAMETERS = (
    "i64 %count, ptr %records, i64 %columns, ptr %a, i64 %a_row, i64 %a_jump, i64 %segments, "
    "i64 %segment_step, i64 %run, ptr %w, ptr %c, i64 %c_row, ptr %ahead, i64 %ahead_tile, i64 %ahead_step, "
    "ptr %operands, i64 %channel"
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


def define_table(code: Code, target: Target, vectors: Sequence[int], epilogue: Epilogue, run: int = 0) -> str:
    """The name of a table of functions, for `call_tiles`, that compute lists of tiles with one panel of `vectors`.

    C[rows, columns] = epilogue(A W) for each: row r of A starts a_row bytes after row r - 1, a_jump more where the
    second half of the tile begins; segment s of its depth starts s * segment_step bytes later and has `run` elements,
    known now if not 0. W is [segments * run, vectors * lanes]. Rows of C are c_row bytes apart, `channel` bytes behind
    those of channel 0; `operands` are the epilogue's, as argument words. All rows of A that a tile has must be
    readable, only those asked for are stored. With every UNROLL steps of the depth of tile i as much is prefetched as
    is read of W meanwhile, from ahead + i * ahead_tile on, each time ahead_step bytes further.
    """
    shape = tile_shape(target)
    suffix = f"{shape.lanes}_{run}_{epilogue.digest}"
    name = "_".join(map(str, ("conv_table", *vectors, suffix)))
    entries = []
    for rows in (shape.rows, shape.few):
        for width in range(1, shape.vectors + 1):
            tile = f"conv_tiles{rows}x{width}_{suffix}"
            entries.append(f"ptr @{tile}" if width in vectors else "ptr null")
            if width in vectors:
                writer = _Tiles(target, rows, width, shape.lanes, run, epilogue)
                code.define(tile, PARAMETERS, attributes(target), writer.write)
    code.definitions[name] = f"@{name} = internal constant [{len(entries)} x ptr] [{', '.join(entries)}]"
    return name


def weights_ahead(code: Code, w: Reg, vectors: Reg, shape: TileShape, distance: Reg) -> tuple[Reg, Reg, Reg]:
    """The three arguments that have a tile prefetch weights `distance` bytes behind those that it reads from `w`."""
    return code.at(w, distance), i64(0), code.binary("mul", vectors, i64(shape.lanes * 4 * UNROLL))


def call_tiles(code: Code, table: Reg, shape: TileShape, rows: int, vectors: Reg, arguments: Sequence[Reg]) -> None:
    """`rows` is one of the two numbers that tiles have; `arguments` are those of PARAMETERS."""
    first = -1 if rows == shape.rows else shape.vectors - 1
    place = code.binary("shl", code.binary("add", vectors, i64(first)), i64(3))
    function = code.load("ptr", code.at(table, place), 8)
    code.do(f"call void {function.name}({', '.join(map(str, arguments))})")


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
        number, records, columns, a, a_row, a_jump, segments, step, run, w, c, c_row, ahead, ahead_tile, far, *rest = (
            Reg(text.split()[1], text.split()[0]) for text in PARAMETERS.split(", ")
        )
        operands = self.epilogue.addresses(code, rest[0], rest[1])

        def tile(index: Reg, _: list[Reg]) -> list[Reg]:
            record = code.at(records, code.binary("mul", index, i64(RECORD)))
            start, count, offset = (code.load("i64", code.at(record, i64(nbytes)), 8) for nbytes in (0, 8, 16))
            place = self._place(code, code.at(c, offset), c_row, count, columns)
            moved = self.epilogue.moved(code, operands, offset)
            for base in (place.base, *self.epilogue.followed(moved)):
                for line in every(code, base, c_row, self.rows):
                    for nbytes in range(0, self._row_nbytes, LINE):
                        prefetch(code, code.at(line, i64(nbytes)))
            lines = self._lines(code, code.at(a, start), a_row, a_jump)
            coming = code.at(ahead, code.binary("mul", index, ahead_tile))
            sums = self._product(code, lines, a_row, segments, step, run, w, coming, far)
            self.epilogue.write_tile(code, place, sums, moved)
            return []

        code.loop(i64(0), number, i64(1), tile)

    def _lines(self, code: Code, first: Reg, a_row: Reg, a_jump: Reg) -> list[Reg]:
        """Every third row from the first on, in both halves of the tile: addressing modes reach the others."""
        half = tile_shape(self.target).few
        third = code.binary("mul", a_row, i64(3))
        found = every(code, first, third, -(-min(half, self.rows) // 3))
        if self.rows > half:
            second = code.at(first, code.binary("add", code.binary("mul", a_row, i64(half)), a_jump))
            found += every(code, second, third, -(-(self.rows - half) // 3))
        return found

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
        self, code: Code, lines: list[Reg], a_row: Reg, segments: Reg, step: Reg, run: Reg, w: Reg, ahead: Reg, far: Reg
    ) -> list[Reg]:
        """The sums of a tile, row by row."""
        zero = [literal(self._kind, 0)] * (self.rows * self.vectors)
        aside = _Aside(code, stack(code, self.rows * self._row_nbytes), self._kind, 4 * self.lanes)
        several, longest = self.run or UNROLL, i64(max(CHAIN, self.run))

        def segment(index: Reg, carried: list[Reg]) -> list[Reg]:
            offset = code.binary("mul", index, step)
            moved = [hidden(code, code.at(line, offset)) for line in lines]
            whole = run if self.run else code.binary("and", run, i64(-UNROLL))

            def part(start: Reg, carried: list[Reg]) -> list[Reg]:
                stop = least(code, code.binary("add", start, longest), whole)
                return walked(start, stop, several, carried)

            both = code.loop(i64(0), whole, longest, part, [*carried, *moved])
            return (both if self.run else walked(whole, run, 1, both))[: len(carried)]

        def walked(start: Reg, stop: Reg, count: int, carried: list[Reg]) -> list[Reg]:
            """A part of the depth, `count` steps at a time."""
            length, used, *rest = carried
            w, ahead, *rest = code.loop(
                start, stop, i64(count), lambda _, x: self._steps(code, count, a_row, far, x), rest
            )
            length = code.binary("add", length, code.binary("sub", stop, start))
            length, used, *sums = aside.shortened(length, used, rest[: len(zero)])
            return [length, used, w, ahead, *sums, *rest[len(zero) :]]

        _, used, _, _, *sums = code.loop(i64(0), segments, i64(1), segment, [i64(0), i64(0), w, ahead, *zero])
        return aside.total(used, sums)

    def _steps(self, code: Code, count: int, a_row: Reg, far: Reg, carried: list[Reg]) -> list[Reg]:
        """Some steps of the depth; carried are the addresses of weights and of what is prefetched, sums, lines."""
        w, ahead, *rest = carried
        sums, lines = rest[: self.rows * self.vectors], rest[self.rows * self.vectors :]
        for line in range(max(1, count * self._row_nbytes // LINE)):
            prefetch(code, code.at(ahead, i64(LINE * line)))
        twice = code.binary("shl", a_row, i64(1))
        for step in range(count):
            if step:
                w, sums[-1] = tied(code, w, sums[-1], self.target)
            factors = [
                code.load(self._kind, code.at(w, i64((step * self.vectors + v) * self.lanes * 4)), 4)
                for v in range(self.vectors)
            ]
            following = []
            for r in range(self.rows):
                line, third = self._line(r)
                place = lines[line] if not third else code.at(lines[line], a_row if third == 1 else twice)
                spread = splat(code, code.load("float", code.at(place, i64(4 * step)), 4), self.lanes)
                for v, factor in enumerate(factors):
                    following.append(fma(code, spread, factor, sums[r * self.vectors + v]))
            sums = following
        moved = [hidden(code, code.at(line, i64(4 * count))) for line in lines]
        return [code.at(w, i64(count * self._row_nbytes)), code.at(ahead, far), *sums, *moved]

    def _line(self, row: int) -> tuple[int, int]:
        """(the number of the line that `row` is reached from, how many rows further it is)."""
        half = tile_shape(self.target).few
        if row < half:
            return row // 3, row % 3
        return -(-half // 3) + (row - half) // 3, (row - half) % 3


@dataclass(frozen=True)
class _Aside:
    """Sums of a tile, put aside before they get long: sums of sums keep the error from growing with the depth."""

    code: Code
    memory: Reg
    kind: str
    nbytes: int

    def shortened(self, length: Reg, used: Reg, sums: list[Reg]) -> list[Reg]:
        """[products in a sum, whether some are put aside, sums] behind `length` products; new ones begin at CHAIN."""
        code = self.code

        def put() -> list[Reg]:
            for total, place in zip(self.total(used, sums), self._places(len(sums)), strict=True):
                code.store(total, place, 4)
            return [i64(0), i64(1), *[literal(self.kind, 0)] * len(sums)]

        return code.either(code.compare("icmp sge", length, i64(CHAIN)), put, lambda: [length, used, *sums])

    def total(self, used: Reg, sums: list[Reg]) -> list[Reg]:
        """With what is put aside, if there is any."""
        code = self.code

        def added() -> list[Reg]:
            places = self._places(len(sums))
            return [code.binary("fadd", code.load(self.kind, p, 4), x) for p, x in zip(places, sums, strict=True)]

        return code.either(code.compare("icmp ne", used, i64(0)), added, lambda: sums)

    def _places(self, count: int) -> list[Reg]:
        return [self.code.at(self.memory, i64(i * self.nbytes)) for i in range(count)]


def hidden(code: Code, value: Reg) -> Reg:
    """The same value, of which the optimizer knows nothing: else it derives rows from each other in every step."""
    return code.let(value.type, f'call {value.type} asm "", "=r,0"({value})')


def prefetch(code: Code, place: Reg) -> None:
    """Ask for a cache line to be brought into the second cache."""
    code.call("void", "llvm.prefetch.p0", place, *(Reg(hint, "i32") for hint in ("0", "2", "1")))


def fma(code: Code, a: Reg, b: Reg, c: Reg) -> Reg:
    return code.call(a.type, f"llvm.fma.{mangled(a.type)}", a, b, c)


def tied(code: Code, address: Reg, value: Reg, target: Target) -> tuple[Reg, Reg]:
    """Both as they are, but what is read from the address is read after `value` is computed: no step of the depth
    begins before the one before is done with its registers."""
    letter = "v" if target.masked else "x"
    kind = f"{{ {address.type}, {value.type} }}"
    both = code.let(kind, f'call {kind} asm "", "=r,={letter},0,1"({address}, {value})')
    return code.let(address.type, f"extractvalue {both}, 0"), code.let(value.type, f"extractvalue {both}, 1")


def every(code: Code, base: Reg, step: Reg, count: int) -> list[Reg]:
    """base, base + step, base + 2 step, ..."""
    found = [base]
    for _ in range(count - 1):
        found.append(code.at(found[-1], step))
    return found
