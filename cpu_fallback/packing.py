"""Packed operands of matrix products.

B is cut into panels of a few vectors of columns, nearly equal in width, each contiguous: one row of vectors for every
step of the depth, padded with zeros. A is cut into tiles of at most `ROWS` rows: `ROWS` elements for every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from cpu_fallback.calls import Array
from cpu_fallback.code import Code, Reg, i64, lane_count, vector
from cpu_fallback.loops import Words, lane_mask, least, literal_zero, thread_share
from cpu_fallback.native import Target, attributes, host
from cpu_fallback.pages import PAGES
from cpu_fallback.tiles import NBYTES, TileShape
from cpu_fallback.vector_math import mangled
from cpu_fallback.weight_kernels import gathered, lines_of, over, run_kernel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim

ROWS = 8
TRANSPOSING = "i64 %rows, i64 %depth, ptr %from, i64 %from_row, ptr %to, i64 %to_step"
STRAIGHT = "i64 %columns, i64 %depth, ptr %from, i64 %from_step, ptr %to, i64 %to_step"


def panel_widths(n: int, shape: TileShape) -> list[int]:
    """Vectors of every panel of n columns."""
    vectors = -(-n // shape.lanes)
    count = -(-vectors // shape.vectors)
    few, more = divmod(vectors, max(1, count))
    return [few + (i < more) for i in range(count)]


def padded(n: Dim, lanes: int) -> Dim:
    """Columns with padding."""
    return dims.ceil_div(n, lanes) * lanes


def pack_panels(b: Array, shape: TileShape, dtype: Any) -> Array:
    """b [..., K, N] as panels [..., K * padded(N)] of `dtype`."""
    *lead, depth, n = b.shape
    packed = PAGES.zeros((*lead, depth * dims.number(padded(n, shape.lanes))), dtype)
    if b.dtype == dtype and shape.nbytes == 4 and len(lead) < 2:
        steps = (0,) * (1 - len(lead)) + b.strides
        kernel = PackedPanels(shape.lanes, shape.vectors, steps[-1] == 4)
        run_kernel(kernel, host(), b, packed, *lead or (1,), depth, n, *steps)
        return packed
    stops = accumulate(width * shape.lanes for width in panel_widths(n, shape))
    start = 0
    for stop in stops:
        panel = packed[..., start * depth : stop * depth].reshape(*lead, depth, stop - start)
        panel[..., : min(stop, n) - start] = b[..., start:stop]
        start = stop
    return packed


@dataclass(frozen=True)
class PackedPanels:
    """`pack_panels` of elements of 4 bytes, whose rows are contiguous or not.

    Words: addresses of b and of the panels; matrices, depth, columns; bytes from one to the next of each.
    """

    lanes: int
    vectors: int
    contiguous: bool

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        source, out = words.pointers(2)
        matrices, depth, columns, *steps = words.numbers(6)
        cut = panels(code, columns, TileShape(1, self.vectors, self.lanes, "float"))
        padded_columns = code.binary("mul", cut.vectors, i64(self.lanes))

        def one(index: Reg, _: list[Reg]) -> list[Reg]:
            matrix, panel = code.binary("udiv", index, cut.count), code.binary("urem", index, cut.count)
            first, width = (code.binary("mul", part, i64(self.lanes)) for part in (cut.start(panel), cut.width(panel)))
            skipped = code.binary("add", code.binary("mul", matrix, padded_columns), first)
            start = code.at(code.at(source, code.binary("mul", matrix, steps[0])), code.binary("mul", first, steps[2]))
            place = code.at(out, code.binary("mul", code.binary("mul", skipped, depth), i64(4)))
            left = code.binary("sub", columns, first)
            over(code, cut.width(panel), lambda v: self._column(code, v, left, (start, place), (depth, width, *steps)))
            return []

        code.loop(*thread_share(code, code.binary("mul", matrices, cut.count), 1), i64(1), one)

    def _column(self, code: Code, v: Reg, left: Reg, ends: tuple[Reg, Reg], sizes: tuple[Reg, ...]) -> None:
        """The lanes of vector `v` of a panel, for the whole depth."""
        depth, width, _, depth_step, column_step = sizes
        lane, kind = code.binary("mul", v, i64(self.lanes)), vector(self.lanes, "float")
        lines = lines_of(code, ends[0], lane, left, column_step, 1 if self.contiguous else self.lanes)
        to, line = code.at(ends[1], code.binary("mul", lane, i64(4))), code.binary("mul", width, i64(4))
        mask = lane_mask(code, self.lanes, code.binary("sub", left, lane))
        name = f"llvm.masked.load.{mangled(kind)}.p0"

        def row(k: Reg) -> None:
            offset = code.binary("mul", k, depth_step)
            if self.contiguous:
                value = code.call(kind, name, code.at(lines[0], offset), Reg("1", "i32"), mask, literal_zero(kind))
            else:
                value = gathered(code, lines, offset, left, lane)
            code.store(value, code.at(to, code.binary("mul", k, line)), 4)

        over(code, depth, row)


def pack_narrow_panels(b: Array, shape: TileShape) -> Array:
    """b [..., K, N] of bytes as panels whose int32 elements are `terms` consecutive elements of a column each."""
    *lead, depth, n = b.shape
    groups = -(-depth // shape.terms)
    filled = np.zeros((*lead, groups * shape.terms, n), np.int16 if shape.terms == 2 else b.dtype)
    filled[..., :depth, :] = b
    columns = filled.reshape(*lead, groups, shape.terms, n).swapaxes(-1, -2)
    return pack_panels(np.ascontiguousarray(columns).view(np.int32)[..., 0], shape, np.int32)


@dataclass(frozen=True)
class Panels:
    """The panels of a number of columns that is known at run time."""

    code: Code
    vectors: Reg
    count: Reg
    few: Reg
    more: Reg

    def start(self, panel: Reg) -> Reg:
        """The first vector of a panel."""
        return self.code.binary("add", self.code.binary("mul", panel, self.few), least(self.code, panel, self.more))

    def width(self, panel: Reg) -> Reg:
        """How many vectors a panel has."""
        longer = self.code.convert("zext", self.code.compare("icmp slt", panel, self.more), "i64")
        return self.code.binary("add", self.few, longer)


def panels(code: Code, n: Reg, shape: TileShape) -> Panels:
    vectors = ceil_div(code, n, shape.lanes)
    count = ceil_div(code, vectors, shape.vectors)
    divisor = code.call("i64", "llvm.smax.i64", count, i64(1))
    return Panels(
        code, vectors, count, code.binary("udiv", vectors, divisor), code.binary("urem", vectors, divisor)
    )  # fmt: skip


def ceil_div(code: Code, a: Reg, b: int) -> Reg:
    return code.binary("udiv", code.binary("add", a, i64(b - 1)), i64(b))


def define_transposing(code: Code, target: Target, scalar: str, rows: int) -> str:
    """A function: to[k, i] = from[i, k] for i < `rows`; steps in bytes, the depth contiguous in `from`.

    Rows that there are not are copies of the last one.
    """
    lanes = target.vector_nbytes // NBYTES[scalar]
    name = f"transpose_{scalar}{lanes}_{rows}"
    code.define(name, TRANSPOSING, attributes(target), _Transposing(scalar, lanes, rows).write)
    return name


def define_straight(code: Code, target: Target, scalar: str, lanes: int) -> str:
    """A function: to[k, j] = from[k, j] for j < columns, zeros up to whole vectors of `lanes`; steps in bytes."""
    name = f"copy_{scalar}{lanes}"
    code.define(name, STRAIGHT, attributes(target), _Straight(scalar, lanes).write)
    return name


def parameters(text: str) -> list[Reg]:
    """The registers that a parameter list declares."""
    return [Reg(word.split()[1], word.split()[0]) for word in text.split(", ")]


def call(code: Code, function: str, *arguments: Reg) -> None:
    """Call "@name" or a pointer in a register."""
    code.do(f"call void {function}({', '.join(map(str, arguments))})")


@dataclass(frozen=True)
class _Transposing:
    scalar: str
    lanes: int
    rows: int

    def write(self, code: Code) -> None:
        count, depth, source, step, to, to_step = parameters(TRANSPOSING)
        last = code.binary("sub", count, i64(1))
        lines = [
            code.at(source, code.binary("mul", step, least(code, i64(i), last))) for i in range(self.rows)
        ]  # fmt: skip
        final = code.binary("sub", depth, i64(self.lanes))

        def block(index: Reg, _: list[Reg]) -> list[Reg]:
            self._block(code, lines, least(code, index, final), to, to_step)
            return []

        def single(index: Reg, _: list[Reg]) -> list[Reg]:
            for i, line in enumerate(lines):
                here = code.at(to, code.binary("mul", index, to_step))
                value = code.load(self.scalar, self._element(code, line, index), self._nbytes)
                code.store(value, code.at(here, i64(i * self._nbytes)), self._nbytes)
            return []

        code.either(
            code.compare("icmp sge", final, i64(0)),
            lambda: code.loop(i64(0), depth, i64(self.lanes), block),
            lambda: code.loop(i64(0), depth, i64(1), single),
        )

    @property
    def _nbytes(self) -> int:
        return NBYTES[self.scalar]

    def _element(self, code: Code, line: Reg, index: Reg) -> Reg:
        return code.let("ptr", f"getelementptr {self.scalar}, {line}, {index}")

    def _block(self, code: Code, lines: Sequence[Reg], index: Reg, to: Reg, to_step: Reg) -> None:
        """`lanes` steps of the depth from `index` on. Several groups of steps lie in one register if rows are few."""
        kind, size = vector(self.lanes, self.scalar), min(self.lanes, self.rows)
        for first in range(0, self.rows, size):
            loaded = [
                code.load(kind, self._element(code, line, index), self._nbytes) for line in lines[first : first + size]
            ]  # fmt: skip
            for i, column in enumerate(transposed(code, loaded)):
                for group in range(0, self.lanes, size):
                    step = code.binary("add", index, i64(group + i))
                    place = code.at(to, code.binary("mul", step, to_step))
                    part = lanes_of(code, column, group, size)
                    code.store(part, code.at(place, i64(first * self._nbytes)), self._nbytes)


@dataclass(frozen=True)
class _Straight:
    scalar: str
    lanes: int

    def write(self, code: Code) -> None:
        columns, depth, source, step, to, to_step = parameters(STRAIGHT)
        kind, nbytes = vector(self.lanes, self.scalar), NBYTES[self.scalar]
        whole = code.binary("and", columns, i64(-self.lanes))
        left = code.binary("sub", columns, whole)

        def places(index: Reg, column: Reg) -> tuple[Reg, Reg]:
            offset = code.binary("mul", column, i64(nbytes))
            return tuple(
                code.at(code.at(base, code.binary("mul", index, stride)), offset)
                for base, stride in ((source, step), (to, to_step))
            )  # type: ignore[return-value]

        def copy(index: Reg, column: Reg) -> list[Reg]:
            start, end = places(index, column)
            code.store(code.load(kind, start, nbytes), end, nbytes)
            return []

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            code.loop(i64(0), whole, i64(self.lanes), lambda column, _: copy(index, column))
            return []

        def tail(index: Reg, _: list[Reg]) -> list[Reg]:
            start, end = places(index, whole)
            name = f"llvm.masked.load.{mangled(kind)}.p0"
            value = code.call(kind, name, start, Reg(str(nbytes), "i32"), mask, literal_zero(kind))
            code.store(value, end, nbytes)
            return []

        code.loop(i64(0), depth, i64(1), row)
        mask = lane_mask(code, self.lanes, left)
        some = code.compare("icmp sgt", left, i64(0))
        code.loop(i64(0), code.select(some, depth, i64(0)), i64(1), tail)


def transposed(code: Code, rows: Sequence[Reg]) -> list[Reg]:
    """n vectors of m n lanes -> n vectors whose m groups of n lanes are transposed: log n rounds of exchanges."""
    count, lanes = len(rows), lane_count(rows[0].type)
    span = count // 2
    while span:
        low = [lane if not lane & span else lane - span + lanes for lane in range(lanes)]
        high = [lane + span if not lane & span else lane + lanes for lane in range(lanes)]
        paired = list(rows)
        for i in (i for i in range(count) if not i & span):
            paired[i] = shuffled(code, rows[i], rows[i + span], low)
            paired[i + span] = shuffled(code, rows[i], rows[i + span], high)
        rows, span = paired, span // 2
    return list(rows)


def lanes_of(code: Code, x: Reg, start: int, count: int) -> Reg:
    """Some lanes of a vector."""
    return x if count == lane_count(x.type) else shuffled(code, x, Reg("poison", x.type), range(start, start + count))


def joined(code: Code, parts: Sequence[Reg]) -> Reg:
    """A power of two of vectors behind each other as one."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    low, high = joined(code, parts[:half]), joined(code, parts[half:])
    return shuffled(code, low, high, range(2 * lane_count(low.type)))


def shuffled(code: Code, a: Reg, b: Reg, picks: Sequence[int]) -> Reg:
    """Lanes of a, and of b numbered behind them."""
    kind = a.type.replace(f"<{lane_count(a.type)} ", f"<{len(picks)} ")
    places = ", ".join(f"i32 {pick}" for pick in picks)
    return code.let(kind, f"shufflevector {a}, {b}, <{len(picks)} x i32> <{places}>")
