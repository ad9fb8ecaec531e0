"""A depthwise convolution of what a 1x1 convolution makes, channels last, in one kernel.

The tensor between the two is many times as large as those around it. It is made a few rows at a time, in a ring that
the second cache keeps: a row is overwritten when no window reaches it any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.conv_tiles import RECORD, UNROLL, TileShape, call_tiles, define_table, tile_shape
from cpu_fallback.conv_tiling import MOST
from cpu_fallback.conv_windows import Geometry
from cpu_fallback.depthwise_driver import PIXELS, Results, Window, write_from_ring
from cpu_fallback.epilogues import Epilogue, Place, stack
from cpu_fallback.integers import ceil_div, in_equal_parts, least, most, plus, times
from cpu_fallback.loops import THREAD, THREADS, Words
from cpu_fallback.native import Target


@dataclass(frozen=True)
class ExpandedDepthwiseKernel:
    """A 1x1 convolution, then a depthwise one, by content: vectors of the panels of the first one's weights, its
    epilogue, windows and epilogue of the second, rows of the ring, which are all that a row of tiles reads.

    Words: addresses of x, of the weights of both (`conv_weights.tile_weights`, `depthwise_weights`), of as many zeros
    as `Window.blank_elements` says, of the result and of scratch; bytes of scratch for a thread, which hold the ring
    and as many pixels of x as a tile has, threads that it has room for; channels of x; the second one's Geometry; the
    operands of both epilogues.
    """

    vectors: tuple[int, ...]
    before: Epilogue
    window: Window
    after: Epilogue
    ring: int

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, panels, w, blank, out, scratch = words.pointers(6)
        room, slots, depth = words.numbers(3)
        g = Geometry(*words.numbers(len(Geometry._fields)))
        before = words.address()
        after = code.at(before, i64(8 * len(self.before.kinds)))
        table = Reg(f"@{define_table(code, target, self.vectors, self.before)}", "ptr")
        ring = code.at(scratch, times(code, THREAD, room))
        made = stack(code, 16)
        code.store(i64(-1), made, 8)
        rows = _Rows(code, tile_shape(target), table, x, panels, before, ring, self.ring, depth, g, made)
        epilogue = self.after

        def finish(found: Results) -> None:
            base = code.at(out, plus(code, found.place, found.channel))
            place = Place(base, found.step, found.wanted, None, PIXELS, 1, self.window.lanes, None)
            addresses = epilogue.addresses(code, after, found.channel)
            epilogue.write_tile(code, place, found.sums, epilogue.moved(code, addresses, found.place))

        team = least(code, THREADS, slots)
        write_from_ring(code, target, self.window, self.ring, team, rows.provide, w, blank, finish, g)


@dataclass(frozen=True)
class _Rows:
    """The ring while the kernel is written; `made` are the image whose rows it has, and the row that follows them."""

    code: Code
    shape: TileShape
    table: Reg
    x: Reg
    w: Reg
    operands: Reg
    ring: Reg
    count: int
    depth: Reg
    geometry: Geometry
    made: Reg

    @property
    def _pixel(self) -> Reg:
        """Bytes of a pixel of x."""
        return times(self.code, self.depth, i64(4))

    @property
    def _line(self) -> Reg:
        """Bytes of a pixel of the ring."""
        return times(self.code, self.geometry.channels, i64(4))

    def provide(self, image: Reg, first: Reg) -> Reg:
        """Have all rows of `image` from number `first` on in the ring that it has room for; where it begins."""
        code, g = self.code, self.geometry
        place = code.at(self.made, i64(8))
        same = code.compare("icmp eq", code.load("i64", self.made, 8), image)
        start = most(code, code.select(same, code.load("i64", place, 8), i64(0)), most(code, first, i64(0)))
        stop = most(code, least(code, plus(code, first, i64(self.count)), g.in_h), start)
        code.store(image, self.made, 8)
        code.store(stop, place, 8)
        base = code.at(self.x, times(code, image, g.in_h, g.in_w, self._pixel))

        def piece(_: Reg, carried: list[Reg]) -> list[Reg]:
            row = carried[0]
            slot = code.binary("urem", row, i64(self.count))
            end = least(code, stop, plus(code, row, code.binary("sub", i64(self.count), slot)))
            pixels = times(code, code.binary("sub", end, row), g.in_w)
            source = code.at(base, times(code, row, g.in_w, self._pixel))
            self._make(source, code.at(self.ring, times(code, slot, g.in_w, self._line)), pixels)
            return [end]

        code.loop(i64(0), i64(2), i64(1), piece, [start])
        return self.ring

    def _make(self, source: Reg, to: Reg, pixels: Reg) -> None:
        """So many pixels, one after the other."""
        code, height = self.code, i64(self.shape.rows)
        records = stack(code, RECORD * (MOST + 1))
        tiles = ceil_div(code, pixels, height)
        size = in_equal_parts(code, tiles, i64(MOST))

        def copied() -> list[Reg]:
            spare = self._spare()
            nbytes = times(code, pixels, self._pixel)
            code.call("void", "llvm.memcpy.p0.p0.i64", spare, source, nbytes, Reg("false", "i1"))
            return [spare]

        tiny = code.compare("icmp slt", pixels, height)
        (source,) = code.either(tiny, copied, lambda: [source])

        def part(first: Reg, _: list[Reg]) -> list[Reg]:
            some = least(code, size, code.binary("sub", tiles, first))
            whole, few = self._list(records, first, some, pixels)
            panels = ceil_div(code, self.geometry.channels, i64(self.shape.width))
            following = code.at(source, times(code, plus(code, first, some), height, self._pixel))
            code.loop(
                i64(0), panels, i64(1), lambda panel, _: self._panel(panel, source, to, records, whole, few, following)
            )
            return []

        code.loop(i64(0), tiles, size, part)

    def _spare(self) -> Reg:
        """Room for the pixels of a tile, behind the ring."""
        g = self.geometry
        return self.code.at(self.ring, times(self.code, i64(self.count), g.in_w, self._line))

    def _list(self, records: Reg, first: Reg, some: Reg, pixels: Reg) -> tuple[Reg, Reg]:
        """Lists tiles; how many whole ones there are, and small ones behind them. The last tile reaches back."""
        code, height, small = self.code, i64(self.shape.rows), i64(self.shape.few)

        def tile(index: Reg, carried: list[Reg]) -> list[Reg]:
            start = times(code, plus(code, first, index), height)
            left = code.binary("sub", pixels, start)
            few = code.binary("and", code.compare("icmp sle", left, small), code.compare("icmp sge", pixels, height))
            count = code.select(few, small, height)
            start = most(code, least(code, start, code.binary("sub", pixels, count)), i64(0))
            record = code.at(records, times(code, index, i64(RECORD)))
            words = times(code, start, self._pixel), least(code, count, pixels), times(code, start, self._line)
            for i, word in enumerate(words):
                code.store(word, code.at(record, i64(8 * i)), 8)
            return [code.convert("zext", few, "i64")]

        (few,) = code.loop(i64(0), some, i64(1), tile, [i64(0)])
        return code.binary("sub", some, few), few

    def _panel(
        self, panel: Reg, source: Reg, to: Reg, records: Reg, whole: Reg, few: Reg, following: Reg
    ) -> list[Reg]:  # fmt: skip
        """All listed tiles with one panel of weights."""
        code, shape = self.code, self.shape
        first = times(code, panel, i64(shape.width))
        columns = least(code, code.binary("sub", self.geometry.channels, first), i64(shape.width))
        weights = code.at(self.w, times(code, first, self._pixel))
        channel = times(code, first, i64(4))
        vectors = ceil_div(code, columns, i64(shape.lanes))
        reading = (source, self._pixel, i64(0), i64(1), i64(0), self.depth, weights)
        tile = times(code, self._pixel, i64(shape.rows))
        ahead = (following, tile, i64(4 * shape.rows * UNROLL))
        rest = code.at(records, times(code, whole, i64(RECORD)))
        for height, count, place in ((shape.rows, whole, records), (shape.few, few, rest)):
            arguments = [
                count, place, columns, *reading, code.at(to, channel), self._line, *ahead, self.operands, channel
            ]  # fmt: skip
            call_tiles(code, self.table, shape, height, vectors, arguments)
        return []
