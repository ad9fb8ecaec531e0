"""Attention as one kernel: the scores of a few queries at a time, which never leave the caches.

Keys and values of a head are packed once. A block of queries is multiplied with all keys, its scores become weights,
the weights are multiplied with the values; dividing by the sums of the weights comes last.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback import packing
from cpu_fallback.attention_weights import SIZE, Masks, Rule, Scores, Weighing
from cpu_fallback.blocks import Rows, call_block, define_block, most
from cpu_fallback.caches import Caches
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.gemm_kernels import rectangle
from cpu_fallback.loops import (
    BROADCAST,
    CONTIGUOUS,
    STRIDED,
    THREAD,
    THREADS,
    Mask,
    Read,
    Words,
    Write,
    folded,
    lane_zero,
    least,
    row_offsets,
    vector_loop,
)
from cpu_fallback.native import Target
from cpu_fallback.packing import Panels
from cpu_fallback.tiles import tile_shape, tile_table
from cpu_fallback.vector_math import Num
from gpu_engine.ir.dtypes import FLOAT32, DType

MOST_TILES = 8
"""Tiles of queries in a block, at most; fewer where their scores would take more than a quarter of the second cache."""


@dataclass(frozen=True)
class AttentionKernel:
    """softmax(scale q k^T + mask) v by content.

    `dtype` is that of the result; queries, keys and values are float32. `vectors` are the widths of panels that can
    occur. `rank` leading axes are left.

    Words: addresses of q, k, v, the result, scratch, and the mask; queries, keys, features of q and of v; bytes from
    row to row of q, k, v and the result; how many threads the scratch has room for, and bytes for each; with a mask the
    bytes from row to row of it, and if it is strided from column to column; the product of the leading axes, extents of
    all of them but the first, strides over them of q, k, v, the result and the mask.
    """

    dtype: DType
    rule: Rule
    vectors: tuple[int, ...]
    rank: int
    caches: Caches

    def write(self, code: Code, target: Target) -> None:
        _Writer(self, code, target).write()


class _Writer:
    def __init__(self, kernel: AttentionKernel, code: Code, target: Target) -> None:
        self.kernel, self.code, self.target = kernel, code, target
        self.shape = tile_shape(target, "float")
        self.lanes, self.kind = self.shape.lanes, vector(self.shape.lanes, "float")
        heights = tuple(sorted({1, 4, self.shape.rows}))
        table = tile_table(code, target, self.shape, range(1, self.shape.rows + 1), kernel.vectors, heights)
        self.tiles, self.product = Reg(f"@{table}", "ptr"), define_block(code, target, self.shape)
        masked = kernel.rule.mask is not None
        words = Words(code)
        self.q, self.k, self.v, self.out, self.scratch = words.pointers(5)
        self.mask = words.take("ptr") if masked else None
        self.queries, self.keys, self.depth, self.width = words.numbers(4)
        self.q_row, self.k_row, self.v_row, self.out_row = words.numbers(4)
        self.slots, self.slot_nbytes = words.numbers(2)
        self.mask_row = words.take() if masked else i64(0)
        self.mask_column = words.take() if kernel.rule.access == STRIDED else None
        self.heads = words.take()
        self.extents = words.numbers(max(0, kernel.rank - 1))
        self.strides = [words.numbers(kernel.rank) for _ in range(4 + masked)]
        self.key_panels = packing.panels(code, self.keys, self.shape)
        self.value_panels = packing.panels(code, self.width, self.shape)
        self.sums = code.alloca(f"[{MOST_TILES * self.shape.rows * self.shape.line} x i8]", zero=False)
        self._place()

    def _place(self) -> None:
        """Where this thread keeps packed keys and values, the scores of a block, and what to multiply its rows with."""
        code = self.code
        self.scores_row = code.binary("mul", self.key_panels.vectors, i64(self.target.vector_nbytes))
        slot = code.at(self.scratch, code.binary("mul", THREAD, self.slot_nbytes))
        self.packed_keys = slot
        self.packed_values = code.at(slot, code.binary("mul", self.scores_row, self.depth))
        line = code.binary("mul", self.value_panels.vectors, i64(self.target.vector_nbytes))
        self.scores = code.at(self.packed_values, code.binary("mul", line, self.keys))
        tile = code.binary("mul", self.scores_row, i64(self.shape.rows))
        fits = code.binary("udiv", i64(self.kernel.caches.l2 // 4), code.binary("or", tile, i64(1)))
        tiles = most(code, least(code, fits, i64(MOST_TILES)), 1)
        self.block = code.binary("mul", self._even(tiles), i64(self.shape.rows))
        self.factors = code.at(self.scores, code.binary("mul", tiles, tile))

    def _even(self, tiles: Reg) -> Reg:
        """Tiles in a block if no more than `tiles` may be and blocks are nearly equal."""
        code, wanted = self.code, packing.ceil_div(self.code, self.queries, self.shape.rows)

        def per(count: Reg) -> Reg:
            return code.binary("udiv", code.binary("add", wanted, code.binary("sub", count, i64(1))), count)

        return most(code, per(most(code, per(tiles), 1)), 1)

    def write(self) -> None:
        """Threads that have room share out the blocks of queries of all heads."""
        code = self.code
        blocks = code.binary(
            "udiv", code.binary("add", self.queries, code.binary("sub", self.block, i64(1))), self.block
        )
        active, total = least(code, THREADS, self.slots), code.binary("mul", self.heads, blocks)
        first, last = (
            least(code, code.binary("udiv", code.binary("mul", total, index), active), total)
            for index in (THREAD, code.binary("add", THREAD, i64(1)))
        )
        per = most(code, blocks, 1)

        def head(index: Reg, _: list[Reg]) -> list[Reg]:
            base = code.binary("mul", index, per)
            low = most(code, code.binary("sub", first, base), 0)
            high = least(code, code.binary("sub", last, base), per)
            self._head(index, low, high)
            return []

        end = code.binary("udiv", code.binary("add", last, code.binary("sub", per, i64(1))), per)
        code.loop(code.binary("udiv", first, per), end, i64(1), head)

    def _head(self, head: Reg, low: Reg, high: Reg) -> None:
        """Blocks [low, high) of the queries of a head."""
        code = self.code
        bases = [self.q, self.k, self.v, self.out, *([] if self.mask is None else [self.mask])]
        if self.kernel.rank:
            offsets = row_offsets(code, head, self.extents, self.strides)
            bases = [code.at(base, offset) for base, offset in zip(bases, offsets, strict=True)]
        q, k, v, out, *masks = bases
        self._pack(k, v)
        finite = self._finite(v) if self.kernel.rule.causal else None

        def block(index: Reg, _: list[Reg]) -> list[Reg]:
            row = code.binary("mul", index, self.block)
            count = least(code, code.binary("sub", self.queries, row), self.block)
            used = self.keys
            if finite is not None:
                seen = least(code, code.binary("add", row, count), self.keys)
                used = code.select(finite, seen, self.keys)
            self._score(code.at(q, code.binary("mul", row, self.q_row)), count, used)
            scores = Scores(self.scores, self.scores_row, self.factors)
            mask = None
            if masks:
                first = code.at(masks[0], code.binary("mul", row, self.mask_row))
                mask = Masks(first, self.mask_row, self.mask_column)
            Weighing(self.kernel.rule, code, self.target).weigh(scores, row, count, self.keys, used, mask)
            self._combine(code.at(out, code.binary("mul", row, self.out_row)), count, used)
            return []

        code.loop(low, high, i64(1), block)

    def _pack(self, k: Reg, v: Reg) -> None:
        code, lanes = self.code, self.lanes
        transposing = packing.define_transposing(code, self.target, "float", lanes)
        straight = packing.define_straight(code, self.target, "float", lanes)

        def keys(index: Reg, _: list[Reg]) -> list[Reg]:
            start, line = self.key_panels.start(index), self._line(self.key_panels, index)
            panel = self._panel(self.packed_keys, self.key_panels, index, self.depth)

            def one(i: Reg, _: list[Reg]) -> list[Reg]:
                key = code.binary("mul", code.binary("add", start, i), i64(lanes))
                to = code.at(panel, code.binary("mul", i, i64(self.target.vector_nbytes)))
                source = code.at(k, code.binary("mul", key, self.k_row))
                left = code.binary("sub", self.keys, key)
                packing.call(code, f"@{transposing}", left, self.depth, source, self.k_row, to, line)
                return []

            code.loop(i64(0), self.key_panels.width(index), i64(1), one)
            return []

        def values(index: Reg, _: list[Reg]) -> list[Reg]:
            start, line = self.value_panels.start(index), self._line(self.value_panels, index)
            panel = self._panel(self.packed_values, self.value_panels, index, self.keys)
            column = code.binary("mul", start, i64(lanes))
            whole = code.binary("mul", self.value_panels.width(index), i64(lanes))
            columns = least(code, whole, code.binary("sub", self.width, column))
            source = code.at(v, code.binary("mul", start, i64(self.target.vector_nbytes)))
            packing.call(code, f"@{straight}", columns, self.keys, source, self.v_row, panel, line)
            return []

        code.loop(i64(0), self.key_panels.count, i64(1), keys)
        code.loop(i64(0), self.value_panels.count, i64(1), values)

    def _line(self, panels: Panels, index: Reg) -> Reg:
        """Bytes of a line of a panel."""
        return self.code.binary("mul", panels.width(index), i64(self.target.vector_nbytes))

    def _panel(self, base: Reg, panels: Panels, index: Reg, depth: Reg) -> Reg:
        code = self.code
        vectors = code.binary("mul", panels.start(index), depth)
        return code.at(base, code.binary("mul", vectors, i64(self.target.vector_nbytes)))

    def _finite(self, v: Reg) -> Reg:
        """Whether all values are finite: only then may weights of 0 be left out."""
        code = self.code

        def row(index: Reg, sums: list[Reg]) -> list[Reg]:
            read = Read(code.at(v, code.binary("mul", index, self.v_row)), FLOAT32, CONTIGUOUS)
            return vector_loop(code, self.target, self.lanes, (i64(0), self.width), [read], [], body, sums)

        def body(loaded: list[Reg], mask: Mask, sums: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            zero = Num(code, loaded[0]) * 0.0
            return [], [(Num(code, sums[0]) + Num(code, mask()).select(zero, 0.0)).reg]

        (total,) = code.loop(i64(0), self.keys, i64(1), row, [literal(self.kind, 0)])
        number = lane_zero(code, folded(code, total, lambda a, b: code.binary("fadd", a, b)))
        return code.compare("fcmp ord", number, number)

    def _score(self, q: Reg, count: Reg, used: Reg) -> None:
        """The products of some queries with the keys up to `used`."""
        code = self.code
        rows = Rows(q, code.binary("mul", self.q_row, i64(self.shape.rows)), self.q_row, i64(SIZE))

        def panel(index: Reg, _: list[Reg]) -> list[Reg]:
            start = code.binary("mul", self.key_panels.start(index), i64(self.target.vector_nbytes))

            def multiply() -> list[Reg]:
                width = self.key_panels.width(index)
                place = self._panel(self.packed_keys, self.key_panels, index, self.depth)
                call_block(code, self.product, self.tiles, count, self.depth, rows,
                           (place, self._line(self.key_panels, index)), width,
                           self.sums, (code.at(self.scores, start), self.scores_row))  # fmt: skip
                return []

            code.either(code.compare("icmp slt", start, code.binary("mul", used, i64(SIZE))), multiply, lambda: [])
            return []

        code.loop(i64(0), self.key_panels.count, i64(1), panel)

    def _combine(self, out: Reg, count: Reg, used: Reg) -> None:
        """The weights of some queries times the values up to `used`, divided by the sums of the weights."""
        code, line = self.code, i64(self.shape.line)
        tile = code.binary("mul", self.scores_row, i64(self.shape.rows))
        rows = Rows(self.scores, tile, self.scores_row, i64(SIZE))

        def panel(index: Reg, _: list[Reg]) -> list[Reg]:
            width = self.value_panels.width(index)
            place = self._panel(self.packed_values, self.value_panels, index, self.keys)
            call_block(code, self.product, self.tiles, count, used, rows, (place, self._line(self.value_panels, index)),
                       width, self.sums, (self.sums, line))  # fmt: skip
            column = code.binary("mul", self.value_panels.start(index), i64(self.lanes))
            columns = least(
                code, code.binary("mul", width, i64(self.lanes)), code.binary("sub", self.width, column)
            )  # fmt: skip
            self._divide(code.at(out, code.binary("mul", column, i64(self.kernel.dtype.itemsize))), count, columns)
            return []

        code.loop(i64(0), self.value_panels.count, i64(1), panel)

    def _divide(self, out: Reg, count: Reg, columns: Reg) -> None:
        code = self.code

        def read(index: Reg) -> list[Read]:
            sums = code.at(self.sums, code.binary("mul", index, i64(self.shape.line)))
            factor = code.at(self.factors, code.binary("mul", index, i64(SIZE)))
            return [Read(sums, FLOAT32, CONTIGUOUS), Read(factor, FLOAT32, BROADCAST)]

        def write(index: Reg) -> Write:
            return Write(code.at(out, code.binary("mul", index, self.out_row)), self.kernel.dtype)

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            vector_loop(code, self.target, self.lanes, (i64(0), columns), read(index), [write(index)], body)
            return []

        def pair(index: Reg, _: list[Reg]) -> list[Reg]:
            both = [index, code.binary("add", index, i64(1))]
            rectangle(code, self.lanes, columns, [*map(read, both)], [*map(write, both)], body)
            return []

        def body(loaded: list[Reg], _: Mask, __: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            return [code.binary("fmul", *loaded)], []

        whole = code.compare("icmp eq", code.binary("urem", columns, i64(self.lanes)), i64(0))
        even = code.select(whole, code.binary("and", count, i64(-2)), i64(0))
        code.loop(i64(0), even, i64(2), pair)
        code.loop(even, count, i64(1), row)
