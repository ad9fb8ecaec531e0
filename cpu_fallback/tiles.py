"""Register tiles: the innermost loop of every matrix product, as functions that all kernels of a module share.

A tile is some rows of C times some vectors of columns, held in registers while the depth is walked: a row of vectors
of B is loaded, and every element of a column of A is spread over the lanes and multiplied in. Tiles that are too small
to keep the multipliers busy split the depth over several sets of sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, element, i64, literal, vector
from cpu_fallback.loops import least, splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.vector_math import mangled

PARAMETERS = (
    "i64 %rows, i64 %depth, ptr %a, i64 %a_row, i64 %a_step, ptr %b, i64 %b_row, "
    "ptr %start, i64 %start_row, ptr %c, i64 %c_row, i64 %ahead"
)
NBYTES = {"float": 4, "double": 8, "i32": 4, "i64": 8}
HEIGHTS = (1, 2, 4, 6, 8)
SUMS = 8  # as many independent sums keep two multipliers with a latency of four busy


@dataclass(frozen=True)
class TileShape:
    """The largest tile: `rows` times `vectors` vectors of `lanes` elements of the LLVM type `scalar`."""

    rows: int
    vectors: int
    lanes: int
    scalar: str

    @property
    def nbytes(self) -> int:
        """Of one element."""
        return NBYTES[self.scalar]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.vectors * self.lanes

    @property
    def line(self) -> int:
        """Bytes of a row."""
        return self.width * self.nbytes

    def height(self, rows: int) -> int:
        """Rows of the tile that computes `rows` rows."""
        return next(height for height in HEIGHTS if height >= rows)


def tile_shape(target: Target, scalar: str) -> TileShape:
    """8 x 3 of 32 vector registers, 6 x 2 of 16: what benchmarks/gemm.py found fastest.

    More rows than 8 would need more addresses than there are general registers, and lines of rows that lie a power of
    two apart would push each other out of the first cache.
    """
    rows, vectors = (8, 3) if target.registers >= 32 else (6, 2)
    return TileShape(rows, vectors, target.vector_nbytes // NBYTES[scalar], scalar)


def tile_table(code: Code, target: Target, shape: TileShape, rows: Iterable[int], vectors: Iterable[int]) -> str:
    """The name of a table of tile functions for these numbers of rows and of vectors: see `call_tile`."""
    heights, widths = sorted({shape.height(count) for count in rows}), sorted(set(vectors))
    stem = f"tile_{shape.scalar}{shape.lanes}"
    name = "_".join(map(str, (stem, shape.rows, shape.vectors, "heights", *heights, "widths", *widths)))
    if name in code.definitions:
        return name
    for height in heights:
        for width in widths:
            tile = _Tile(shape, height, width)
            code.define(f"{stem}_{height}x{width}", PARAMETERS, attributes(target), tile.write)
    entries = []
    for count in range(1, shape.rows + 1):
        height = shape.height(count)
        for width in range(1, shape.vectors + 1):
            known = height in heights and width in widths
            entries.append(f"ptr @{stem}_{height}x{width}" if known else "ptr null")
    code.definitions[name] = f"@{name} = internal constant [{len(entries)} x ptr] [{', '.join(entries)}]"
    return name


def call_tile(code: Code, table: Reg, shape: TileShape, rows: Reg, vectors: Reg, *arguments: Reg) -> None:
    """C = start + A B for a tile of `rows` and `vectors`; `arguments` are those of PARAMETERS behind the first.

    All steps are in bytes: `a_row` from row to row of A, `a_step` from one step of the depth to the next, the others
    from row to row. Rows of vectors of B, `start` and C are contiguous.
    """
    place = code.binary("add", code.binary("mul", rows, i64(shape.vectors)), vectors)
    place = code.binary("sub", place, i64(shape.vectors + 1))
    function = code.load("ptr", code.at(table, code.binary("shl", place, i64(3))), 8)
    code.do(f"call void {function.name}({', '.join(map(str, (rows, *arguments)))})")


def multiply_add(code: Code, a: Reg, b: Reg, c: Reg) -> Reg:
    """a * b + c; rounded once if floating."""
    if element(a.type) in ("float", "double"):
        return code.call(a.type, f"llvm.fma.{mangled(a.type)}", a, b, c)
    return code.binary("add", code.binary("mul", a, b), c)


def add(code: Code, a: Reg, b: Reg) -> Reg:
    return code.binary("fadd" if element(a.type) in ("float", "double") else "add", a, b)


@dataclass(frozen=True)
class _Tile:
    """One tile function. With fewer rows than `height` the last one is computed and stored several times."""

    shape: TileShape
    height: int
    width: int

    def write(self, code: Code) -> None:
        count, depth, a, a_row, a_step, b, b_row, start, start_row, c, c_row, ahead = (
            Reg(text.split()[1], text.split()[0]) for text in PARAMETERS.split(", ")
        )
        last = code.binary("sub", count, i64(1))
        rows = [least(code, i64(i), last) if i else i64(0) for i in range(self.height)]
        cells = self.height * self.width
        chains = min(4, 1 << (-(-SUMS // cells) - 1).bit_length())
        sums = [literal(self._kind, 0)] * cells * chains
        lines = [_moved(code, a, a_row, row) for row in rows]

        def steps(count: int, index: Reg, carried: list[Reg]) -> list[Reg]:
            b_line, sums = carried[0], carried[1:]
            for step in range(count):
                chain = step * cells
                places = [code.at(line, index) for line in lines]
                sums[chain : chain + cells] = self._multiplied(code, places, b_line, sums[chain : chain + cells])
                import os
                if os.environ.get("PF","1") != "0":
                    for place in self._vectors(code, code.at(b_line, ahead)):
                        code.call("void", "llvm.prefetch.p0", place, Reg("0","i32"), Reg(os.environ.get("PFL","2"), "i32"), Reg("1","i32"))
                b_line = code.at(b_line, b_row)
                index = code.binary("add", index, a_step) if step + 1 < count else index
            return [b_line, *sums]

        whole = code.binary("mul", code.binary("and", depth, i64(-chains)), a_step)
        stride = code.binary("mul", a_step, i64(chains)) if chains > 1 else a_step
        carried = code.loop(i64(0), whole, stride, lambda i, x: steps(chains, i, x), [b, *sums])
        if chains > 1:
            end = code.binary("mul", depth, a_step)
            carried = code.loop(whole, end, a_step, lambda i, x: steps(1, i, x), carried)
        starts, places = (self._cells(code, rows, base, step) for base, step in ((start, start_row), (c, c_row)))
        for i, (begin, place) in enumerate(zip(starts, places, strict=True)):
            total = code.load(self._kind, begin, self.shape.nbytes)
            for part in carried[1 + i :: cells]:
                total = add(code, total, part)
            code.store(total, place, self.shape.nbytes)

    @property
    def _kind(self) -> str:
        return vector(self.shape.lanes, self.shape.scalar)

    def _vectors(self, code: Code, line: Reg) -> list[Reg]:
        return [code.at(line, i64(j * self.shape.lanes * self.shape.nbytes)) for j in range(self.width)]

    def _cells(self, code: Code, rows: list[Reg], base: Reg, step: Reg) -> list[Reg]:
        """Addresses of all vectors of the tile, row by row."""
        return [place for row in rows for place in self._vectors(code, _moved(code, base, step, row))]

    def _multiplied(self, code: Code, places: list[Reg], b_line: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums after one step of the depth: elements of A are at `places`."""
        nbytes = self.shape.nbytes
        factors = [code.load(self._kind, place, nbytes) for place in self._vectors(code, b_line)]
        result = []
        for i, place in enumerate(places):
            spread = splat(code, code.load(self.shape.scalar, place, nbytes), self.shape.lanes)
            for j, factor in enumerate(factors):
                result.append(multiply_add(code, spread, factor, sums[i * self.width + j]))
        return result


def _moved(code: Code, base: Reg, step: Reg, count: Reg) -> Reg:
    return base if count.name == "0" else code.at(base, code.binary("mul", step, count))
