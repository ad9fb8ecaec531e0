"""How the pixels of a convolution are cut into register tiles, and where each tile reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.conv_tiles import TileShape
from cpu_fallback.conv_windows import Geometry, Windows, define_copy, define_scaling
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.native import Target

MOST, LEAST = 32, 8
"""Tiles that share a panel of weights while it is in the first cache: as many as are in there with it, or at least."""
FIRST_NBYTES = 16 << 10
"""Bytes of pixels in the first cache."""
NEAR_NBYTES = 64 << 10
"""Bytes of a window that several tiles share."""


@dataclass(frozen=True)
class Tiling:
    """Tiles of a convolution, registers but for what is known now.

    `in_row` tiles make a row of results; 0 if tiles take pixels as they come. A chunk is up to `chunk` tiles of a row.
    A tile reads `a_row` bytes further for every pixel, and `a_jump` further still from its second half on. With
    `windows` a chunk has one window of `part_nbytes` for every `part` pixels. The depth is `segments` runs of `run`
    elements, `segment_nbytes` apart.
    """

    code: Code
    target: Target
    shape: TileShape
    geometry: Geometry
    chunks: Reg
    chunk: Reg
    chunk_nbytes: Reg
    in_row: Reg
    part: Reg
    part_nbytes: Reg
    a_row: Reg
    a_jump: Reg
    segments: Reg
    segment_nbytes: Reg
    run: Reg
    windows: Windows | None
    gate: Reg | None = None

    @property
    def in_image(self) -> bool:
        """Whether tiles read the image itself."""
        return self.windows is None and self.gate is None

    @property
    def _flat(self) -> bool:
        """Whether it is known now that pixels of the result are those of the image, one after the other."""
        return self.windows is None and self.in_row == i64(0)

    def tiles(self, number: Reg) -> tuple[Reg, Reg]:
        """(first tile, how many) of a chunk."""
        code = self.code
        if self._flat:
            return number, i64(1)
        rows = code.compare("icmp sgt", self.in_row, i64(0))
        each = most(code, ceil_div(code, self.in_row, self.chunk), i64(1))
        line, place = code.binary("udiv", number, each), code.binary("urem", number, each)
        start = times(code, place, self.chunk)
        first = code.select(rows, plus(code, times(code, line, self.in_row), start), number)
        left = code.binary("sub", self.in_row, start)
        return first, code.select(rows, least(code, left, self.chunk), i64(1))

    def pixels(self, tile: Reg) -> tuple[Reg, Reg, Reg]:
        """(first pixel, number of pixels, byte offset of the first result) of a tile."""
        code, g, height = self.code, self.geometry, i64(self.shape.rows)
        if self._flat:
            pixel = times(code, tile, height)
            left = code.binary("sub", g.pixels, pixel)
            return pixel, least(code, left, height), times(code, pixel, g.outputs, i64(4))
        in_row = most(code, self.in_row, i64(1))
        rows = code.compare("icmp sgt", self.in_row, i64(0))
        line, place = code.binary("udiv", tile, in_row), code.binary("urem", tile, in_row)
        start = times(code, code.select(rows, place, tile), height)
        pixel = plus(code, code.select(rows, times(code, line, g.out_w), i64(0)), start)
        left = code.binary("sub", code.select(rows, g.out_w, g.pixels), start)
        (_, y, z), image = coordinates(code, g, times(code, line, g.out_w))
        depth = plus(code, times(code, image, g.full_d), times(code, z, g.step_d))
        height_line = plus(code, times(code, depth, g.full_h), times(code, y, g.step_h))
        spread = plus(code, times(code, height_line, g.full_w), times(code, start, g.step_w))
        result = times(code, code.select(rows, spread, pixel), g.outputs, i64(4))
        return pixel, least(code, left, height), result

    def copy(self, x: Reg, scratch: Reg, group: Reg, index: Reg, tile: Reg) -> Reg:
        """Copy the windows of the chunk that begins with `tile`, number `index` in scratch; their offset there."""
        code, windows = self.code, self.windows
        if windows is None:
            return i64(0)
        offset = times(code, index, self.chunk_nbytes)
        start = code.at(scratch, offset)
        pixel, rows, _ = self.pixels(tile)

        def part(i: Reg, _: list[Reg]) -> list[Reg]:
            own = plus(code, pixel, times(code, i, self.part))
            windows.copy(code, x, group, own, code.at(start, times(code, i, self.part_nbytes)))
            return []

        code.loop(i64(0), ceil_div(code, rows, self.part), i64(1), part)
        return offset

    def place(self, start: Reg, index: Reg) -> Reg:
        """Where tile number `index` of the chunk copied to `start` reads, from scratch on."""
        return plus(self.code, start, times(self.code, index, self.a_row, i64(self.shape.rows)))

    def in_place(self, x: Reg, scratch: Reg, group: Reg, pixel: Reg, rows: Reg, used: Reg) -> tuple[Reg, Reg]:
        """Where a tile reads the image itself, from x on; a copy in scratch, the one after `used` others, where the
        tile would read behind the image. How many are used then."""
        code, g = self.code, self.geometry
        place = pixel if self._flat else self._source(pixel)
        element = plus(code, times(code, place, g.channels), times(code, group, g.group_channels))
        offset = times(code, element, i64(4))
        few = code.compare("icmp sle", rows, i64(self.shape.few))
        read = code.select(few, i64(self.shape.few), i64(self.shape.rows))
        end = plus(code, offset, self._reach(read))

        def copied() -> list[Reg]:
            name = define_copy(code, self.target)
            to = code.at(scratch, times(code, used, self.chunk_nbytes))
            count = code.binary("udiv", self._reach(rows), i64(4))
            arguments = [to, code.at(x, offset), i64(0), i64(1), count, self.a_row, i64(0)]
            code.do(f"call void @{name}({', '.join(map(str, arguments))})")
            ends = [code.convert("ptrtoint", end, "i64") for end in (to, x)]
            return [code.binary("sub", *ends), plus(code, used, i64(1))]

        inside = code.compare("icmp sle", end, self._image_nbytes())
        found, used = code.either(inside, lambda: [offset, used], copied)
        return found, used

    def scaled(self, x: Reg, scratch: Reg, pixel: Reg, rows: Reg, offset: Reg) -> Reg:
        """Copy the pixels of a tile times their gates to `offset` bytes into scratch; where the next tile goes."""
        code, g = self.code, self.geometry
        assert self.gate is not None
        name = define_scaling(code, self.target)
        image = most(code, times(code, g.out_d, g.out_h, g.out_w), i64(1))
        source = code.at(x, times(code, pixel, self.a_row))
        arguments = [code.at(scratch, offset), source, self.gate, pixel, rows, g.channels, image]
        code.do(f"call void @{name}({', '.join(map(str, arguments))})")
        return plus(code, offset, self.chunk_nbytes)

    def _source(self, pixel: Reg) -> Reg:
        """The pixel of the image that a pixel of the result is at."""
        code, g = self.code, self.geometry
        (column, y, z), image = coordinates(code, g, pixel)
        plane = plus(code, times(code, image, g.in_d), times(code, z, g.stride_d))
        line = plus(code, times(code, plane, g.in_h), times(code, y, g.stride_h))
        return plus(code, times(code, line, g.in_w), times(code, column, g.stride_w))

    def _reach(self, rows: Reg) -> Reg:
        """Bytes from the first element that so many pixels read to behind the last."""
        code = self.code
        steps = times(code, code.binary("sub", rows, i64(1)), self.a_row)
        return plus(code, steps, times(code, self.geometry.group_channels, i64(4)))

    def _image_nbytes(self) -> Reg:
        """Of the whole batch."""
        code, g = self.code, self.geometry
        each = most(code, times(code, g.out_d, g.out_h, g.out_w), i64(1))
        return times(code, code.binary("udiv", g.pixels, each), g.in_d, g.in_h, g.in_w, g.channels, i64(4))

    def block(self, room: Reg) -> Reg:
        """Chunks at a time: what scratch has room for, though in place only the last few tiles are ever copied."""
        code = self.code
        fitting = code.binary("udiv", room, most(code, self.chunk_nbytes, i64(1)))
        near = code.binary("udiv", i64(FIRST_NBYTES), most(code, self.chunk_nbytes, i64(1)))
        limit = clamp(
            code, near, code.binary("udiv", i64(LEAST), self.chunk), code.binary("udiv", i64(MOST), self.chunk)
        )
        limit = most(code, limit, i64(1))
        if self.in_image:
            lines = ceil_div(code, i64(self.shape.rows), most(code, self.geometry.out_w, i64(1)))
            copied = code.select(code.compare("icmp sgt", self.in_row, i64(0)), plus(code, lines, i64(1)), i64(1))
            fitting = code.select(code.compare("icmp sge", fitting, copied), limit, fitting)
        return clamp(code, fitting, i64(1), limit)


def coordinates(code: Code, geometry: Geometry, pixel: Reg) -> tuple[tuple[Reg, Reg, Reg], Reg]:
    """((column, row, plane) of an output pixel, its image)."""
    rest, places = pixel, []
    for extent in (geometry.out_w, geometry.out_h, geometry.out_d):
        extent = most(code, extent, i64(1))
        places.append(code.binary("urem", rest, extent))
        rest = code.binary("udiv", rest, extent)
    return (places[0], places[1], places[2]), rest


def _spread(code: Code, g: Geometry) -> Reg:
    """Whether neighbours in the result are not neighbours in memory."""
    steps = times(code, g.step_d, g.step_h, g.step_w)
    return code.compare("icmp ne", steps, i64(1))


def tiles_in_place(
    code: Code, target: Target, shape: TileShape, g: Geometry, *, flat: bool, gate: Reg | None = None
) -> Tiling:  # fmt: skip
    """Tiles of a 1x1 convolution without strides and padding: pixels as they come, or, if not `flat`, rows of them
    whose results may lie apart."""
    in_row = i64(0) if flat else ceil_div(code, g.out_w, i64(shape.rows))
    lines = code.binary("udiv", g.pixels, most(code, g.out_w, i64(1)))
    count = ceil_div(code, g.pixels, i64(shape.rows)) if flat else times(code, lines, in_row)
    a_row = times(code, g.channels, i64(4))
    return Tiling(
        code, target, shape, g, count, i64(1), times(code, a_row, i64(shape.rows)), in_row,
        i64(1), i64(0), a_row, i64(0), i64(1), i64(0), g.group_channels, None, gate,
    )  # fmt: skip


def tiles_of_windows(code: Code, target: Target, shape: TileShape, g: Geometry, *, planar: bool) -> Tiling:
    """Tiles with copied windows: stretches of rows if that wastes less than a fifth of the tiles' pixels, two rows to
    a tile if a row is half a tile, else a window for every pixel."""
    in_row = ceil_div(code, g.out_w, i64(shape.rows))
    stretched, pairs, rows = _forms(code, shape, g, in_row)
    side = i64(1) if planar else g.group_channels
    tile_nbytes = times(code, side, g.kernel_d, g.kernel_h, g.stride_w, i64(4 * shape.rows))
    tile_nbytes = times(code, tile_nbytes, g.group_channels) if planar else tile_nbytes
    chunk = clamp(code, code.binary("udiv", i64(NEAR_NBYTES), tile_nbytes), i64(1), least(code, in_row, i64(MOST)))
    chunk = code.select(rows, most(code, chunk, i64(1)), i64(1))
    part = code.select(rows, times(code, chunk, i64(shape.rows)), code.select(pairs, i64(shape.few), i64(1)))
    reach = plus(code, times(code, g.stride_w, code.binary("sub", part, i64(1))), g.kernel_w)
    span = code.select(stretched, reach, g.kernel_w)
    windows = Windows(target, planar, g, span, code.select(stretched, i64(1), g.dilation_w))
    segments, segment = windows.segments(code), windows.segment_nbytes(code)
    window = times(code, segments, segment)
    parts = code.select(rows, i64(1), code.binary("udiv", i64(shape.rows), part))
    a_row = code.select(stretched, times(code, g.stride_w, side, i64(4)), window)
    lines = code.binary("udiv", g.pixels, most(code, g.out_w, i64(1)))
    in_lines = times(code, lines, ceil_div(code, in_row, chunk))
    return Tiling(
        code, target, shape, g,
        code.select(rows, in_lines, ceil_div(code, g.pixels, i64(shape.rows))), chunk, times(code, window, parts),
        code.select(rows, in_row, i64(0)), part, window, a_row,
        code.select(pairs, code.binary("sub", window, times(code, a_row, i64(shape.few))), i64(0)),
        segments, segment, times(code, g.kernel_w, side), windows,
    )  # fmt: skip


def _forms(code: Code, shape: TileShape, g: Geometry, in_row: Reg) -> tuple[Reg, Reg, Reg]:
    """Whether windows are stretches of rows; if so, whether two rows make a tile; whether tiles make a row."""
    yes = Reg("true", "i1")
    last = code.binary("sub", g.out_w, times(code, code.binary("sub", in_row, i64(1)), i64(shape.rows)))
    spared = code.select(code.compare("icmp sle", last, i64(shape.few)), i64(shape.rows - shape.few), i64(0))
    computed = code.binary("sub", times(code, in_row, i64(shape.rows)), spared)
    good = code.compare("icmp sge", times(code, g.out_w, i64(5)), times(code, computed, i64(4)))
    spread = _spread(code, g)
    dense = code.compare("icmp eq", g.dilation_w, i64(1))
    good = code.binary("and", good, code.compare("icmp sle", g.stride_w, g.kernel_w))
    stretched = code.binary("and", code.binary("or", good, spread), dense)
    half = code.compare("icmp eq", g.out_w, i64(shape.few))
    half = code.binary("and", half, code.binary("xor", spread, yes))
    return stretched, code.binary("and", stretched, half), code.binary("and", stretched, code.binary("xor", half, yes))
