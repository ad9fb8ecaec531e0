"""The order in which a matrix product is computed: what each thread does, what is packed when, tile after tile.

Blocks of rows of A are packed once and stay in the second cache while all panels of B pass by; a panel stays near
while the tiles of the block pass over it. The sums of a block and a panel are kept on the stack until they are
complete; then the epilogue, a function of its own, takes them. One driver serves all epilogues of a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cpu_fallback import packing
from cpu_fallback.blocks import Rows, call_block, define_block, most
from cpu_fallback.caches import Caches
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.integers import in_equal_parts
from cpu_fallback.lanes import COMPUTED
from cpu_fallback.loops import THREAD, THREADS, Words, least, row_offsets, thread_share
from cpu_fallback.native import Target, attributes
from cpu_fallback.tiles import TileShape, tile_shape
from gpu_engine.ir.dtypes import DType

PACKED, PLAIN, TRANSPOSED = "packed", "plain", "transposed"
PARAMETERS = "ptr %block, i64 %thread, i64 %threads, ptr %tiles, ptr %finish, i1 %direct"
TILES, EPILOGUE, DIRECT = Reg("%tiles", "ptr"), Reg("%finish", "ptr"), Reg("%direct", "i1")
BLOCK_TILES = (4, 16)
"""The least and the greatest number of tiles of rows in a block."""
FEW_COLUMNS = {True: 1024, False: 64}
"""With fewer columns of B than these packing a block of A does not pay; by whether rows of A are contiguous."""


@dataclass(frozen=True)
class Driver:
    """A B over batches, by content.

    `dtype` is what is multiplied and summed in, `terms` products at a time (see `TileShape`). B comes in panels
    (`PACKED`), or as it is: rows (`PLAIN`) or columns (`TRANSPOSED`) contiguous. `packs`: blocks of A may be packed.
    `rank` batch axes are left. A result has `result_nbytes`.

    Words: see `Arguments`. The function is called with PARAMETERS: a table of tiles, the epilogue (see `blocks`)
    and whether sums are results as they are, which then go where they belong at once, but for columns that fill no
    vector.
    """

    dtype: DType
    b_form: str
    packs: bool
    rank: int
    result_nbytes: int
    caches: Caches
    terms: int = 1

    def tile(self, target: Target) -> TileShape:
        return tile_shape(target, COMPUTED[self.dtype], self.terms)

    def line_nbytes(self, target: Target) -> int:
        """Bytes of a row of sums as the epilogue gets them."""
        return self.tile(target).line

    def define(self, code: Code, target: Target) -> str:
        """The name of the function."""
        form = self.b_form + "_packing" * self.packs
        sizes = f"{self.rank}_{self.result_nbytes}_{self.caches.l1}_{self.caches.l2}"
        name = f"gemm_{self.dtype}_{self.terms}_{form}_{sizes}"
        code.define(name, PARAMETERS, attributes(target), lambda inner: _Writer(self, inner, target).write())
        return name


class Form(Protocol):
    """What the words of a product depend on."""

    @property
    def b_form(self) -> str: ...
    @property
    def packs(self) -> bool: ...
    @property
    def rank(self) -> int: ...


class Arguments:
    """The words that all products share, in order; those of the epilogue follow.

    Addresses of A, B, C, scratch for A if it packs, scratch for B if it is not packed; m, n, k; bytes from row to row
    and from step to step of A, and from line to line of B; with `packs` the number of threads that the scratch for
    A has room for, and the bytes of each; the batches; extents of the batch axes but the first; strides in bytes over
    the batch axes of A, B and C.
    """

    def __init__(self, driver: Form, code: Code) -> None:
        self.words = words = Words(code)
        self.a, self.b, self.c = words.pointers(3)
        self.a_scratch = words.take("ptr") if driver.packs else None
        self.b_scratch = None if driver.b_form == PACKED else words.take("ptr")
        self.m, self.n, self.k = words.numbers(3)
        self.a_row, self.a_step, self.b_line = words.numbers(3)
        self.slots = words.numbers(2) if driver.packs else []
        self.batches = words.take()
        self.extents = words.numbers(max(0, driver.rank - 1))
        self.strides = [words.numbers(driver.rank) for _ in range(3)]


class _Writer:
    def __init__(self, driver: Driver, code: Code, target: Target) -> None:
        self.driver, self.code, self.target = driver, code, target
        self.shape = driver.tile(target)
        self.given = Arguments(driver, code)
        self.n, self.k = self.given.n, self.given.k
        self.panels = packing.panels(code, self.n, self.shape)
        self.tiles = packing.ceil_div(code, self.given.m, self.shape.rows)
        self.buffer = code.alloca(f"[{BLOCK_TILES[1] * self.shape.rows * self.shape.line} x i8]", zero=False)
        self.block = define_block(code, target, self.shape)

    def write(self) -> None:
        """Threads share out the panels of all batches, or the tiles of rows if that comes out more even."""
        code = self.code
        columns = self._by_columns()
        per = most(code, code.select(columns, self.panels.count, self.tiles), 1)
        first, last = thread_share(code, code.binary("mul", self.given.batches, per), 1)
        self.item = first

        def batch(index: Reg, _: list[Reg]) -> list[Reg]:
            base = code.binary("mul", index, per)
            low = most(code, code.binary("sub", first, base), 0)
            high = least(code, code.binary("sub", last, base), per)
            counts = self.panels.count, self.tiles
            panels = code.select(columns, low, i64(0)), code.select(columns, high, counts[0])
            tiles = code.select(columns, i64(0), low), code.select(columns, counts[1], high)
            self._batch(
                index, (panels[0], least(code, panels[1], counts[0])), (tiles[0], least(code, tiles[1], counts[1]))
            )
            return []

        end = code.binary("udiv", code.binary("add", last, code.binary("sub", per, i64(1))), per)
        code.loop(code.binary("udiv", first, per), end, i64(1), batch)

    def _by_columns(self) -> Reg:
        if self.driver.b_form != PACKED:
            return Reg("true", "i1")
        code, costs = self.code, []
        for split, whole in ((self.panels.count, self.tiles), (self.tiles, self.panels.count)):
            total = code.binary(
                "add", code.binary("mul", self.given.batches, split), code.binary("sub", THREADS, i64(1))
            )
            costs.append(code.binary("mul", code.binary("udiv", total, THREADS), whole))
        return code.compare("icmp sle", costs[0], costs[1])

    def _batch(self, batch: Reg, panels: tuple[Reg, Reg], tiles: tuple[Reg, Reg]) -> None:
        code, given = self.code, self.given
        offsets = [i64(0)] * 3
        if self.driver.rank:
            offsets = row_offsets(code, batch, given.extents, given.strides)
        a, b, c = (code.at(base, offset) for base, offset in zip((given.a, given.b, given.c), offsets, strict=True))
        packed = b if self.driver.b_form == PACKED else self._pack_b(b, panels)
        size = in_equal_parts(code, code.binary("sub", tiles[1], tiles[0]), self._block_tiles())

        def block(first: Reg, _: list[Reg]) -> list[Reg]:
            stop = least(code, code.binary("add", first, size), tiles[1])
            row = code.binary("mul", first, i64(self.shape.rows))
            end = least(code, code.binary("mul", stop, i64(self.shape.rows)), given.m)
            count = code.binary("sub", end, row)
            lines = self._lines(a, row, count, panels)

            def panel(index: Reg, _: list[Reg]) -> list[Reg]:
                self._panel(lines, index, self._panel_place(index, panels[0], packed, b), c, (batch, row, count))
                return []

            code.loop(*panels, i64(1), panel)
            return []

        code.loop(tiles[0], tiles[1], size, block)

    def _block_tiles(self) -> Reg:
        """Tiles of rows in a block: half the second cache, within limits."""
        code = self.code
        tile = code.binary("mul", self.k, i64(packing.ROWS * self.shape.nbytes))
        fits = code.binary("udiv", i64(self.driver.caches.l2 // 2), code.binary("or", tile, i64(1)))
        return most(code, least(code, fits, i64(BLOCK_TILES[1])), BLOCK_TILES[0])

    def _lines(self, a: Reg, row: Reg, count: Reg, panels: tuple[Reg, Reg]) -> Rows:
        """Where the block's rows are: packed first if enough panels use them, else in place."""
        code, given = self.code, self.given
        base = code.at(a, code.binary("mul", row, given.a_row))
        place = [base, code.binary("mul", given.a_row, i64(self.shape.rows)), given.a_row, given.a_step]
        if not self.driver.packs:
            return Rows(*place)
        along = code.compare("icmp eq", given.a_step, i64(self.shape.nbytes))
        few = code.select(along, *(i64(FEW_COLUMNS[whole] // self.shape.width) for whole in (True, False)))
        many = code.compare("icmp sge", code.binary("sub", panels[1], panels[0]), few)
        room = code.compare("icmp sle", THREADS, given.slots[0])
        tall = code.compare("icmp sgt", count, i64(self.shape.rows))
        chosen = code.binary("and", code.binary("and", many, room), tall)
        return Rows(*code.either(chosen, lambda: self._pack_a(base, count), lambda: place))

    def _pack_a(self, base: Reg, count: Reg) -> list[Reg]:
        code, given, nbytes, scalar = self.code, self.given, self.shape.nbytes, self.shape.scalar
        assert given.a_scratch is not None
        slot = code.at(given.a_scratch, code.binary("mul", THREAD, given.slots[1]))
        tile_nbytes = code.binary("mul", self.k, i64(packing.ROWS * nbytes))
        transposing = packing.define_transposing(code, self.target, scalar, packing.ROWS)
        straight = packing.define_straight(code, self.target, scalar, min(packing.ROWS, self.shape.lanes))
        along = code.compare("icmp eq", given.a_step, i64(nbytes))
        name = code.select(along, Reg(f"@{transposing}", "ptr"), Reg(f"@{straight}", "ptr"))
        step = code.select(along, given.a_row, given.a_step)

        def tile(index: Reg, _: list[Reg]) -> list[Reg]:
            first = code.binary("mul", index, i64(self.shape.rows))
            rows = least(code, code.binary("sub", count, first), i64(self.shape.rows))
            source = code.at(base, code.binary("mul", first, given.a_row))
            to = code.at(slot, code.binary("mul", index, tile_nbytes))
            packing.call(code, name.name, rows, self.k, source, step, to, i64(packing.ROWS * nbytes))
            return []

        code.loop(i64(0), packing.ceil_div(code, count, self.shape.rows), i64(1), tile)
        return [slot, tile_nbytes, i64(nbytes), i64(packing.ROWS * nbytes)]

    def _pack_b(self, b: Reg, panels: tuple[Reg, Reg]) -> Reg:
        """Pack this thread's panels of a batch; where the first of them starts. Every batch takes the same place."""
        code, shape = self.code, self.shape
        assert self.given.b_scratch is not None
        slot = code.at(self.given.b_scratch, self._panel_offset(self._own_vectors()))
        begin = self.panels.start(panels[0])
        plain = self.driver.b_form == PLAIN
        define = packing.define_straight if plain else packing.define_transposing
        name = define(code, self.target, shape.scalar, shape.lanes)
        spared = code.select(self._in_place(), self._whole_panels(), i64(0))

        def panel(index: Reg, _: list[Reg]) -> list[Reg]:
            start, width = self.panels.start(index), self.panels.width(index)
            to = code.at(slot, self._panel_offset(code.binary("sub", start, begin)))
            line = code.binary("mul", width, i64(self.target.vector_nbytes))
            if plain:
                column = code.binary("mul", start, i64(shape.lanes))
                columns = least(code, code.binary("mul", width, i64(shape.lanes)), code.binary("sub", self.n, column))
                source = code.at(b, code.binary("mul", column, i64(shape.nbytes)))
                packing.call(code, f"@{name}", columns, self.k, source, self.given.b_line, to, line)
            else:
                code.loop(i64(0), width, i64(1), lambda v, _: self._pack_vector(name, b, start, v, to, line))
            return []

        code.loop(code.call("i64", "llvm.smax.i64", panels[0], spared), panels[1], i64(1), panel)
        return slot

    def _pack_vector(self, name: str, b: Reg, start: Reg, v: Reg, to: Reg, line: Reg) -> list[Reg]:
        """One vector of columns of a transposed B."""
        code, step = self.code, self.given.b_line
        column = code.binary("mul", code.binary("add", start, v), i64(self.shape.lanes))
        source = code.at(b, code.binary("mul", column, step))
        place = code.at(to, code.binary("mul", v, i64(self.target.vector_nbytes)))
        packing.call(code, f"@{name}", code.binary("sub", self.n, column), self.k, source, step, place, line)
        return []

    def _own_vectors(self) -> Reg:
        """The vectors of all panels before this thread's first one."""
        code = self.code
        divisor = most(code, self.panels.count, 1)
        batch, panel = code.binary("udiv", self.item, divisor), code.binary("urem", self.item, divisor)
        return code.binary("add", code.binary("mul", batch, self.panels.vectors), self.panels.start(panel))

    def _in_place(self) -> Reg:
        """Whether whole panels of B are multiplied where they are: one tile of rows does not repay packing."""
        if self.driver.b_form != PLAIN:
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

    def _panel_place(self, panel: Reg, first: Reg, packed: Reg, plain: Reg) -> tuple[Reg, Reg]:
        """Where a panel is and how far apart its lines are; the packed ones start with `first`."""
        code, start = self.code, self.panels.start(panel)
        begin = i64(0) if self.driver.b_form == PACKED else self.panels.start(first)
        b = code.at(packed, self._panel_offset(code.binary("sub", start, begin)))
        line = code.binary("mul", self.panels.width(panel), i64(self.target.vector_nbytes))
        if self.driver.b_form != PLAIN:
            return b, line
        here = code.binary("and", self._in_place(), code.compare("icmp slt", panel, self._whole_panels()))
        place = code.at(plain, code.binary("mul", start, i64(self.target.vector_nbytes)))
        return code.select(here, place, b), code.select(here, self.given.b_line, line)

    def _panel(self, lines: Rows, panel: Reg, b: tuple[Reg, Reg], c: Reg, block: tuple[Reg, Reg, Reg]) -> None:
        """A block of rows (batch, first row, rows) times a panel."""
        code, shape, (batch, row, count) = self.code, self.shape, block
        width = self.panels.width(panel)
        column = code.binary("mul", self.panels.start(panel), i64(shape.lanes))
        left = code.binary("sub", self.n, column)
        whole = code.binary("mul", width, i64(shape.lanes))
        direct = code.binary("and", DIRECT, code.compare("icmp sge", left, whole))
        c_row = code.binary("mul", self.n, i64(self.driver.result_nbytes))
        inner = code.binary("mul", column, i64(self.driver.result_nbytes))
        place = code.at(code.at(c, code.binary("mul", row, c_row)), inner)
        to = code.select(direct, place, self.buffer), code.select(direct, c_row, i64(shape.line))
        epilogue = code.select(direct, Reg("null", "ptr"), EPILOGUE)
        finish = epilogue, Reg("%block", "ptr"), batch, row, column, least(code, left, whole)
        call_block(code, self.block, TILES, count, self.k, lines, b, width, self.buffer, to, finish)
