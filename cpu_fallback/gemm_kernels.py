"""The matrix product as a kernel: the driver of its form, the tiles it needs, and its epilogue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cpu_fallback import packing
from cpu_fallback.blocks import FINISH
from cpu_fallback.code import Code, Reg, i64, literal, vector
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
from cpu_fallback.maps import lane_count, operand_dtypes
from cpu_fallback.native import Target, attributes
from cpu_fallback.tiles import tile_table
from gpu_engine.ir.expr import Expr


@dataclass(frozen=True)
class GemmKernel:
    """C = epilogue(A B) over batches, by content.

    `rows` and `vectors` are the sizes of tiles that can occur, if the driver uses tiles. `accesses` are those of the
    epilogue's operands along a row. Words: those of the driver, then addresses of the operands, strides in bytes over
    the batch axes of each, over rows of each, and over columns of strided ones.
    """

    driver: Driver | Dots
    rows: tuple[int, ...]
    vectors: tuple[int, ...]
    text: str
    accesses: tuple[str, ...]
    expr: Expr = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        driver = self.driver.define(code, target)
        table = Reg("null", "ptr")
        if isinstance(self.driver, Driver):
            shape = self.driver.tile(target)
            table = Reg(f"@{tile_table(code, target, shape, self.rows, self.vectors)}", "ptr")
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
        dtypes = [self.driver.dtype, *operand_dtypes(self.expr)[1:]]
        (c, c_row, _), *operands = self._places(code, batch, row, column)
        lanes = lane_count([self.expr], target)
        places = [(sums, i64(self.driver.line_nbytes(target)), None), *operands]
        accesses = (CONTIGUOUS, *self.accesses)

        def reads(index: Reg) -> list[Read]:
            return [
                Read(code.at(base, code.binary("mul", index, row_step)), dtype, access, step)
                for (base, row_step, step), dtype, access in zip(places, dtypes, accesses, strict=True)
            ]

        def walked(step: Callable[..., list[Reg]]) -> list[Reg]:
            def line(index: Reg, _: list[Reg]) -> list[Reg]:
                result = Write(code.at(c, code.binary("mul", index, c_row)), self.expr.dtype)
                step(code, target, lanes, (i64(0), columns), reads(index), [result], body)
                return []

            return code.loop(i64(0), rows, i64(1), line)

        def body(loaded: list[Reg], _: Mask, __: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            return [write_expr(code, self.expr, dict(enumerate(loaded)), lanes)], []

        whole = code.compare("icmp eq", code.binary("urem", columns, i64(lanes)), i64(0))
        if STRIDED in accesses:
            walked(vector_loop)
        else:
            code.either(whole, lambda: walked(whole_vector_loop), lambda: walked(vector_loop))

    def _places(self, code: Code, batch: Reg, row: Reg, column: Reg) -> list[tuple[Reg, Reg, Reg | None]]:
        """(address, bytes from row to row, bytes from column to column if strided) of C and of every operand."""
        given = Arguments(self.driver, code)
        words, count = given.words, len(self.accesses)
        bases = [given.c, *words.pointers(count)]
        strides = [given.strides[2], *(words.numbers(self.driver.rank) for _ in self.accesses)]
        rows = [code.binary("mul", given.n, i64(self.expr.dtype.itemsize)), *words.numbers(count)]
        columns = [None, *(words.take() if access == STRIDED else None for access in self.accesses)]
        sizes = [self.expr.dtype.itemsize, *(dtype.itemsize for dtype in operand_dtypes(self.expr)[1:])]
        offsets = row_offsets(code, batch, given.extents, strides) if self.driver.rank else [i64(0)] * len(bases)
        places = []
        for i, access in enumerate((CONTIGUOUS, *self.accesses)):
            place = code.at(code.at(bases[i], offsets[i]), code.binary("mul", row, rows[i]))
            if access != BROADCAST:
                place = code.at(place, code.binary("mul", column, columns[i] or i64(sizes[i])))
            places.append((place, rows[i], columns[i]))
        return places


def whole_vector_loop(
    code: Code,
    _: Target,
    lanes: int,
    span: tuple[Reg, Reg],
    reads: Sequence[Read],
    writes: Sequence[Write],
    body: Body,
) -> list[Reg]:
    """`vector_loop` where the last vector is full, nothing is strided and nothing carried."""
    splats = broadcasts(code, reads, lanes)

    def step(index: Reg, _: list[Reg]) -> Sequence[Reg]:
        operands = []
        for i, read in enumerate(reads):
            kind, place = vector(lanes, STORED[read.dtype]), _place(read, index)
            operands.append(
                splats[i] if i in splats else widened(code, code.load(kind, place, read.dtype.itemsize), read.dtype)
            )  # fmt: skip
        results, following = body(operands, lambda: literal(vector(lanes, "i1"), True), [])
        for write, result in zip(writes, results, strict=True):
            code.store(narrowed(code, result, write.dtype), _place(write, index), write.dtype.itemsize)
        return following

    def _place(stream: Read | Write, index: Reg) -> Reg:
        return code.at(stream.base, code.binary("mul", index, i64(stream.dtype.itemsize)))

    return code.loop(span[0], span[1], i64(lanes), step)
