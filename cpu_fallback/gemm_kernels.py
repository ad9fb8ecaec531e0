"""The matrix product as a kernel: which tiles of C are computed in which order, and by which thread.

Blocks of rows of A are packed once and stay in the second cache while all panels of B pass by; a panel stays near
while the tiles of the block pass over it. Sums of a block and a panel are kept on the stack, where the epilogue finds
them; without an epilogue the tiles write to C itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cpu_fallback import packing
from cpu_fallback.caches import Caches
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.lanes import COMPUTED, write_expr
from cpu_fallback.loops import (
    CONTIGUOUS,
    STRIDED,
    THREAD,
    THREADS,
    Mask,
    Read,
    Words,
    Write,
    least,
    row_offsets,
    thread_share,
    vector_loop,
)
from cpu_fallback.maps import lane_count
from cpu_fallback.native import Target
from cpu_fallback.tiles import TileShape, call_tile, tile_shape, tile_table
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr

PACKED, PLAIN, TRANSPOSED = "packed", "plain", "transposed"
BLOCK_TILES = (4, 16)
"""The least and the greatest number of tiles of rows in a block."""
FEW_PANELS = 4
"""With fewer panels than these to multiply with, packing a block of A does not pay."""


@dataclass(frozen=True)
class GemmKernel:
    """C = epilogue(A B) over batches, by content.

    `dtype` is what is multiplied and summed in. B comes in panels (`PACKED`), or as it is: rows (`PLAIN`) or columns
    (`TRANSPOSED`) contiguous. `rows` and `vectors` are the sizes of tiles that can occur. `packs`: blocks of A may be
    packed. `accesses` are those of the epilogue's operands along a row. `rank` batch axes are left.

    Words: addresses of A, B, C and operands, scratch for A if it packs, scratch for B if not packed; m, n, k; bytes
    from row to row and from step to step of A, and from line to line of B; with `packs` the number of threads
    that the scratch for A has room for and the bytes of each; the batches; extents of the batch axes but the first;
    strides over the batch axes of A, B, C and each operand; strides over rows of each operand, and over columns of
    strided ones. All strides are in bytes.
    """

    dtype: DType
    b_form: str
    rows: tuple[int, ...]
    vectors: tuple[int, ...]
    packs: bool
    text: str
    accesses: tuple[str, ...]
    rank: int
    caches: Caches
    expr: Expr = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        _Writer(self, code, target).write()


@dataclass(frozen=True)
class _Rows:
    """A block of rows of A where tiles find it: steps from tile to tile, row to row and along the depth."""

    base: Reg
    tile: Reg
    row: Reg
    step: Reg


class _Writer:
    def __init__(self, kernel: GemmKernel, code: Code, target: Target) -> None:
        self.kernel, self.code, self.target = kernel, code, target
        self.shape: TileShape = tile_shape(target, COMPUTED[kernel.dtype])
        self.table = tile_table(code, target, self.shape, kernel.rows, kernel.vectors)
        words, count = Words(code), len(kernel.accesses)
        self.bases = words.pointers(3 + count)
        self.a_scratch = words.take("ptr") if kernel.packs else None
        self.b_scratch = None if kernel.b_form == PACKED else words.take("ptr")
        self.m, self.n, self.k = words.numbers(3)
        self.a_row, self.a_step, self.b_line = words.numbers(3)
        self.slots = words.numbers(2) if kernel.packs else []
        self.batches = words.take()
        self.extents = words.numbers(max(0, kernel.rank - 1))
        self.strides = [words.numbers(kernel.rank) for _ in range(3 + count)]
        self.operand_rows = words.numbers(count)
        self.operand_columns = [words.take() if access == STRIDED else None for access in kernel.accesses]
        self.panels = packing.panels(code, self.n, self.shape)
        self.tiles = packing.ceil_div(code, self.m, self.shape.rows)
        self.buffer = code.alloca(f"[{BLOCK_TILES[1] * self.shape.rows * self._line} x i8]", zero=False)
        code.definitions["zeros"] = "@zeros = internal constant [1024 x i8] zeroinitializer, align 64"

    @property
    def _line(self) -> int:
        """Bytes of a row of the buffer."""
        return self.shape.width * self.shape.nbytes

    @property
    def _direct(self) -> bool:
        """Whether sums are results as they are."""
        return self.kernel.expr.op == "arg" and self.kernel.expr.dtype == self.kernel.dtype

    def write(self) -> None:
        """Threads share out the panels of all batches, or the tiles of rows if that comes out more even."""
        code = self.code
        columns = self._by_columns()
        per = code.call("i64", "llvm.smax.i64", code.select(columns, self.panels.count, self.tiles), i64(1))
        first, last = thread_share(code, code.binary("mul", self.batches, per), 1)
        self.item, self.by_columns = first, columns

        def batch(index: Reg, _: list[Reg]) -> list[Reg]:
            base = code.binary("mul", index, per)
            low = code.call("i64", "llvm.smax.i64", code.binary("sub", first, base), i64(0))
            high = least(code, code.binary("sub", last, base), per)
            counts = self.panels.count, self.tiles
            panels = code.select(columns, low, i64(0)), code.select(columns, high, counts[0])
            tiles = code.select(columns, i64(0), low), code.select(columns, counts[1], high)
            self._batch(index, panels, tiles)
            return []

        end = code.binary("udiv", code.binary("add", last, code.binary("sub", per, i64(1))), per)
        code.loop(code.binary("udiv", first, per), end, i64(1), batch)

    def _by_columns(self) -> Reg:
        if self.kernel.b_form != PACKED:
            return Reg("true", "i1")
        code, costs = self.code, []
        for split, whole in ((self.panels.count, self.tiles), (self.tiles, self.panels.count)):
            total = code.binary("add", code.binary("mul", self.batches, split), code.binary("sub", THREADS, i64(1)))
            costs.append(code.binary("mul", code.binary("udiv", total, THREADS), whole))
        return code.compare("icmp sle", costs[0], costs[1])

    def _batch(self, batch: Reg, panels: tuple[Reg, Reg], tiles: tuple[Reg, Reg]) -> None:
        code = self.code
        offsets = [i64(0)] * len(self.bases)
        if self.kernel.rank:
            offsets = row_offsets(code, batch, self.extents, self.strides)
        a, b, c, *operands = (code.at(base, offset) for base, offset in zip(self.bases, offsets, strict=True))
        packed = b if self.kernel.b_form == PACKED else self._pack_b(b, batch, panels)
        size = self._block_tiles()

        def block(first: Reg, _: list[Reg]) -> list[Reg]:
            stop = least(code, code.binary("add", first, size), tiles[1])
            row = code.binary("mul", first, i64(self.shape.rows))
            end = least(code, code.binary("mul", stop, i64(self.shape.rows)), self.m)
            count = code.binary("sub", end, row)
            lines = self._lines(a, row, count, panels)

            def panel(index: Reg, _: list[Reg]) -> list[Reg]:
                self._panel(lines, index, panels[0], (packed, b), c, operands, row, count)
                return []

            code.loop(*panels, i64(1), panel)
            return []

        code.loop(tiles[0], tiles[1], size, block)

    def _block_tiles(self) -> Reg:
        """Tiles of rows in a block: half the second cache, within limits."""
        code = self.code
        tile = code.binary("mul", self.k, i64(packing.ROWS * self.shape.nbytes))
        fits = code.binary("udiv", i64(self.kernel.caches.l2 // 2), code.binary("or", tile, i64(1)))
        return code.call("i64", "llvm.smax.i64", least(code, fits, i64(BLOCK_TILES[1])), i64(BLOCK_TILES[0]))

    def _lines(self, a: Reg, row: Reg, count: Reg, panels: tuple[Reg, Reg]) -> _Rows:
        """Where the block's rows are: packed first if enough panels use them, else in place."""
        code = self.code
        base = code.at(a, code.binary("mul", row, self.a_row))
        place = _Rows(base, code.binary("mul", self.a_row, i64(self.shape.rows)), self.a_row, self.a_step)
        if self.a_scratch is None:
            return place
        many = code.compare("icmp sge", code.binary("sub", panels[1], panels[0]), i64(FEW_PANELS))
        room = code.compare("icmp sle", THREADS, self.slots[0])
        tall = code.compare("icmp sgt", count, i64(self.shape.rows))
        chosen = code.binary("and", code.binary("and", many, room), tall)
        found = code.either(
            chosen, lambda: self._pack_a(base, count), lambda: [place.base, place.tile, place.row, place.step]
        )  # fmt: skip
        return _Rows(*found)

    def _pack_a(self, base: Reg, count: Reg) -> list[Reg]:
        code, nbytes, scalar = self.code, self.shape.nbytes, self.shape.scalar
        assert self.a_scratch is not None
        slot = code.at(self.a_scratch, code.binary("mul", THREAD, self.slots[1]))
        tile_nbytes = code.binary("mul", self.k, i64(packing.ROWS * nbytes))
        rows = self.shape.rows
        transposing = packing.define_transposing(code, self.target, scalar, packing.ROWS)
        straight = packing.define_straight(code, self.target, scalar, min(packing.ROWS, self.shape.lanes))

        def tile(index: Reg, _: list[Reg]) -> list[Reg]:
            first = code.binary("mul", index, i64(rows))
            here = least(code, code.binary("sub", count, first), i64(rows))
            source = code.at(base, code.binary("mul", first, self.a_row))
            to = code.at(slot, code.binary("mul", index, tile_nbytes))

            def copied(name: str, step: Reg) -> list[Reg]:
                packing.call(code, name, here, self.k, source, step, to, i64(packing.ROWS * nbytes))
                return []

            along = code.compare("icmp eq", self.a_step, i64(nbytes))
            code.either(along, lambda: copied(transposing, self.a_row), lambda: copied(straight, self.a_step))
            return []

        code.loop(i64(0), packing.ceil_div(code, count, rows), i64(1), tile)
        return [slot, tile_nbytes, i64(nbytes), i64(packing.ROWS * nbytes)]

    def _pack_b(self, b: Reg, batch: Reg, panels: tuple[Reg, Reg]) -> Reg:
        """Pack this thread's panels of a batch; where the first of them starts. Every batch takes the same place."""
        code, shape = self.code, self.shape
        assert self.b_scratch is not None
        slot = code.at(self.b_scratch, self._panel_offset(self._own_vectors()))
        begin = self.panels.start(panels[0])
        plain = self.kernel.b_form == PLAIN
        name = (
            packing.define_straight(code, self.target, shape.scalar, shape.lanes)
            if plain
            else packing.define_transposing(code, self.target, shape.scalar, shape.lanes)
        )
        spared = code.select(self._in_place(), self._whole_panels(), i64(0))
        first = code.call("i64", "llvm.smax.i64", panels[0], spared)

        def panel(index: Reg, _: list[Reg]) -> list[Reg]:
            start, width = self.panels.start(index), self.panels.width(index)
            to = code.at(slot, self._panel_offset(code.binary("sub", start, begin)))
            line = code.binary("mul", width, i64(self.target.vector_nbytes))
            if plain:
                column = code.binary("mul", start, i64(shape.lanes))
                columns = least(code, code.binary("mul", width, i64(shape.lanes)), code.binary("sub", self.n, column))
                source = code.at(b, code.binary("mul", column, i64(shape.nbytes)))
                packing.call(code, name, columns, self.k, source, self.b_line, to, line)
            else:
                code.loop(i64(0), width, i64(1), lambda v, _: self._pack_vector(name, b, start, v, to, line))
            return []

        code.loop(first, panels[1], i64(1), panel)
        return slot

    def _pack_vector(self, name: str, b: Reg, start: Reg, v: Reg, to: Reg, line: Reg) -> list[Reg]:
        """One vector of columns of a transposed B."""
        code = self.code
        column = code.binary("mul", code.binary("add", start, v), i64(self.shape.lanes))
        source = code.at(b, code.binary("mul", column, self.b_line))
        place = code.at(to, code.binary("mul", v, i64(self.target.vector_nbytes)))
        packing.call(code, name, code.binary("sub", self.n, column), self.k, source, self.b_line, place, line)
        return []

    def _own_vectors(self) -> Reg:
        """The vectors of all panels before this thread's first one."""
        code = self.code
        divisor = code.call("i64", "llvm.smax.i64", self.panels.count, i64(1))
        batch, panel = code.binary("udiv", self.item, divisor), code.binary("urem", self.item, divisor)
        return code.binary("add", code.binary("mul", batch, self.panels.vectors), self.panels.start(panel))

    def _in_place(self) -> Reg:
        """Whether whole panels of B are multiplied where they are: one tile of rows does not repay packing."""
        if self.kernel.b_form != PLAIN:
            return Reg("false", "i1")
        return self.code.compare("icmp sle", self.tiles, i64(1))

    def _whole_panels(self) -> Reg:
        """All panels, but not the last one if its last vector is not full."""
        code = self.code
        full = code.compare("icmp eq", code.binary("urem", self.n, i64(self.shape.lanes)), i64(0))
        return code.select(full, self.panels.count, code.binary("sub", self.panels.count, i64(1)))

    def _panel_offset(self, vectors: Reg) -> Reg:
        """Bytes of the panels of so many vectors."""
        code = self.code
        return code.binary("mul", code.binary("mul", vectors, self.k), i64(self.target.vector_nbytes))

    def _panel(
        self, lines: _Rows, panel: Reg, first: Reg, b: tuple[Reg, Reg], c: Reg, operands: Sequence[Reg],
        row: Reg, count: Reg,
    ) -> None:  # fmt: skip
        """A block of `count` rows from `row` on times a panel; `b` is packed and as it was."""
        code, shape, size = self.code, self.shape, self.kernel.expr.dtype.itemsize
        width = self.panels.width(panel)
        column = code.binary("mul", self.panels.start(panel), i64(shape.lanes))
        left = code.binary("sub", self.n, column)
        whole = code.binary("mul", width, i64(shape.lanes))
        full = code.compare("icmp sge", left, whole)
        c_row = code.binary("mul", self.n, i64(size))
        c = code.at(code.at(c, code.binary("mul", row, c_row)), code.binary("mul", column, i64(size)))
        to, to_row = self.buffer, i64(self._line)
        if self._direct:
            to, to_row = code.select(full, c, to), code.select(full, c_row, to_row)
        self._multiply(lines, self._panel_place(panel, first, *b), width, count, (to, to_row))

        def finish() -> list[Reg]:
            self._finish(operands, row, column, count, least(code, left, whole), c, c_row)
            return []

        code.either(full, lambda: [], finish) if self._direct else finish()

    def _panel_place(self, panel: Reg, first: Reg, packed: Reg, plain: Reg) -> tuple[Reg, Reg]:
        """Where a panel is and how far apart its lines are; the packed ones start with `first`."""
        code, start = self.code, self.panels.start(panel)
        begin = i64(0) if self.kernel.b_form == PACKED else self.panels.start(first)
        b = code.at(packed, self._panel_offset(code.binary("sub", start, begin)))
        line = code.binary("mul", self.panels.width(panel), i64(self.target.vector_nbytes))
        if self.kernel.b_form != PLAIN:
            return b, line
        here = code.binary("and", self._in_place(), code.compare("icmp slt", panel, self._whole_panels()))
        place = code.at(plain, code.binary("mul", start, i64(self.target.vector_nbytes)))
        return code.select(here, place, b), code.select(here, self.b_line, line)

    def _multiply(
        self, lines: _Rows, panel: tuple[Reg, Reg], width: Reg, count: Reg, result: tuple[Reg, Reg]
    ) -> None:  # fmt: skip
        """All tiles of a block with a panel, by parts of the depth of which B fills a quarter of the second cache."""
        code, (b, b_row) = self.code, panel
        most = self.kernel.caches.l2 // 4 // self._line
        parts = code.call("i64", "llvm.smax.i64", packing.ceil_div(code, self.k, most), i64(1))
        size = code.binary("udiv", code.binary("add", self.k, code.binary("sub", parts, i64(1))), parts)
        tiles = packing.ceil_div(code, count, self.shape.rows)
        final = code.binary("sub", parts, i64(1))

        def part(index: Reg, _: list[Reg]) -> list[Reg]:
            k = code.binary("mul", index, size)
            depth = least(code, code.binary("sub", self.k, k), size)
            a_part = code.at(lines.base, code.binary("mul", k, lines.step))
            b_part = code.at(b, code.binary("mul", k, b_row))
            first, last = code.compare("icmp eq", index, i64(0)), code.compare("icmp eq", index, final)
            start = code.select(first, Reg("@zeros", "ptr"), self.buffer), code.select(first, i64(0), i64(self._line))
            to = code.select(last, result[0], self.buffer), code.select(last, result[1], i64(self._line))

            def tile(i: Reg, _: list[Reg]) -> list[Reg]:
                row = code.binary("mul", i, i64(self.shape.rows))
                rows = least(code, code.binary("sub", count, row), i64(self.shape.rows))
                places = [code.at(base, code.binary("mul", row, step)) for base, step in (start, to)]
                a = code.at(a_part, code.binary("mul", i, lines.tile))
                call_tile(code, self.table, self.shape, rows, width, depth, a, lines.row, lines.step, b_part, b_row,
                          places[0], start[1], places[1], to[1])  # fmt: skip
                return []

            code.loop(i64(0), tiles, i64(1), tile)
            return []

        code.loop(i64(0), parts, i64(1), part)

    def _finish(
        self, operands: Sequence[Reg], row: Reg, column: Reg, count: Reg, columns: Reg, c: Reg, c_row: Reg
    ) -> None:  # fmt: skip
        """The epilogue of the sums in the buffer."""
        code, kernel = self.code, self.kernel
        lanes = lane_count([kernel.expr], self.target)
        dtypes = {node.value: node.dtype for node in expr.walk(kernel.expr) if node.op == "arg"}
        starts = []
        for i, (base, access) in enumerate(zip(operands, kernel.accesses, strict=True)):
            here = code.at(base, code.binary("mul", row, self.operand_rows[i]))
            step = self.operand_columns[i] or i64(dtypes[i + 1].itemsize)
            moves = access in (CONTIGUOUS, STRIDED)
            starts.append(code.at(here, code.binary("mul", column, step)) if moves else here)

        def line(index: Reg, _: list[Reg]) -> list[Reg]:
            own = code.at(self.buffer, code.binary("mul", index, i64(self._line)))
            reads = [Read(own, kernel.dtype, CONTIGUOUS)]
            for i, (start, access) in enumerate(zip(starts, kernel.accesses, strict=True)):
                base = code.at(start, code.binary("mul", index, self.operand_rows[i]))
                reads.append(Read(base, dtypes[i + 1], access, self.operand_columns[i]))
            write = Write(code.at(c, code.binary("mul", index, c_row)), kernel.expr.dtype)
            vector_loop(code, self.target, lanes, (i64(0), columns), reads, [write], body)
            return []

        def body(loaded: list[Reg], _: Mask, __: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            return [write_expr(code, kernel.expr, dict(enumerate(loaded)), lanes)], []

        code.loop(i64(0), count, i64(1), line)
