"""Depthwise convolutions, channels last: every channel on its own, a vector of channels at a time.

Tiles of some rows times some pixels are computed together: enough sums to hide the latency of the multipliers, and
what one pixel reads is in the first cache for its neighbours. Taps outside the image read zeros: rows from a line of
zeros, columns from inside the image with a mask over what they read. A last vector that channels do not fill reaches
back and is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.conv_tiles import LINE, fma, tied
from cpu_fallback.conv_windows import Geometry
from cpu_fallback.epilogues import Epilogue, Place, stack
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.loops import Words, splat, thread_share
from cpu_fallback.native import Target

PIXELS = 4
ROWS = 64
"""Most input rows that a tile may cover."""


@dataclass(frozen=True)
class DepthwiseKernel:
    """A depthwise convolution by content: columns of a window and rows (0: any number), the distance of columns and of
    windows, rows of a tile.

    There are at least as many channels as `lanes`. Words: addresses of x, of weights [taps, channels], of as many zeros
    as `blank_elements` says, and of the result; bytes of rows to keep in the first cache, of an image that the second
    one keeps; the Geometry; the operands of the epilogue.
    """

    width: int
    height: int
    dilation: int
    stride: int
    rows: int
    lanes: int
    epilogue: Epilogue

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, w, blank, out = words.pointers(4)
        near, far = words.numbers(2)
        geometry = Geometry(*words.numbers(len(Geometry._fields)))
        operands = words.address()
        kind, count = vector(self.lanes, "float"), len(self.columns)
        lists = _Lists(
            stack(code, 8 * ROWS),
            stack(code, 8 * count),
            stack(code, 4 * self.lanes * count),
        )
        _Writer(code, target, self, x, w, blank, out, operands, geometry, kind, lists).write(near, far)

    @property
    def columns(self) -> list[int]:
        """Input columns that a tile reads, counted from its first."""
        taps = range(0, self.width * self.dilation, self.dilation)
        return sorted({i * self.stride + tap for i in range(PIXELS) for tap in taps})

    def blank_elements(self, channels: int) -> int:
        """Zeros that stand for a row outside the image."""
        return (self.columns[-1] + 1) * channels


@dataclass(frozen=True)
class _Lists:
    """On the stack: addresses of a tile's input rows; byte offsets and masks of its columns at an edge."""

    rows: Reg
    offsets: Reg
    masks: Reg


@dataclass(frozen=True)
class _Tile:
    """The first row (over all images), row and column of a tile's results; whether its columns are all inside."""

    line: Reg
    y: Reg
    x: Reg
    inner: bool


@dataclass(frozen=True)
class _Writer:
    """A convolution while its code is written."""

    code: Code
    target: Target
    kernel: DepthwiseKernel
    x: Reg
    w: Reg
    blank: Reg
    out: Reg
    operands: Reg
    geometry: Geometry
    kind: str
    lists: _Lists

    @property
    def _pixel(self) -> Reg:
        return times(self.code, self.geometry.channels, i64(4))

    def write(self, near: Reg, far: Reg) -> None:
        """Threads share the rows of tiles, or the channels if there are more of them than pixels, as the convolution
        before does. Small images go by as many channels as the first cache holds rows of."""
        code, g, lanes = self.code, self.geometry, i64(self.kernel.lanes)
        bands = ceil_div(code, g.out_h, i64(self.kernel.rows))
        images = code.binary("udiv", g.pixels, most(code, times(code, g.out_w, g.out_h), i64(1)))
        rows, span = self._shares(times(code, images, bands), times(code, images, g.in_h, g.in_w))
        nbytes = most(code, times(code, self._reach(), g.in_w, i64(4)), i64(1))
        some = times(
            code,
            most(
                code,
                code.binary("udiv", code.binary("udiv", near, nbytes), lanes),
                i64(1),
            ),
            lanes,
        )
        small = code.compare("icmp sle", times(code, g.in_h, g.in_w, g.channels, i64(4)), far)
        step = code.select(small, some, g.channels)

        def channels(first: Reg, _: list[Reg]) -> list[Reg]:
            some = first, least(code, plus(code, first, step), span[1])
            code.loop(*rows, i64(1), lambda index, _: self._band(index, bands, some))
            return []

        code.loop(*span, most(code, step, i64(1)), channels)

    def _shares(self, bands: Reg, pixels: Reg) -> tuple[tuple[Reg, Reg], tuple[Reg, Reg]]:
        """[start, stop) of rows of tiles and of channels."""
        code, channels = self.code, self.geometry.channels
        by_channels = code.compare("icmp slt", pixels, channels)
        some_rows, some_channels = thread_share(code, bands, 1), thread_share(code, channels, LINE // 4)
        rows = code.select(by_channels, i64(0), some_rows[0]), code.select(by_channels, bands, some_rows[1])
        start, stop = some_channels
        return rows, (code.select(by_channels, start, i64(0)), code.select(by_channels, stop, channels))

    def _reach(self) -> Reg:
        """Input rows that a tile covers."""
        code, g = self.code, self.geometry
        taps = times(code, code.binary("sub", g.kernel_h, i64(1)), g.dilation_h)
        return plus(code, times(code, g.stride_h, i64(self.kernel.rows - 1)), taps, i64(1))

    def _band(self, index: Reg, bands: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        code, g, kernel = self.code, self.geometry, self.kernel
        image, band = (
            code.binary("udiv", index, bands),
            code.binary("urem", index, bands),
        )
        y = times(code, band, i64(kernel.rows))
        first_row = plus(code, times(code, y, g.stride_h), code.binary("sub", g.crop_h, g.pad_h))
        line = plus(code, times(code, image, g.out_h), y)
        start = code.at(self.x, times(code, image, g.in_h, g.in_w, self._pixel))

        def tile(x: Reg, _: list[Reg]) -> list[Reg]:
            column = plus(
                code,
                times(code, x, i64(kernel.stride)),
                code.binary("sub", g.crop_w, g.pad_w),
            )
            last = plus(code, column, i64(kernel.columns[-1]))
            inside = code.binary(
                "and", code.compare("icmp sge", column, i64(0)), code.compare("icmp slt", last, g.in_w)
            )  # fmt: skip
            whole = code.compare("icmp sle", plus(code, x, i64(PIXELS)), g.out_w)
            self._list_rows(start, first_row, column)
            code.either(
                code.binary("and", inside, whole),
                lambda: self._channels(_Tile(line, y, x, True), span),
                lambda: self._outer(_Tile(line, y, x, False), column, span),
            )
            return []

        code.loop(i64(0), g.out_w, i64(PIXELS), tile)
        return []

    def _list_rows(self, image: Reg, first_row: Reg, column: Reg) -> None:
        """Where the tile starts in every input row; in zeros for rows outside, or if all columns are."""
        code, g = self.code, self.geometry
        away = code.binary("or", code.compare("icmp sge", column, g.in_w), code.compare(
            "icmp slt", plus(code, column, i64(self.kernel.columns[-1])), i64(0)))  # fmt: skip
        offset = times(code, column, self._pixel)

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            y = plus(code, first_row, index)
            outside = code.binary("or", code.compare("icmp uge", y, g.in_h), away)
            place = code.at(image, plus(code, times(code, y, g.in_w, self._pixel), offset))
            code.store(
                code.select(outside, self.blank, place),
                code.at(self.lists.rows, times(code, index, i64(8))),
                8,
            )
            return []

        code.loop(i64(0), self._reach(), i64(1), row)

    def _outer(self, tile: _Tile, first: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        """A tile at the edge: columns outside read one that is inside, and are masked."""
        code, g, lanes = self.code, self.geometry, self.kernel.lanes
        nearest = clamp(code, first, i64(0), most(code, code.binary("sub", g.in_w, i64(1)), i64(0)))
        anchor = clamp(
            code,
            code.binary("sub", nearest, first),
            i64(0),
            i64(self.kernel.columns[-1]),
        )
        for i, number in enumerate(self.kernel.columns):
            inside = code.compare("icmp ult", plus(code, first, i64(number)), g.in_w)
            offset = times(code, code.select(inside, i64(number), anchor), self._pixel)
            code.store(offset, code.at(self.lists.offsets, i64(8 * i)), 8)
            mask = splat(code, code.convert("sext", inside, "i32"), lanes)
            code.store(mask, code.at(self.lists.masks, i64(4 * lanes * i)), 4)
        return self._channels(tile, span)

    def _channels(self, tile: _Tile, span: tuple[Reg, Reg]) -> list[Reg]:
        """All channels of the span."""
        code, g, kernel = self.code, self.geometry, self.kernel

        def vectors(first: Reg, _: list[Reg]) -> list[Reg]:
            last = code.binary("sub", g.channels, i64(kernel.lanes))
            channel = times(code, least(code, first, last), i64(4))
            zero = [literal(self.kind, 0)] * (kernel.rows * PIXELS)
            if kernel.height:
                sums = zero
                for ky in range(kernel.height):
                    sums = self._tap(tile, i64(ky), channel, sums)
            else:
                sums = code.loop(
                    i64(0),
                    g.kernel_h,
                    i64(1),
                    lambda ky, x: self._tap(tile, ky, channel, x),
                    zero,
                )
            for r in range(kernel.rows):
                self._store(tile, r, channel, sums[r * PIXELS : (r + 1) * PIXELS])
            return []

        code.loop(*span, i64(kernel.lanes), vectors)
        return []

    def _tap(self, tile: _Tile, ky: Reg, channel: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums after one row of taps."""
        code, g, kernel = self.code, self.geometry, self.kernel
        factors, result = self._weights(ky, channel), list(sums)
        for r in range(kernel.rows):
            row = plus(code, times(code, g.stride_h, i64(r)), times(code, ky, g.dilation_h))
            place = code.load("ptr", code.at(self.lists.rows, times(code, row, i64(8))), 8)
            place = self._behind(place, r - 1, result)
            start = code.at(place, channel)
            for number, column in enumerate(kernel.columns):
                value = self._column(tile, start, number)
                for kx, factor in enumerate(factors):
                    i, rest = divmod(column - kx * kernel.dilation, kernel.stride)
                    if 0 <= i < PIXELS and not rest:
                        result[r * PIXELS + i] = fma(code, value, factor, result[r * PIXELS + i])
        return result

    def _behind(self, place: Reg, r: int, sums: list[Reg]) -> Reg:
        """The same place, read once the sums of row `r` are there: else registers would run out."""
        for i in range(r * PIXELS, (r + 1) * PIXELS):
            if sums[i].name.startswith("%") and self.kernel.lanes >= 4:
                place, sums[i] = tied(self.code, place, sums[i], self.target)
        return place

    def _column(self, tile: _Tile, start: Reg, number: int) -> Reg:
        """What the tile reads of a row in one column."""
        code, lanes = self.code, self.kernel.lanes
        if tile.inner:
            return code.load(
                self.kind,
                code.at(start, times(code, self._pixel, i64(self.kernel.columns[number]))),
                4,
            )
        bits = self.kind.replace("float", "i32")
        offset = code.load("i64", code.at(self.lists.offsets, i64(8 * number)), 8)
        value = code.load(bits, code.at(start, offset), 4)
        mask = code.load(bits, code.at(self.lists.masks, i64(4 * lanes * number)), 4)
        return code.convert("bitcast", code.binary("and", value, mask), self.kind)

    def _weights(self, ky: Reg, channel: Reg) -> list[Reg]:
        code = self.code
        place = code.at(
            self.w,
            plus(code, times(code, ky, i64(self.kernel.width), self._pixel), channel),
        )
        places = [code.at(place, times(code, self._pixel, i64(kx))) for kx in range(self.kernel.width)]
        return [code.load(self.kind, place, 4) for place in places]

    def _store(self, tile: _Tile, r: int, channel: Reg, sums: list[Reg]) -> None:
        """A row of the tile, if the result has it."""
        code, g, epilogue = self.code, self.geometry, self.kernel.epilogue

        def store() -> list[Reg]:
            line = plus(code, tile.line, i64(r))
            moved = times(code, plus(code, times(code, line, g.out_w), tile.x), self._pixel)
            operands = epilogue.addresses(code, self.operands, channel)
            count = i64(PIXELS) if tile.inner else least(code, code.binary("sub", g.out_w, tile.x), i64(PIXELS))
            base = code.at(self.out, plus(code, moved, channel))
            place = Place(base, self._pixel, count, None, PIXELS, 1, self.kernel.lanes, None)
            epilogue.write_tile(code, place, sums, epilogue.moved(code, operands, moved))
            return []

        if r:
            code.either(
                code.compare("icmp slt", plus(code, tile.y, i64(r)), g.out_h),
                store,
                lambda: [],
            )
        else:
            store()
