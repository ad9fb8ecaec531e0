"""Convolutions of any form as products: tiles of pixels times panels of weights, channels last.

1x1 convolutions read the image in place; the others copy the windows of some tiles to scratch, which every panel of
weights then reads from the cache. Windows are stretches of rows where rows are long enough for tiles of pixels side by
side, else one for every pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.conv_tiles import LINE, RECORD, TileShape, call_tiles, define_tiles, tile_shape
from cpu_fallback.conv_windows import SLACK, Geometry, Windows, define_copy
from cpu_fallback.epilogues import SCALAR, Epilogue, stack
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, share, times
from cpu_fallback.loops import THREAD, THREADS, Words
from cpu_fallback.native import Target

BLOCK = 16
"""Tiles that share a panel of weights while it is in the first cache."""
IN_PLACE, WINDOWS, PLANAR = "in place", "windows", "planar windows"


@dataclass(frozen=True)
class ConvKernel:
    """A convolution by content: where tiles read from and what happens to sums.

    Words: addresses of x, of packed weights (`conv_lowering.packed`), of the result, of every operand of the epilogue
    and of scratch; bytes of scratch for a thread, threads that it has room for; the Geometry.
    """

    source: str
    epilogue: Epilogue

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        pointers = words.pointers(4 + len(self.epilogue.kinds))
        room, slots = words.numbers(2)
        geometry = Geometry(*words.numbers(len(Geometry._fields)))
        team = least(code, THREADS, slots)
        scratch = code.at(pointers.pop(), times(code, THREAD, room))
        x, w, out, *operands = pointers
        _Writer(code, target, self, x, w, out, tuple(operands), scratch, room, team, geometry).write()


@dataclass(frozen=True)
class _Tiling:
    """Tiles of a convolution: how many, how many in a row (0 where they take pixels as they come), what they read.

    A tile has one window for its first pixel if it lies in a row, else one for every pixel.
    """

    count: Reg
    in_row: Reg
    tile_nbytes: Reg
    pixel_nbytes: Reg
    segments: Reg
    segment_nbytes: Reg
    run: Reg
    windows: Windows | None


@dataclass(frozen=True)
class _Panels:
    """Panels of weights: for every group, bytes of one, of a group's."""

    count: Reg
    nbytes: Reg
    group_nbytes: Reg


@dataclass(frozen=True)
class _Writer:
    """A convolution while its code is written."""

    code: Code
    target: Target
    kernel: ConvKernel
    x: Reg
    w: Reg
    out: Reg
    operands: tuple[Reg, ...]
    scratch: Reg
    room: Reg
    team: Reg
    geometry: Geometry

    @property
    def _shape(self) -> TileShape:
        return tile_shape(self.target)

    def write(self) -> None:
        code, g = self.code, self.geometry
        tiling = self._in_place() if self.kernel.source == IN_PLACE else self._windowed()
        panels = self._panels(tiling)
        tiles, columns = self._shares(tiling.count, times(code, panels.count, g.groups))
        fitting = code.binary("udiv", code.binary("sub", self.room, i64(SLACK)), most(code, tiling.tile_nbytes, i64(1)))
        block = i64(BLOCK) if tiling.windows is None else clamp(code, fitting, i64(1), i64(BLOCK))
        lists = (stack(code, RECORD * BLOCK), stack(code, RECORD * BLOCK))

        def some_tiles(first: Reg, _: list[Reg]) -> list[Reg]:
            count = code.binary("sub", least(code, plus(code, first, block), tiles[1]), first)

            def group(index: Reg, _: list[Reg]) -> list[Reg]:
                counts = self._prepare(tiling, index, first, count, lists)
                base = times(code, index, panels.count)
                span = [clamp(code, code.binary("sub", end, base), i64(0), panels.count) for end in columns]
                tiles = list(zip(lists, counts, strict=True))
                code.loop(*span, i64(1), lambda panel, _: self._panel(tiling, panels, index, panel, count, tiles))
                return []

            groups = code.binary("udiv", columns[0], panels.count), ceil_div(code, columns[1], panels.count)
            code.loop(*groups, i64(1), group)
            return []

        code.loop(*tiles, block, some_tiles)

    def _shares(self, tiles: Reg, panels: Reg) -> tuple[tuple[Reg, Reg], tuple[Reg, Reg]]:
        """[start, stop) of tiles and of panels: a thread takes some of the tiles if there are enough, else panels."""
        code = self.code
        plenty = code.compare("icmp sge", tiles, times(code, self.team, i64(4)))
        spread, whole = code.select(plenty, tiles, panels), code.select(plenty, panels, tiles)
        start, stop = share(code, spread, self.team)
        own, all_of_them = (start, stop), (i64(0), whole)
        chosen = [
            tuple(code.select(plenty, a, b) for a, b in zip(yes, no, strict=True))
            for yes, no in ((own, all_of_them), (all_of_them, own))
        ]
        return chosen[0], chosen[1]  # type: ignore[return-value]

    def _in_place(self) -> _Tiling:
        code, g = self.code, self.geometry
        pixel = times(code, g.channels, i64(4))
        count = ceil_div(code, g.pixels, i64(self._shape.rows))
        nbytes = times(code, pixel, i64(self._shape.rows))
        return _Tiling(count, i64(0), nbytes, pixel, i64(1), i64(0), g.group_channels, None)

    def _windowed(self) -> _Tiling:
        """In rows if that wastes less than a fifth of the tiles' pixels."""
        code, g, shape = self.code, self.geometry, self._shape
        in_row = ceil_div(code, g.out_w, i64(shape.rows))
        last = code.binary("sub", g.out_w, times(code, code.binary("sub", in_row, i64(1)), i64(shape.rows)))
        spared = code.select(code.compare("icmp sle", last, i64(shape.few)), i64(shape.rows - shape.few), i64(0))
        computed = code.binary("sub", times(code, in_row, i64(shape.rows)), spared)
        good = code.compare("icmp sge", times(code, g.out_w, i64(5)), times(code, computed, i64(4)))
        dense = code.compare("icmp eq", g.dilation_w, i64(1))
        rows = code.binary("and", good, dense)
        stretch = plus(code, times(code, g.stride_w, i64(shape.rows - 1)), g.kernel_w)
        windows = Windows(
            self.target,
            self.kernel.source == PLANAR,
            g,
            code.select(rows, stretch, g.kernel_w),
            code.select(rows, i64(1), g.dilation_w),
        )
        side = i64(1) if windows.planar else g.group_channels
        segments, segment = windows.segments(code), windows.segment_nbytes(code)
        window = times(code, segments, segment)
        lines = code.binary("udiv", g.pixels, most(code, g.out_w, i64(1)))
        scattered = ceil_div(code, g.pixels, i64(shape.rows))
        return _Tiling(
            code.select(rows, times(code, lines, in_row), scattered),
            code.select(rows, in_row, i64(0)),
            code.select(rows, window, times(code, window, i64(shape.rows))),
            code.select(rows, times(code, g.stride_w, side, i64(4)), window),
            segments,
            segment,
            times(code, g.kernel_w, side),
            windows,
        )

    def _panels(self, tiling: _Tiling) -> _Panels:
        """The last panel of a group is as many vectors wide as it must be."""
        code, g, lanes = self.code, self.geometry, self._shape.lanes
        depth = times(code, tiling.segments, tiling.run, i64(4))
        padded = times(code, ceil_div(code, g.group_outputs, i64(lanes)), i64(lanes))
        count = ceil_div(code, g.group_outputs, i64(self._shape.width))
        return _Panels(count, times(code, depth, i64(self._shape.width)), times(code, depth, padded))

    def _prepare(self, tiling: _Tiling, group: Reg, first: Reg, count: Reg, lists: tuple[Reg, Reg]) -> list[Reg]:
        """Lists the `count` tiles from `first` on, those with few pixels in the second list; the lengths of both."""
        code, g = self.code, self.geometry

        def tile(index: Reg, lengths: list[Reg]) -> list[Reg]:
            pixel, rows = self._pixels(tiling, plus(code, first, index))
            place = self._place(tiling, group, index, pixel, rows)
            few = code.compare("icmp sle", rows, i64(self._shape.few))
            length = code.select(few, lengths[1], lengths[0])
            record = code.at(code.select(few, lists[1], lists[0]), times(code, length, i64(RECORD)))
            for i, value in enumerate((place, rows, times(code, pixel, g.outputs, i64(4)))):
                code.store(value, code.at(record, i64(8 * i)), 8)
            more = code.convert("zext", few, "i64")
            return [code.binary("sub", plus(code, lengths[0], i64(1)), more), plus(code, lengths[1], more)]

        return code.loop(i64(0), count, i64(1), tile, [i64(0), i64(0)])

    def _pixels(self, tiling: _Tiling, tile: Reg) -> tuple[Reg, Reg]:
        """(first pixel, number of pixels) of a tile."""
        code, g, height = self.code, self.geometry, i64(self._shape.rows)
        in_row = most(code, tiling.in_row, i64(1))
        line, place = code.binary("udiv", tile, in_row), code.binary("urem", tile, in_row)
        rows = code.compare("icmp sgt", tiling.in_row, i64(0))
        start = times(code, code.select(rows, place, tile), height)
        base = code.select(rows, times(code, line, g.out_w), i64(0))
        left = code.binary("sub", code.select(rows, g.out_w, g.pixels), start)
        return plus(code, base, start), least(code, left, height)

    def _source(self, tiling: _Tiling) -> Reg:
        return self.x if tiling.windows is None else self.scratch

    def _place(self, tiling: _Tiling, group: Reg, index: Reg, pixel: Reg, rows: Reg) -> Reg:
        """Where a tile starts in `_source`, after its windows are copied."""
        code, windows = self.code, tiling.windows
        if windows is None:
            return self._whole_rows(tiling, group, pixel, rows)
        offset = times(code, index, tiling.tile_nbytes)
        start = code.at(self.scratch, offset)
        single = code.compare("icmp sgt", tiling.in_row, i64(0))

        def part(i: Reg, _: list[Reg]) -> list[Reg]:
            windows.copy(code, self.x, group, plus(code, pixel, i), code.at(start, times(code, i, tiling.pixel_nbytes)))
            return []

        code.loop(i64(0), code.select(single, i64(1), rows), i64(1), part)
        return offset

    def _whole_rows(self, tiling: _Tiling, group: Reg, pixel: Reg, rows: Reg) -> Reg:
        """Pixels in place, or copied where fewer are left than a tile reads."""
        code, g = self.code, self.geometry
        offset = times(code, plus(code, times(code, pixel, g.channels), times(code, group, g.group_channels)), i64(4))
        few = code.compare("icmp sle", rows, i64(self._shape.few))
        enough = code.select(few, i64(self._shape.few), i64(self._shape.rows))

        def copied() -> list[Reg]:
            name = define_copy(code, self.target)
            step = tiling.pixel_nbytes
            reach = plus(code, times(code, code.binary("sub", rows, i64(1)), g.channels), g.group_channels)
            arguments = [self.scratch, code.at(self.x, offset), i64(0), i64(1), reach, step, i64(0)]
            code.do(f"call void @{name}({', '.join(map(str, arguments))})")
            ends = [code.convert("ptrtoint", end, "i64") for end in (self.scratch, self.x)]
            return [code.binary("sub", *ends)]

        return code.either(code.compare("icmp eq", rows, enough), lambda: [offset], copied)[0]

    def _panel(
        self, tiling: _Tiling, panels: _Panels, group: Reg, panel: Reg, count: Reg, tiles: list[tuple[Reg, Reg]]
    ) -> list[Reg]:
        """Every listed tile with one panel."""
        code, g, width = self.code, self.geometry, self._shape.width
        first = times(code, panel, i64(width))
        columns = least(code, code.binary("sub", g.group_outputs, first), i64(width))
        weights = code.at(self.w, plus(code, times(code, group, panels.group_nbytes), times(code, panel, panels.nbytes)))
        channel = times(code, plus(code, times(code, group, g.group_outputs), first), i64(4))
        ahead = self._ahead(tiling, panels, panel, weights, count, tiles[0][0])
        operands = [
            operand if kind == SCALAR else code.at(operand, channel)
            for kind, operand in zip(self.kernel.epilogue.kinds, self.operands, strict=True)
        ]
        reading = (self._source(tiling), tiling.pixel_nbytes, tiling.segments, tiling.segment_nbytes, tiling.run)
        writing = (code.at(self.out, channel), times(code, g.outputs, i64(4)))
        for (records, length), rows in zip(tiles, (self._shape.rows, self._shape.few), strict=True):
            arguments = [length, records, columns, *reading, weights, *writing, *ahead, *operands]
            self._call(rows, columns, arguments)
        return []

    def _ahead(
        self, tiling: _Tiling, panels: _Panels, panel: Reg, weights: Reg, count: Reg, records: Reg
    ) -> tuple[Reg, Reg, Reg]:
        """What tiles prefetch: the next tile where the image is read first, else their share of the next panel."""
        code = self.code
        share = code.binary("udiv", i64(2 * LINE), count)
        own = (code.at(weights, panels.nbytes), times(code, tiling.segments, tiling.run, share), share)
        if tiling.windows is not None:
            return own
        step = i64(4 * self._shape.rows)
        first = code.at(self.x, plus(code, code.load("i64", records, 8), tiling.tile_nbytes))
        following = (first, tiling.tile_nbytes, step)
        initial = code.compare("icmp eq", panel, i64(0))
        chosen = [code.select(initial, a, b) for a, b in zip(following, own, strict=True)]
        return chosen[0], chosen[1], chosen[2]

    def _call(self, rows: int, columns: Reg, arguments: list[Reg]) -> None:
        """The tile function for panels of so many columns."""

        def with_vectors(vectors: int) -> list[Reg]:
            name = define_tiles(self.code, self.target, rows, vectors, self.kernel.epilogue)
            call_tiles(self.code, name, arguments)
            return []

        wide = self.code.compare("icmp sgt", columns, i64(self._shape.lanes))
        self.code.either(wide, lambda: with_vectors(2), lambda: with_vectors(1))
