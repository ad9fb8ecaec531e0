"""Register tiles: the innermost loop of every matrix product, as functions that all kernels of a module share.

A tile is some rows of C times some vectors of columns, held in registers while the depth is walked: a row of vectors
of B is loaded, and every element of a column of A is spread over the lanes and multiplied in. Tiles that are too small
to keep the multipliers busy split the depth over several sets of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, element, i64, lane_count, literal, vector
from cpu_fallback.loops import least, splat
from cpu_fallback.native import Target, attributes
from cpu_fallback.vector_math import mangled
from gpu_engine.ir.dtypes import INT8, UINT8, DType

PARAMETERS = (
    "i64 %rows, i64 %depth, ptr %a, i64 %a_row, i64 %a_step, ptr %b, i64 %b_row, "
    "ptr %start, i64 %start_row, ptr %c, i64 %c_row, ptr %ahead, i64 %ahead_step"
)
NBYTES = {"float": 4, "double": 8, "i32": 4, "i64": 8}
HEIGHTS = (1, 2, 4, 6, 8)
LINE = 64
AHEAD = 24
"""Lines of B for each chain of sums from the one multiplied to the one fetched: 8 rows x 768 x 768 gain up to 1.6."""
SUMS = 8
"""As many independent sums keep two multipliers with a latency of four busy."""


@dataclass(frozen=True)
class TileShape:
    """The largest tile: `rows` times `vectors` vectors of `lanes` elements of the LLVM type `scalar`.

    With `terms` above 1 an i32 element of A and of B holds so many narrow integers, whose products a step adds up:
    two int16 each, or four uint8 of A and int8 of B, by a dot instruction if there are `dots`, else in pairs that must
    not saturate.
    """

    rows: int
    vectors: int
    lanes: int
    scalar: str
    terms: int = 1
    dots: bool = False

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


def tile_shape(target: Target, scalar: str, terms: int = 1) -> TileShape:
    """8 x 3 of 32 vector registers, 6 x 2 of 16: what benchmarks/gemm.py found fastest.

    More rows than 8 would need more addresses than there are general registers, and lines of rows that lie a power of
    two apart would push each other out of the first cache.
    """
    rows, vectors = (8, 3) if target.registers >= 32 else (6, 2)
    return TileShape(rows, vectors, target.vector_nbytes // NBYTES[scalar], scalar, terms, has_dots(target))


def chains(cells: int) -> int:
    """Sets of sums over which a tile of so many vectors splits the depth."""
    return min(4, 1 << (-(-SUMS // cells) - 1).bit_length())


def even_heights(shape: TileShape) -> tuple[int, ...]:
    """Heights of tiles that sum in the order of the largest: a row's bits do not depend on the tile that it is in."""

    def is_even(height: int) -> bool:
        return all(chains(height * width) == chains(shape.rows * width) for width in range(1, shape.vectors + 1))

    return tuple(filter(is_even, HEIGHTS))


def tile_table(
    code: Code,
    target: Target,
    shape: TileShape,
    rows: Iterable[int],
    vectors: Iterable[int],
    heights: Sequence[int] = HEIGHTS,
) -> str:
    """The name of a table of tile functions for these numbers of rows and of vectors: see `call_tile`.

    Rows are computed by tiles of the next of `heights`.
    """
    height_of = {count: next(height for height in heights if height >= count) for count in range(1, shape.rows + 1)}
    wanted, widths = {height_of[count] for count in rows}, set(vectors)
    stem = f"tile_{shape.scalar}{shape.lanes}_{shape.terms}"
    content = (stem, shape.rows, shape.vectors, *heights, "of", *sorted(wanted), "widths", *sorted(widths))
    name = "_".join(map(str, content))
    if name in code.definitions:
        return name
    entries = []
    for count, alone in [*((count, True) for count in range(1, shape.rows + 1)), (shape.rows, False)]:
        for width in range(1, shape.vectors + 1):
            height = height_of[count]
            function = f"{stem}_{height}x{width}" + "_of_many" * (not alone)
            known = height in wanted and width in widths
            if known:
                code.define(function, PARAMETERS, attributes(target), _Tile(shape, height, width, alone).write)
            entries.append(f"ptr @{function}" if known else "ptr null")
    code.definitions[name] = f"@{name} = internal constant [{len(entries)} x ptr] [{', '.join(entries)}]"
    return name


def call_tile(code: Code, table: Reg, shape: TileShape, many: Reg, rows: Reg, vectors: Reg, *arguments: Reg) -> None:
    """C = start + A B for a tile of `rows` and `vectors`; `arguments` are those of PARAMETERS behind the first.

    All steps are in bytes: `a_row` from row to row of A, `a_step` from one step of the depth to the next, the others
    from row to row. Rows of vectors of B, `start` and C are contiguous. With `many`, other tiles multiply the same B:
    then with every step a whole tile has the line at `ahead` brought into the second cache, and goes on by
    `ahead_step`.
    """
    whole = code.compare("icmp eq", rows, i64(shape.rows))
    row = code.select(code.binary("and", many, whole), i64(shape.rows + 1), rows)
    place = code.binary("add", code.binary("mul", row, i64(shape.vectors)), vectors)
    place = code.binary("sub", place, i64(shape.vectors + 1))
    function = code.load("ptr", code.at(table, code.binary("shl", place, i64(3))), 8)
    code.do(f"call void {function.name}({', '.join(map(str, (rows, *arguments)))})")


def multiply_add(code: Code, a: Reg, b: Reg, c: Reg) -> Reg:
    """a * b + c; rounded once if floating."""
    if element(a.type) in ("float", "double"):
        return code.call(a.type, f"llvm.fma.{mangled(a.type)}", a, b, c)
    return code.binary("add", code.binary("mul", a, b), c)


def narrow_multiply_add(code: Code, terms: int, a: Reg, b: Reg, c: Reg) -> Reg:
    """c plus the sum of the products of the narrow integers in every lane of a and b, exactly; on x86.

    https://www.intel.com/content/www/us/en/docs/intrinsics-guide (vpdpbusd, vpmaddwd)
    """
    lanes = lane_count(c.type)
    if terms == 4:
        return code.call(c.type, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", c, a, b)
    name = {16: "avx512.pmaddw.d.512", 8: "avx2.pmadd.wd", 4: "sse2.pmadd.wd"}[lanes]
    pairs = [code.convert("bitcast", x, vector(2 * lanes, "i16")) for x in (a, b)]
    return add(code, code.call(c.type, f"llvm.x86.{name}", *pairs), c)


def pair_multiply_add(code: Code, target: Target, a: Reg, b: Reg, c: Reg) -> Reg:
    """c plus the sum of the products of the two int16 in every lane of a and b: one dot instruction (vpdpwssd) if there
    is one."""
    names = target.features.split(",")
    if "+avxvnni" in names or has_dots(target):
        return code.call(c.type, f"llvm.x86.avx512.vpdpwssd.{32 * lane_count(c.type)}", c, a, b)
    return narrow_multiply_add(code, 2, a, b, c)


def saturating_multiply_add(code: Code, a: Reg, b: Reg, c: Reg) -> Reg:
    """c plus the sum of four products of unsigned bytes of a and signed ones of b in every lane; on x86, exactly where
    the sum of neither pair of products leaves 16 bits (vpmaddubsw, vpmaddwd)."""
    lanes = lane_count(c.type)
    bytes_of, halves = vector(4 * lanes, "i8"), vector(2 * lanes, "i16")
    name = {16: "avx512.pmaddubs.w.512", 8: "avx2.pmadd.ub.sw", 4: "ssse3.pmadd.ub.sw.128"}[lanes]
    pairs = code.call(halves, f"llvm.x86.{name}", *(code.convert("bitcast", x, bytes_of) for x in (a, b)))
    ones = code.convert("bitcast", literal(halves, 1), c.type)
    return narrow_multiply_add(code, 2, code.convert("bitcast", pairs, c.type), ones, c)


def narrow_terms(target: Target, a: DType, b: DType) -> int:
    """How many products of these bytes a lane adds up in one step; 0 if this processor has no instruction for it."""
    if not target.x86 or not {a, b} <= {INT8, UINT8}:
        return 0
    return 4 if has_dots(target) and (a, b) == (UINT8, INT8) else 2


def has_dots(target: Target) -> bool:
    """Whether there is an instruction that multiplies four unsigned with four signed bytes and adds all up."""
    return target.x86 and "+avx512vnni" in target.features and "+avx512vl" in target.features


def has_byte_pairs(target: Target) -> bool:
    """Whether `saturating_multiply_add` has its instruction."""
    return target.x86 and (target.vector_nbytes > 16 or "+ssse3" in target.features.split(","))


def add(code: Code, a: Reg, b: Reg) -> Reg:
    return code.binary("fadd" if element(a.type) in ("float", "double") else "add", a, b)


@dataclass(frozen=True)
class _Tile:
    """One tile function. With fewer rows than `height` the last one is computed several times, and stored last of all.

    `alone` it streams B from afar, so it fetches what it needs next; else B is near.
    """

    shape: TileShape
    height: int
    width: int
    alone: bool

    def write(self, code: Code) -> None:
        count, depth, a, a_row, a_step, b, b_row, start, start_row, c, c_row, ahead, ahead_step = (
            Reg(text.split()[1], text.split()[0]) for text in PARAMETERS.split(", ")
        )
        last = code.binary("sub", count, i64(1))
        exact = not self.alone and self.height == self.shape.rows
        rows = [least(code, i64(i), last) if i and not exact else i64(i) for i in range(self.height)]
        cells = self.height * self.width
        several_sums = chains(cells)
        sums = [literal(self._kind, 0)] * cells * several_sums
        lines = [_opaque(code, _moved(code, a, a_row, row)) for row in rows]
        distance = code.binary("mul", b_row, i64(AHEAD * several_sums))

        def steps(count: int, index: Reg, carried: list[Reg]) -> list[Reg]:
            """Some steps of the depth, one for each chain of sums: B is read from front to back."""
            b_line, coming, *sums = carried
            for step in range(count):
                chain = step * cells
                here = code.binary("add", index, _times(code, a_step, step))
                places = [code.at(line, here) for line in lines]
                sums[chain : chain + cells] = self._multiplied(code, places, b_line, sums[chain : chain + cells])
                if self.alone:
                    nbytes = self.width * self.shape.lanes * self.shape.nbytes
                    self._prefetch(code, code.at(b_line, distance), nbytes, 3)
                else:
                    self._prefetch(code, coming, 1, 2)
                    coming = code.at(coming, ahead_step)
                b_line = code.at(b_line, b_row)
            return [b_line, coming, *sums]

        end, several = code.binary("mul", depth, a_step), _times(code, a_step, several_sums)
        whole = code.binary("mul", code.binary("udiv", depth, i64(several_sums)), several)
        carried = code.loop(i64(0), whole, several, lambda i, x: steps(several_sums, i, x), [b, ahead, *sums])
        if several_sums > 1:
            carried = code.loop(whole, end, a_step, lambda i, x: steps(1, i, x), carried)
        totals = [
            code.load(self._kind, place, self.shape.nbytes) for place in self._cells(code, rows, start, start_row)
        ]  # fmt: skip
        for i, part in enumerate(carried[2:]):
            totals[i % cells] = add(code, totals[i % cells], part)
        for total, place in zip(totals, self._cells(code, rows, c, c_row), strict=True):
            code.store(total, place, self.shape.nbytes)

    @property
    def _kind(self) -> str:
        return vector(self.shape.lanes, self.shape.scalar)

    def _vectors(self, code: Code, line: Reg) -> list[Reg]:
        return [code.at(line, i64(j * self.shape.lanes * self.shape.nbytes)) for j in range(self.width)]

    def _cells(self, code: Code, rows: list[Reg], base: Reg, step: Reg) -> list[Reg]:
        """Addresses of all vectors of the tile, row by row."""
        return [place for row in rows for place in self._vectors(code, _moved(code, base, step, row))]

    def _prefetch(self, code: Code, start: Reg, nbytes: int, locality: int) -> None:
        read, level, data = Reg("0", "i32"), Reg(str(locality), "i32"), Reg("1", "i32")
        for offset in range(0, nbytes, LINE):
            code.call("void", "llvm.prefetch.p0", code.at(start, i64(offset)), read, level, data)

    def _multiplied(self, code: Code, places: list[Reg], b_line: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums after one step of the depth: elements of A are at `places`."""
        nbytes = self.shape.nbytes
        factors = [code.load(self._kind, place, nbytes) for place in self._vectors(code, b_line)]
        result = []
        for i, place in enumerate(places):
            spread = splat(code, code.load(self.shape.scalar, place, nbytes), self.shape.lanes)
            for j, factor in enumerate(factors):
                operands = spread, factor, sums[i * self.width + j]
                result.append(self._product(code, *operands))
        return result

    def _product(self, code: Code, a: Reg, b: Reg, c: Reg) -> Reg:
        """a * b + c, of all terms."""
        terms = self.shape.terms
        if terms == 4 and not self.shape.dots:
            return saturating_multiply_add(code, a, b, c)
        return narrow_multiply_add(code, terms, a, b, c) if terms > 1 else multiply_add(code, a, b, c)


def _moved(code: Code, base: Reg, step: Reg, count: Reg) -> Reg:
    return base if count.name == "0" else code.at(base, code.binary("mul", step, count))


def _opaque(code: Code, address: Reg) -> Reg:
    """The address. LLVM would compute evenly spaced ones from each other in every step, not keep them in registers."""
    return code.call("ptr", "llvm.launder.invariant.group.p0", address)


def _times(code: Code, x: Reg, count: int) -> Reg:
    return i64(0) if count == 0 else x if count == 1 else code.binary("mul", x, i64(count))
