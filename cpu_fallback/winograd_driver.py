"""The order in which a Winograd convolution F(m x m, 3 x 3) of stride 1 is computed, channels last: m is 2 or 4.

An image tile of (m + 2) x (m + 2) pixels is transformed, multiplied point by point with transformed weights, and
transformed back to m x m results. Some tiles at a time: so many that what is transformed stays in the second cache, if
the weights do too and can be read again for other tiles; else as many as there is room for, and weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cpu_fallback.caches import caches
from cpu_fallback.code import Code, Reg, i64, vector
from cpu_fallback.conv_tiles import AHEAD, LINE, RECORD, TileShape, call_tiles, every, tile_shape, weights_ahead
from cpu_fallback.conv_windows import SLACK, Geometry, Windows
from cpu_fallback.epilogues import stack
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, share, times
from cpu_fallback.loops import BLOCK, THREAD, THREADS, Words
from cpu_fallback.native import SIGNATURE, Target, attributes
from cpu_fallback.vector_math import Num
from cpu_fallback.winograd_transforms import Row, points, twice

TAPS = 3
LISTED = 64
"""Register tiles of transformed image tiles at a time."""
STREAMED_ROOM = 4 << 20
"""Bytes that transformed images and products may take where weights are too large for the second cache."""
SIZES = {"float": 4, "i32": 4, "i16": 2}
FINISH = (
    "ptr %stage, i64 %cell, i64 %channel, i64 %left, i64 %down, i64 %across, i64 %pixel, i64 %row, ptr %out, "
    "ptr %operands"
)
PARAMETERS = f"{SIGNATURE}, ptr %finish"
Transform = Callable[[Row], Row]


@dataclass(frozen=True)
class Numbers:
    """What a convolution computes with: `name`, LLVM types of elements of images and of products, which take 4 bytes a
    channel, the table of tiles (see `conv_tiles.define_table`), the transforms, and what undoes their scale."""

    name: str
    image: str
    product: str
    define_table: Callable[[Code, Target], str]
    forward: Mapping[int, Transform]
    backward: Mapping[int, Transform]
    rescaled: Callable[[Num, int], Num]


class Room(NamedTuple):
    """Scratch for a thread in bytes, and how many panels of weights go by before results are transformed back."""

    nbytes: int
    group: int


def room_for(m: int, channels: int, outputs: int, shape: TileShape) -> Room:
    """For a convolution of so many channels of 4 bytes."""
    streamed = points(m) * channels * outputs * 4 > caches().l2
    group = -(-outputs // shape.width) if streamed else 1
    tile = points(m) * (_odd_lines(channels * 4) + _odd_lines(group * shape.width * 4))
    least_nbytes = shape.rows * tile + points(m) * channels * 4 + SLACK
    nbytes = max(STREAMED_ROOM if streamed else caches().l2 * 3 // 4, least_nbytes)
    return Room(-(-nbytes // LINE) * LINE, group)


def _odd_lines(nbytes: int) -> int:
    """An odd number of cache lines: rows of tiles do not push each other out of the first cache."""
    return (-(-nbytes // LINE) | 1) * LINE


def write_winograd(
    code: Code, target: Target, m: int, numbers: Numbers, digest: str, write_finish: Callable[[Code], None]
) -> None:
    """The code of a kernel; see `conv_winograd.WinogradKernel` for its words. All but what happens to results is a
    function that kernels share; `write_finish` writes the other, of FINISH, named by the epilogue's `digest`.

    It takes the results of one image tile and one vector of channels, at `stage`: `down` rows of `across` results,
    `left` channels of the vector; `channel` and `cell` are the byte offsets of the first channel and of its first
    result, `pixel` and `row` are how far the next are.
    """
    suffix = f"{numbers.name}_{m}_{target.vector_nbytes}"
    name, finish = f"winograd_{suffix}", f"winograd_finish_{suffix}_{digest}"
    code.define(name, PARAMETERS, attributes(target), lambda inner: _write_driver(inner, target, m, numbers))
    code.define(finish, FINISH, attributes(target), write_finish)
    code.do(f"call void @{name}({BLOCK}, {THREAD}, {THREADS}, ptr @{finish})")


def _write_driver(code: Code, target: Target, m: int, numbers: Numbers) -> None:
    words = Words(code)
    x, w, out, scratch = words.pointers(4)
    room, group, slots = words.numbers(3)
    geometry = Geometry(*words.numbers(len(Geometry._fields)))
    scratch = code.at(scratch, times(code, THREAD, room))
    team = least(code, THREADS, slots)
    _Driver(code, target, m, numbers, x, w, out, words.address(), scratch, room, group, team, geometry).write()


@dataclass(frozen=True)
class _Chunk:
    """Scratch for some tiles: [points][tiles][channels] of images, [points][tiles][group of panels] of products, and
    one window; bytes of their lines and planes."""

    capacity: Reg
    line: Reg
    images: Reg
    plane: Reg
    products: Reg
    product_line: Reg
    product_plane: Reg
    window: Reg


@dataclass(frozen=True)
class _Driver:
    """The function around tiles and epilogue while it is written."""

    code: Code
    target: Target
    m: int
    numbers: Numbers
    x: Reg
    w: Reg
    out: Reg
    operands: Reg
    scratch: Reg
    room: Reg
    group: Reg
    team: Reg
    geometry: Geometry

    @property
    def _shape(self) -> TileShape:
        return tile_shape(self.target)

    @property
    def _lanes(self) -> int:
        return self._shape.lanes

    @property
    def _side(self) -> int:
        return self.m + TAPS - 1

    def write(self) -> None:
        code, g = self.code, self.geometry
        across, down = (ceil_div(code, extent, i64(self.m)) for extent in (g.out_w, g.out_h))
        images = code.binary("udiv", g.pixels, most(code, times(code, g.out_w, g.out_h), i64(1)))
        total = times(code, images, across, down)
        panels = ceil_div(code, g.outputs, i64(self._shape.width))
        tiles, columns = self._shares(total, panels)
        chunk = self._chunk(code.binary("sub", tiles[1], tiles[0]))
        grid = g._replace(
            out_w=across, out_h=down, out_d=i64(1),
            kernel_w=i64(self._side), kernel_h=i64(self._side), kernel_d=i64(1),
            stride_w=i64(self.m), stride_h=i64(self.m), stride_d=i64(1),
        )  # fmt: skip
        lists = (stack(code, RECORD * LISTED), stack(code, RECORD))

        def some_tiles(first: Reg, _: list[Reg]) -> list[Reg]:
            count = least(code, code.binary("sub", tiles[1], first), chunk.capacity)
            code.loop(i64(0), count, i64(1), lambda tile, _: self._gather(grid, chunk, first, tile))
            lengths = self._list(chunk, count, lists)
            both = list(zip(lists, lengths, strict=True))
            code.loop(
                *columns,
                self.group,
                lambda panel, _: self._panels(grid, chunk, (first, count), panel, columns[1], both),
            )
            return []

        code.loop(*tiles, chunk.capacity, some_tiles)

    def _shares(self, tiles: Reg, panels: Reg) -> tuple[tuple[Reg, Reg], tuple[Reg, Reg]]:
        """[start, stop) of tiles and of panels: a thread takes some of the tiles if there are enough, and reading
        all weights costs less than transforming all tiles, else panels."""
        code = self.code
        plenty = code.compare("icmp sge", tiles, times(code, self.team, i64(2 * self._shape.rows)))
        plenty = code.binary("and", plenty, code.compare("icmp sge", tiles, self.geometry.outputs))
        start, stop = share(code, code.select(plenty, tiles, panels), self.team)
        tiles = code.select(code.compare("icmp slt", start, stop), tiles, i64(0))
        return (
            (code.select(plenty, start, i64(0)), code.select(plenty, stop, tiles)),
            (code.select(plenty, i64(0), start), code.select(plenty, panels, stop)),
        )

    def _chunk(self, tiles: Reg) -> _Chunk:
        """As many tiles at a time as scratch has room for, in equal parts."""
        code, g, shape = self.code, self.geometry, self._shape
        line, product_line = (
            times(code, code.binary("or", ceil_div(code, times(code, *extents, i64(4)), i64(LINE)), i64(1)), i64(LINE))
            for extents in ((g.channels,), (self.group, i64(shape.width)))
        )
        window = times(code, g.channels, i64(4 * self._side**2))
        each = times(code, plus(code, line, product_line), i64(self._side**2))
        free = code.binary("sub", self.room, plus(code, window, i64(SLACK)))
        fitting = clamp(code, code.binary("udiv", free, times(code, each, i64(shape.rows))), i64(1), i64(LISTED))
        parts = most(code, ceil_div(code, tiles, times(code, fitting, i64(shape.rows))), i64(1))
        blocks = most(code, ceil_div(code, ceil_div(code, tiles, parts), i64(shape.rows)), i64(1))
        capacity = times(code, blocks, i64(shape.rows))
        plane, product_plane = times(code, capacity, line), times(code, capacity, product_line)
        products = code.at(self.scratch, times(code, plane, i64(self._side**2)))
        after = code.at(products, times(code, product_plane, i64(self._side**2)))
        return _Chunk(capacity, line, self.scratch, plane, products, product_line, product_plane, after)

    def _list(self, chunk: _Chunk, count: Reg, lists: tuple[Reg, Reg]) -> list[Reg]:
        """The tiles' transforms as rows of register tiles, few of them in the second list; the lengths of both."""
        code, shape = self.code, self._shape

        def block(index: Reg, _: list[Reg]) -> list[Reg]:
            first = times(code, index, i64(shape.rows))
            rows = least(code, code.binary("sub", count, first), i64(shape.rows))
            few = code.compare("icmp sle", rows, i64(shape.few))
            record = code.select(few, lists[1], code.at(lists[0], times(code, index, i64(RECORD))))
            for i, value in enumerate((times(code, first, chunk.line), rows, times(code, first, chunk.product_line))):
                code.store(value, code.at(record, i64(8 * i)), 8)
            return [code.convert("zext", few, "i64")]

        blocks = ceil_div(code, count, i64(shape.rows))
        (last,) = code.loop(i64(0), blocks, i64(1), block, [i64(0)])
        return [code.binary("sub", blocks, last), last]

    def _gather(self, grid: Geometry, chunk: _Chunk, first: Reg, tile: Reg) -> list[Reg]:
        """Transform one image tile; at the edges of the image from a copy with zeros."""
        code, g = self.code, self.geometry
        number = plus(code, first, tile)
        (y, x), image = self._corner(grid, number)
        y, x = (
            plus(code, times(code, place, i64(self.m)), code.binary("sub", crop, pad))
            for place, crop, pad in ((y, g.crop_h, g.pad_h), (x, g.crop_w, g.pad_w))
        )
        inside = code.compare("icmp sge", least(code, y, x), i64(0))
        for place, extent in ((y, g.in_h), (x, g.in_w)):
            end = code.compare("icmp sle", plus(code, place, i64(self._side)), extent)
            inside = code.binary("and", inside, end)
        pixel = times(code, g.channels, i64(4))
        row = times(code, g.in_w, pixel)

        def own() -> list[Reg]:
            offset = plus(code, times(code, plus(code, times(code, image, g.in_h), y), row), times(code, x, pixel))
            return [code.at(self.x, offset), row]

        def copied() -> list[Reg]:
            windows = Windows(self.target, False, grid, i64(self._side), i64(1))
            windows.copy(code, self.x, i64(0), number, chunk.window)
            return [chunk.window, times(code, pixel, i64(self._side))]

        start, row = code.either(inside, own, copied)
        to = code.at(chunk.images, times(code, tile, chunk.line))
        self._transform(start, row, pixel, to, chunk.plane)
        return []

    def _corner(self, grid: Geometry, number: Reg) -> tuple[tuple[Reg, Reg], Reg]:
        """((row, column) of a tile, image)."""
        code = self.code
        rest = code.binary("udiv", number, grid.out_w)
        return (
            (code.binary("urem", rest, grid.out_h), code.binary("urem", number, grid.out_w)),
            code.binary("udiv", rest, grid.out_h),
        )

    def _transform(self, start: Reg, row: Reg, pixel: Reg, to: Reg, plane: Reg) -> None:
        """All channels of a window, a vector at a time; the last vector reaches back where channels do not fill it."""
        code, n = self.code, self._side

        def some_channels(channel: Reg, _: list[Reg]) -> list[Reg]:
            last = code.binary("sub", self.geometry.channels, i64(self._lanes))
            offset = times(code, least(code, channel, last), i64(4))
            lines = every(code, code.at(start, offset), row, n)
            loaded = [
                [self._load(place, self.numbers.image) for place in every(code, line, pixel, n)] for line in lines
            ]
            values = twice(self.numbers.forward[self.m], loaded)
            places = every(code, code.at(to, offset), plane, n * n)
            for place, value in zip(places, (value for line in values for value in line), strict=True):
                code.store(value.reg, place, 4)
            return []

        code.loop(i64(0), self.geometry.channels, i64(self._lanes), some_channels)

    def _load(self, place: Reg, scalar: str) -> Num:
        """A vector register full of elements."""
        lanes = self.target.vector_nbytes // SIZES[scalar]
        return Num(self.code, self.code.load(vector(lanes, scalar), place, 4))

    def _panels(
        self,
        grid: Geometry,
        chunk: _Chunk,
        tiles: tuple[Reg, Reg],
        first: Reg,
        last: Reg,
        lists: list[tuple[Reg, Reg]],
    ) -> list[Reg]:
        """All points of a group of panels, and back; `tiles` are the first one and how many there are."""
        code = self.code
        count = least(code, code.binary("sub", last, first), self.group)

        def point(index: Reg, _: list[Reg]) -> list[Reg]:
            code.loop(i64(0), count, i64(1), lambda panel, _: self._multiply(chunk, index, first, panel, lists))
            return []

        def back(panel: Reg, _: list[Reg]) -> list[Reg]:
            code.loop(i64(0), tiles[1], i64(1), lambda tile, _: self._back(grid, chunk, tiles[0], tile, first, panel))
            return []

        code.loop(i64(0), i64(self._side**2), i64(1), point)
        code.loop(i64(0), count, i64(1), back)
        return []

    def _columns(self, panel: Reg) -> tuple[Reg, Reg, Reg]:
        """(first result, results, vectors) of a panel."""
        code, shape = self.code, self._shape
        channel = times(code, panel, i64(shape.width))
        columns = least(code, code.binary("sub", self.geometry.outputs, channel), i64(shape.width))
        return channel, columns, ceil_div(code, columns, i64(shape.lanes))

    def _multiply(self, chunk: _Chunk, point: Reg, first: Reg, index: Reg, lists: list[tuple[Reg, Reg]]) -> list[Reg]:
        """Products of all tiles with one point of a panel's weights. In a group the same point of the next panel is
        prefetched, else what follows."""
        code, g, shape = self.code, self.geometry, self._shape
        panel = plus(code, first, index)
        _, _, vectors = self._columns(panel)
        panel_nbytes = times(code, g.channels, i64(self._side**2 * shape.width * 4))
        nbytes = times(code, g.channels, vectors, i64(shape.lanes * 4))
        w = code.at(self.w, plus(code, times(code, panel, panel_nbytes), times(code, point, nbytes)))
        a = code.at(chunk.images, times(code, point, chunk.plane))
        c = code.at(
            chunk.products,
            plus(code, times(code, point, chunk.product_plane), times(code, index, i64(shape.width * 4))),
        )
        distance = code.select(code.compare("icmp sgt", self.group, i64(1)), panel_nbytes, i64(AHEAD))
        ahead = weights_ahead(code, w, vectors, shape, distance)
        table = Reg(f"@{self.numbers.define_table(code, self.target)}", "ptr")
        columns = times(code, vectors, i64(shape.lanes))
        for (records, length), rows in zip(lists, (shape.rows, shape.few), strict=True):
            reading = (a, chunk.line, i64(0), i64(1), i64(0), g.channels)
            arguments = [length, records, columns, *reading, w, c, chunk.product_line, *ahead, self.operands, i64(0)]
            call_tiles(code, table, shape, rows, vectors, arguments)
        return []

    def _back(self, grid: Geometry, chunk: _Chunk, first: Reg, tile: Reg, first_panel: Reg, index: Reg) -> list[Reg]:
        """The results of one tile and panel from its products, those outside the image left out."""
        code, g, m = self.code, self.geometry, self.m
        channel, columns, vectors = self._columns(plus(code, first_panel, index))
        products = code.at(
            chunk.products,
            plus(code, times(code, tile, chunk.product_line), times(code, index, i64(self._shape.width * 4))),
        )
        (y, x), image = self._corner(grid, plus(code, first, tile))
        y, x = times(code, y, i64(m)), times(code, x, i64(m))
        down, across = (
            least(code, code.binary("sub", extent, place), i64(m)) for extent, place in ((g.out_h, y), (g.out_w, x))
        )
        pixel = plus(code, times(code, plus(code, times(code, image, g.out_h), y), g.out_w), x)
        cell = times(code, plus(code, times(code, pixel, g.outputs), channel), i64(4))
        stage = stack(code, m * m * self._lanes * 4)
        pixel_nbytes = times(code, g.outputs, i64(4))

        def some_channels(index: Reg, _: list[Reg]) -> list[Reg]:
            lane = times(code, index, i64(self._lanes))
            offset = times(code, lane, i64(4))
            start = code.at(products, offset)
            places = iter(every(code, start, chunk.product_plane, self._side**2))
            loaded = [
                [self._load(next(places), self.numbers.product) for _ in range(self._side)] for _ in range(self._side)
            ]
            for i, value in enumerate(value for line in twice(self.numbers.backward[m], loaded) for value in line):
                code.store(self.numbers.rescaled(value, m).reg, code.at(stage, i64(i * self._lanes * 4)), 4)
            left = code.binary("sub", columns, lane)
            place = times(code, channel, i64(4))
            arguments = [
                stage, plus(code, cell, offset), plus(code, place, offset), left, down, across, pixel_nbytes,
                times(code, pixel_nbytes, g.out_w), self.out, self.operands,
            ]  # fmt: skip
            code.do(f"call void %finish({', '.join(map(str, arguments))})")
            return []

        code.loop(i64(0), vectors, i64(1), some_channels)
        return []
