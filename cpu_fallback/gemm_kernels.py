"""The matrix product as a kernel: the driver of its form, the tiles it needs, and its epilogue."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cpu_fallback import maps, packing
from cpu_fallback.blocks import FINISH
from cpu_fallback.code import Code, Reg, i64, lane_count, literal, vector
from cpu_fallback.dots import Dots
from cpu_fallback.gemm_driver import PARAMETERS, Arguments, Driver
from cpu_fallback.lanes import STORED, narrowed, widened, write_expr
from cpu_fallback.loops import (
    BROADCAST,
    CONTIGUOUS,
    STRIDED,
    Body,
    Mask,
    Read,
    Write,
    broadcasts,
    row_offsets,
    vector_loop,
)
from cpu_fallback.native import Target, attributes
from cpu_fallback.tiles import HEIGHTS, even_heights, tile_table
from gpu_engine.ir.expr import Expr

GROUP = 4
"""Vectors that an epilogue takes at a time: its chains of instructions are long, and a scheduler holds few of them."""


@dataclass(frozen=True)
class GemmKernel:
    """C = epilogue(A B) over batches, by content.

    `rows` and `vectors` are the sizes of tiles that can occur, if the driver uses tiles. `accesses` are those of
    the epilogue's operands along a row. `even`: all rows are summed in the same order, however many there are.
    Words: those of the driver, then addresses of the operands, strides in bytes over the batch axes of each, over
    rows of each, and over columns of strided ones.
    """

    driver: Driver | Dots
    rows: tuple[int, ...]
    vectors: tuple[int, ...]
    text: str
    accesses: tuple[str, ...]
    expr: Expr = field(compare=False, repr=False)
    even: bool = False

    def write(self, code: Code, target: Target) -> None:
        driver = self.driver.define(code, target)
        table = Reg("null", "ptr")
        if isinstance(self.driver, Driver):
            shape = self.driver.tile(target)
            heights = even_heights(shape) if self.even else HEIGHTS
            table = Reg(f"@{tile_table(code, target, shape, self.rows, self.vectors, heights)}", "ptr")
        finish = f"finish_{self._digest}"
        code.define(finish, FINISH, attributes(target), lambda inner: self._finish(inner, target))
        direct = self.expr.op == "arg" and self.expr.dtype == self.driver.dtype
        names = [word.name for word in packing.parameters(PARAMETERS)[:3]]
        given = [Reg(names[0], "ptr"), Reg(names[1], "i64"), Reg(names[2], "i64"), table]
        packing.call(code, f"@{driver}", *given, Reg(f"@{finish}", "ptr"), Reg(str(direct).lower(), "i1"))

    @property
    def _digest(self) -> str:
        content = repr((self.driver, self.text, self.accesses))
        return hashlib.blake2s(content.encode(), digest_size=8).hexdigest()

    def _finish(self, code: Code, target: Target) -> None:
        """The epilogue of some rows and columns of sums: whole vectors without masks where there is nothing else."""
        _, batch, row, column, rows, columns, sums = packing.parameters(FINISH)
        dtypes = [self.driver.dtype, *maps.operand_dtypes(self.expr)[1:]]
        (c, c_row, _), *operands = self._places(code, batch, row, column)
        lanes = maps.lane_count([self.expr], target)
        places = [(sums, i64(self.driver.line_nbytes(target)), None), *operands]
        accesses = (CONTIGUOUS, *self.accesses)

        def reads(index: Reg) -> list[Read]:
            return [
                Read(code.at(base, code.binary("mul", index, row_step)), dtype, access, step)
                for (base, row_step, step), dtype, access in zip(places, dtypes, accesses, strict=True)
            ]

        def result(index: Reg) -> Write:
            return Write(code.at(c, code.binary("mul", index, c_row)), self.expr.dtype)

        def body(loaded: list[Reg], _: Mask, __: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            return [write_expr(code, self.expr, dict(enumerate(loaded)), lane_count(loaded[0].type))], []

        def line(index: Reg, _: list[Reg]) -> list[Reg]:
            return vector_loop(code, target, lanes, (i64(0), columns), reads(index), [result(index)], body)

        def strip(index: Reg, _: list[Reg]) -> list[Reg]:
            lines = [code.binary("add", index, i64(i)) for i in range(height)]
            rectangle(code, width, columns, [*map(reads, lines)], [*map(result, lines)], body)
            return []

        height, width = self._group(lanes, target)
        full = i64(0)
        if STRIDED not in accesses:
            whole = code.compare("icmp eq", code.binary("urem", columns, i64(width)), i64(0))
            full = code.select(whole, code.binary("and", rows, i64(-height)), i64(0))
            code.loop(i64(0), full, i64(height), strip)
        code.loop(full, rows, i64(1), line)

    def _group(self, lanes: int, target: Target) -> tuple[int, int]:
        """Rows and columns that the epilogue takes at a time: `GROUP` vectors in the shape that tiles divide into."""
        tallest, panel = max(self.rows, default=1), max(self.vectors, default=1) * target.vector_nbytes
        if isinstance(self.driver, Dots):
            tallest, panel = self.driver.rows, self.driver.line_nbytes(target)
        across = math.gcd(panel // self.driver.dtype.itemsize // lanes, GROUP)
        return (GROUP // across if tallest >= GROUP // across else 1), across * lanes

    def _places(self, code: Code, batch: Reg, row: Reg, column: Reg) -> list[tuple[Reg, Reg, Reg | None]]:
        """(address, bytes from row to row, bytes from column to column if strided) of C and of every operand."""
        given = Arguments(self.driver, code)
        words, count = given.words, len(self.accesses)
        bases = [given.c, *words.pointers(count)]
        strides = [given.strides[2], *(words.numbers(self.driver.rank) for _ in self.accesses)]
        rows = [code.binary("mul", given.n, i64(self.expr.dtype.itemsize)), *words.numbers(count)]
        columns = [None, *(words.take() if access == STRIDED else None for access in self.accesses)]
        sizes = [self.expr.dtype.itemsize, *(dtype.itemsize for dtype in maps.operand_dtypes(self.expr)[1:])]
        offsets = row_offsets(code, batch, given.extents, strides) if self.driver.rank else [i64(0)] * len(bases)
        places = []
        for i, access in enumerate((CONTIGUOUS, *self.accesses)):
            place = code.at(code.at(bases[i], offsets[i]), code.binary("mul", row, rows[i]))
            if access != BROADCAST:
                place = code.at(place, code.binary("mul", column, columns[i] or i64(sizes[i])))
            places.append((place, rows[i], columns[i]))
        return places


def rectangle(
    code: Code, lanes: int, columns: Reg, reads: Sequence[Sequence[Read]], writes: Sequence[Write], body: Body
) -> None:
    """`vector_loop` over several rows at once, `lanes` columns at a time that divide the columns; nothing is strided or
    carried. The body sees the rows side by side: so many independent vectors keep the multipliers busy.
    """
    splats = [broadcasts(code, row, lanes) for row in reads]

    def step(index: Reg, _: list[Reg]) -> Sequence[Reg]:
        def place(stream: Read | Write) -> Reg:
            return code.at(stream.base, code.binary("mul", index, i64(stream.dtype.itemsize)))

        def loaded(read: Read, splat: Reg | None) -> Reg:
            if splat is not None:
                return splat
            stored = code.load(vector(lanes, STORED[read.dtype]), place(read), read.dtype.itemsize)
            return widened(code, stored, read.dtype)

        operands = [
            packing.joined(code, [loaded(row[i], known.get(i)) for row, known in zip(reads, splats, strict=True)])
            for i in range(len(reads[0]))
        ]
        (result,) = body(operands, lambda: literal(vector(lanes * len(reads), "i1"), True), [])[0]
        stored = narrowed(code, result, writes[0].dtype)
        for i, write in enumerate(writes):
            code.store(packing.lanes_of(code, stored, i * lanes, lanes), place(write), write.dtype.itemsize)
        return []

    code.loop(i64(0), columns, i64(lanes), step)
