"""Convolutions of any form as products: tiles of pixels times panels of weights, channels last.

1x1 convolutions read the image in place; the others copy the windows of some tiles to scratch, which every panel of
weights then reads from the cache. Windows are stretches of rows where rows are long enough for tiles of pixels side by
side, else one for every pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.conv_tiles import (
    AHEAD,
    RECORD,
    UNROLL,
    TileShape,
    call_tiles,
    define_table,
    tile_shape,
    weights_ahead,
)
from cpu_fallback.conv_tiling import MOST, Tiling, tiles_in_place, tiles_of_windows
from cpu_fallback.conv_windows import Geometry
from cpu_fallback.epilogues import Epilogue, stack
from cpu_fallback.integers import ceil_div, clamp, in_equal_parts, least, plus, share, times
from cpu_fallback.loops import BLOCK, THREAD, THREADS, Words
from cpu_fallback.native import SIGNATURE, Target, attributes

FLAT, GATED, IN_PLACE, WINDOWS, PLANAR = "flat", "gated", "in place", "windows", "planar windows"


PARAMETERS = f"{SIGNATURE}, ptr %tiles"


@dataclass(frozen=True)
class ConvKernel:
    """A convolution by content: where tiles read from, in runs of how many elements (0: any), how many vectors panels
    of weights have, what happens to sums.

    Words: addresses of x, of packed weights (`conv_weights.tile_weights`), of the result and of scratch; bytes of
    scratch for a thread, threads that it has room for; the Geometry; if gated, the address of what every channel of
    every image is multiplied with first; the operands of the epilogue. All but the tiles is a function that kernels
    share.
    """

    source: str
    run: int
    vectors: tuple[int, ...]
    epilogue: Epilogue

    def write(self, code: Code, target: Target) -> None:
        name = f"convolve_{self.source.replace(' ', '_')}_{target.vector_nbytes}"
        code.define(name, PARAMETERS, attributes(target), lambda inner: write_driver(inner, target, self.source))
        table = define_table(code, target, self.vectors, self.epilogue, self.run)
        code.do(f"call void @{name}({BLOCK}, {THREAD}, {THREADS}, ptr @{table})")


def write_driver(code: Code, target: Target, source: str) -> None:
    """The function that walks tiles and panels; `%tiles` is a table of functions as `define_table` makes it."""
    words = Words(code)
    x, w, out, scratch = words.pointers(4)
    room, slots = words.numbers(2)
    geometry = Geometry(*words.numbers(len(Geometry._fields)))
    gate = words.take("ptr") if source == GATED else None
    scratch = code.at(scratch, times(code, THREAD, room))
    team = least(code, THREADS, slots)
    _Driver(code, target, source, x, w, out, words.address(), scratch, room, team, geometry, gate).write()


@dataclass(frozen=True)
class _Panels:
    """Panels of weights: for every group, bytes of one, of a group's."""

    count: Reg
    nbytes: Reg
    group_nbytes: Reg


@dataclass(frozen=True)
class _Driver:
    """The function around the tiles while it is written."""

    code: Code
    target: Target
    source: str
    x: Reg
    w: Reg
    out: Reg
    operands: Reg
    scratch: Reg
    room: Reg
    team: Reg
    geometry: Geometry
    gate: Reg | None

    @property
    def _shape(self) -> TileShape:
        return tile_shape(self.target)

    def write(self) -> None:
        code, g = self.code, self.geometry
        if self.source in (FLAT, GATED, IN_PLACE):
            flat = self.source != IN_PLACE
            tiling = tiles_in_place(code, self.target, self._shape, g, flat=flat, gate=self.gate)
        else:
            tiling = tiles_of_windows(code, self.target, self._shape, g, planar=self.source == PLANAR)
        panels = self._panels(tiling)
        chunks, columns = self._shares(tiling.chunks, times(code, panels.count, g.groups))
        block = in_equal_parts(code, code.binary("sub", chunks[1], chunks[0]), tiling.block(self.room))
        lists = (stack(code, RECORD * MOST), stack(code, RECORD * MOST))

        def some_chunks(first: Reg, _: list[Reg]) -> list[Reg]:
            count = code.binary("sub", least(code, plus(code, first, block), chunks[1]), first)

            def group(index: Reg, _: list[Reg]) -> list[Reg]:
                lengths = self._prepare(tiling, index, first, count, lists)
                base = times(code, index, panels.count)
                span = [clamp(code, code.binary("sub", end, base), i64(0), panels.count) for end in columns]
                tiles = list(zip(lists, lengths, strict=True))
                code.loop(span[0], span[1], i64(1), lambda panel, _: self._panel(tiling, panels, index, panel, tiles))
                return []

            groups = code.binary("udiv", columns[0], panels.count), ceil_div(code, columns[1], panels.count)
            code.loop(groups[0], groups[1], i64(1), group)
            return []

        code.loop(*chunks, block, some_chunks)

    def _shares(self, tiles: Reg, panels: Reg) -> tuple[tuple[Reg, Reg], tuple[Reg, Reg]]:
        """[start, stop) of tiles and of panels: a thread takes some of the tiles if there are enough, and more
        pixels to read than weights, else panels."""
        code = self.code
        plenty = code.compare("icmp sge", tiles, times(code, self.team, i64(4)))
        plenty = code.binary("and", plenty, code.compare("icmp sge", self.geometry.pixels, self.geometry.outputs))
        spread, whole = code.select(plenty, tiles, panels), code.select(plenty, panels, tiles)
        start, stop = share(code, spread, self.team)
        own, all_of_them = (start, stop), (i64(0), whole)
        chosen = [
            tuple(code.select(plenty, a, b) for a, b in zip(yes, no, strict=True))
            for yes, no in ((own, all_of_them), (all_of_them, own))
        ]
        return chosen[0], chosen[1]  # type: ignore[return-value]

    def _panels(self, tiling: Tiling) -> _Panels:
        """The last panel of a group is as many vectors wide as it must be."""
        code, g, lanes = self.code, self.geometry, self._shape.lanes
        depth = times(code, tiling.segments, tiling.run, i64(4))
        padded = times(code, ceil_div(code, g.group_outputs, i64(lanes)), i64(lanes))
        count = ceil_div(code, g.group_outputs, i64(self._shape.width))
        return _Panels(count, times(code, depth, i64(self._shape.width)), times(code, depth, padded))

    def _prepare(self, tiling: Tiling, group: Reg, first: Reg, count: Reg, lists: tuple[Reg, Reg]) -> list[Reg]:
        """Lists the tiles of `count` chunks, those with few pixels in the second list; the lengths of both."""
        code = self.code

        def chunk(index: Reg, carried: list[Reg]) -> list[Reg]:
            initial, number = tiling.tiles(plus(code, first, index))
            start = tiling.copy(self.x, self.scratch, group, index, initial)

            def tile(i: Reg, carried: list[Reg]) -> list[Reg]:
                many, some, used = carried
                pixel, rows, result = tiling.pixels(plus(code, initial, i))
                if tiling.gate is not None:
                    place = used
                    used = tiling.scaled(self.x, self.scratch, pixel, rows, used)
                elif tiling.windows is None:
                    place, used = tiling.in_place(self.x, self.scratch, group, pixel, rows, used)
                else:
                    place = tiling.place(start, i)
                few = code.compare("icmp sle", rows, i64(self._shape.few))
                length = code.select(few, some, many)
                record = code.at(code.select(few, lists[1], lists[0]), times(code, length, i64(RECORD)))
                for word, value in enumerate((place, rows, result)):
                    code.store(value, code.at(record, i64(8 * word)), 8)
                more = code.convert("zext", few, "i64")
                return [code.binary("sub", plus(code, many, i64(1)), more), plus(code, some, more), used]

            return code.loop(i64(0), number, i64(1), tile, carried)

        return code.loop(i64(0), count, i64(1), chunk, [i64(0), i64(0), i64(0)])[:2]

    def _panel(
        self, tiling: Tiling, panels: _Panels, group: Reg, panel: Reg, tiles: list[tuple[Reg, Reg]]
    ) -> list[Reg]:
        """Every listed tile with one panel."""
        code, g, width = self.code, self.geometry, self._shape.width
        first = times(code, panel, i64(width))
        columns = least(code, code.binary("sub", g.group_outputs, first), i64(width))
        weights = code.at(
            self.w, plus(code, times(code, group, panels.group_nbytes), times(code, panel, panels.nbytes))
        )
        channel = times(code, plus(code, times(code, group, g.group_outputs), first), i64(4))
        vectors = ceil_div(code, columns, i64(self._shape.lanes))
        ahead = self._ahead(tiling, panel, weights, vectors, tiles)
        source = self.x if tiling.in_image else self.scratch
        reading = (source, tiling.a_row, tiling.a_jump, tiling.segments, tiling.segment_nbytes, tiling.run)
        writing = (code.at(self.out, channel), times(code, g.step_w, g.outputs, i64(4)))
        for (records, length), rows in zip(tiles, (self._shape.rows, self._shape.few), strict=True):
            arguments = [length, records, columns, *reading, weights, *writing, *ahead, self.operands, channel]
            call_tiles(code, Reg("%tiles", "ptr"), self._shape, rows, vectors, arguments)
        return []

    def _ahead(
        self, tiling: Tiling, panel: Reg, weights: Reg, vectors: Reg, tiles: list[tuple[Reg, Reg]]
    ) -> tuple[Reg, Reg, Reg]:
        """What tiles prefetch: the next tile where the image is read first, else weights."""
        code = self.code
        (records, _), _ = tiles
        own = weights_ahead(code, weights, vectors, self._shape, i64(AHEAD))
        if not tiling.in_image:
            return own
        step = i64(4 * self._shape.rows * UNROLL)
        first = code.at(self.x, plus(code, code.load("i64", records, 8), tiling.chunk_nbytes))
        following = (first, tiling.chunk_nbytes, step)
        initial = code.compare("icmp eq", panel, i64(0))
        chosen = [code.select(initial, a, b) for a, b in zip(following, own, strict=True)]
        return chosen[0], chosen[1], chosen[2]
