"""The order in which a depthwise convolution is computed, channels last: every channel on its own, a vector at a time.

Tiles of some rows times some pixels are computed together: enough sums to hide the latency of the multipliers, and
what one pixel reads is in the first cache for its neighbours. Taps outside the image read zeros: rows from a line of
zeros; columns are left out of a first and a last tile that lack as many as is known, and else are read from inside the
image, with a mask over what they read. The last tile of a row, and a last vector that channels do not fill, reach
back: what they share with those before them is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.conv_tiles import LINE, fma
from cpu_fallback.conv_windows import Geometry
from cpu_fallback.epilogues import stack
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, share, times
from cpu_fallback.loops import Words, splat, thread_share
from cpu_fallback.native import Target

PIXELS = 4
ROWS = 64
"""Most input rows that a tile may cover."""
TALLEST = 3
"""Rows of a window up to which they get code of their own."""


@dataclass(frozen=True)
class Window:
    """What is known of windows and tiles: columns of a window and rows (0: any number); the distances of columns and of
    windows along a row, of windows and of taps down the image; rows of a tile, and the channels in a vector, of which
    there are at least as many; how many columns a first tile lacks on its left, and a last one on its right.
    """

    width: int
    height: int
    dilation: int
    stride: int
    steps: tuple[int, int]
    rows: int
    lanes: int
    missing: tuple[int, int]

    @property
    def columns(self) -> list[int]:
        """Input columns that a tile reads, counted from its first."""
        taps = range(0, self.width * self.dilation, self.dilation)
        return sorted({i * self.stride + tap for i in range(PIXELS) for tap in taps})

    def blank_elements(self, channels: int) -> int:
        """Zeros that stand for a row outside the image."""
        return (self.columns[-1] + 1) * channels


def reach_of(kernel: int, stride: int, dilation: int) -> int:
    """Rows of the image that a row of tiles reads, which is two rows high."""
    return stride + (kernel - 1) * dilation + 1


def window_of(geometry: Any, channels: int, lanes: int, *, finite: bool) -> Window:
    """Windows over an image of so many channels, with vectors of at most `lanes`; the Geometry is of extents. Only if
    all weights are `finite` may columns be left out: else zeros count."""
    g = geometry
    last = (g.out_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w - g.pad_w + g.crop_w
    left, right = (
        extent if finite and isinstance(extent, int) and extent > 0 else 0 for extent in (g.pad_w, last + 1 - g.in_w)
    )
    return Window(
        g.kernel_w, g.kernel_h if g.kernel_h <= TALLEST else 0, g.dilation_w, g.stride_w, (g.stride_h, g.dilation_h),
        1 if g.out_h == 1 else 2, min(lanes, 1 << (channels.bit_length() - 1)), (left, right),
    )  # fmt: skip


class Results(NamedTuple):
    """Some results of one row of a tile, of one vector of channels: float32 sums, and how many of them are wanted; in
    bytes of elements of four how far the next pixel is, where the first is in the result, and its channel."""

    sums: list[Reg]
    wanted: Reg
    step: Reg
    place: Reg
    channel: Reg


def write_depthwise(
    code: Code, target: Target, window: Window, store: Callable[[Reg, Reg, Results], None], *, halves: bool
) -> None:
    """The code of a kernel; see `conv_depthwise.DepthwiseKernel` for its words. Elements of the image are int16 if
    `halves`, else float32; store(address of the result, of the words of the epilogue's operands, some results)."""
    words = Words(code)
    x, w, blank, out = words.pointers(4)
    near, far = words.numbers(2)
    geometry = Geometry(*words.numbers(len(Geometry._fields)))
    operands, count = words.address(), len(window.columns)
    lists = _Lists(stack(code, 8 * ROWS), stack(code, 8 * count), stack(code, 4 * window.lanes * count))

    def finish(results: Results) -> None:
        store(out, operands, results)

    def image(index: Reg, _: Reg) -> Reg:
        return code.at(x, times(code, index, geometry.in_h, geometry.in_w, driver.pixel))

    driver = _Driver(code, target, window, halves, 0, image, w, blank, finish, geometry, lists)
    driver.write(near, far)


def write_from_ring(
    code: Code, target: Target, window: Window, ring: int, team: Reg, rows: Callable[[Reg, Reg], Reg], w: Reg,
    blank: Reg, finish: Callable[[Results], None], geometry: Geometry,
) -> None:  # fmt: skip
    """The same over float32 images of which a thread has only the last rows: row y is number y modulo `ring`, where
    rows(image, first row that is read from now on) says that they begin."""
    count = len(window.columns)
    lists = _Lists(stack(code, 8 * ROWS), stack(code, 8 * count), stack(code, 4 * window.lanes * count))
    driver = _Driver(code, target, window, False, ring, rows, w, blank, finish, geometry, lists)
    driver.write_rows(team)


def pinned(code: Code, values: list[Reg], target: Target) -> list[Reg]:
    """The same values, whole registers each, computed now: else LLVM puts off what only one branch behind stores, and
    spills all it needs."""
    letter, kind = "v" if target.masked else "x", f"{{ {', '.join(value.type for value in values)} }}"
    constraints = ",".join([*[f"={letter}"] * len(values), *map(str, range(len(values)))])
    text = f'call {kind} asm sideeffect "", "{constraints}"({", ".join(map(str, values))})'
    both = code.let(kind, text)
    return [code.let(value.type, f"extractvalue {both}, {i}") for i, value in enumerate(values)]


@dataclass(frozen=True)
class _Lists:
    """On the stack: addresses of a tile's input rows; byte offsets and masks of its columns at an edge."""

    rows: Reg
    offsets: Reg
    masks: Reg


@dataclass(frozen=True)
class _Tile:
    """The first row (over all images), row and column of a tile's results. Its columns from the one to before the other
    of `inside` are inside the image; if that is not known, masks tell."""

    line: Reg
    y: Reg
    x: Reg
    inside: tuple[int, int] | None


@dataclass(frozen=True)
class _Driver:
    """A convolution while its code is written."""

    code: Code
    target: Target
    window: Window
    halves: bool
    ring: int
    rows: Callable[[Reg, Reg], Reg]
    w: Reg
    blank: Reg
    finish: Callable[[Results], None]
    geometry: Geometry
    lists: _Lists

    @property
    def _kind(self) -> str:
        return vector(self.window.lanes, "float")

    @property
    def _nbytes(self) -> int:
        """Of an element of the image."""
        return 2 if self.halves else 4

    @property
    def pixel(self) -> Reg:
        """Bytes of the image from pixel to pixel."""
        return times(self.code, self.geometry.channels, i64(self._nbytes))

    @property
    def _line(self) -> Reg:
        """Bytes of elements of four from pixel to pixel."""
        return times(self.code, self.geometry.channels, i64(4))

    def write(self, near: Reg, far: Reg) -> None:
        """Threads share the rows of tiles, or the channels if there are more of them than pixels, as the convolution
        before does. Small images go by as many channels as the first cache holds rows of."""
        code, g, lanes = self.code, self.geometry, i64(self.window.lanes)
        bands, images = self._counts()
        rows, span = self._shares(times(code, images, bands), times(code, images, g.in_h, g.in_w))
        line = most(code, times(code, self._reach(), g.in_w, i64(self._nbytes)), i64(1))
        some = times(code, most(code, code.binary("udiv", code.binary("udiv", near, line), lanes), i64(1)), lanes)
        small = code.compare("icmp sle", times(code, g.in_h, g.in_w, self.pixel), far)
        step = code.select(small, some, g.channels)

        def channels(first: Reg, _: list[Reg]) -> list[Reg]:
            some = first, least(code, plus(code, first, step), span[1])
            code.loop(*rows, i64(1), lambda index, _: self._band(index, bands, some))
            return []

        code.loop(*span, most(code, step, i64(1)), channels)

    def write_rows(self, team: Reg) -> None:
        """The first `team` threads share the rows of tiles."""
        code = self.code
        bands, images = self._counts()
        some = share(code, times(code, images, bands), team)
        code.loop(*some, i64(1), lambda index, _: self._band(index, bands, (i64(0), self.geometry.channels)))

    def _counts(self) -> tuple[Reg, Reg]:
        """Rows of tiles in an image, and images."""
        code, g = self.code, self.geometry
        each = most(code, times(code, g.out_w, g.out_h), i64(1))
        return ceil_div(code, g.out_h, i64(self.window.rows)), code.binary("udiv", g.pixels, each)

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
        code, g, (stride, dilation) = self.code, self.geometry, self.window.steps
        taps = times(code, code.binary("sub", g.kernel_h, i64(1)), i64(dilation))
        return plus(code, taps, i64(stride * (self.window.rows - 1) + 1))

    def _band(self, index: Reg, bands: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        """A row of tiles."""
        code, g, window = self.code, self.geometry, self.window
        image, band = code.binary("udiv", index, bands), code.binary("urem", index, bands)
        y = times(code, band, i64(window.rows))
        first_row = plus(code, times(code, y, i64(window.steps[0])), code.binary("sub", g.crop_h, g.pad_h))
        line = plus(code, times(code, image, g.out_h), y)
        start = self.rows(image, first_row)
        final = most(code, code.binary("sub", g.out_w, i64(PIXELS)), i64(0))

        def tile(x: Reg, _: list[Reg]) -> list[Reg]:
            x = least(code, x, final)
            column = plus(code, times(code, x, i64(window.stride)), code.binary("sub", g.crop_w, g.pad_w))
            self._list_rows(start, first_row, column)
            self._dispatch(line, y, x, column, span)
            return []

        code.loop(i64(0), g.out_w, i64(PIXELS), tile)
        return []

    def _dispatch(self, line: Reg, y: Reg, x: Reg, column: Reg, span: tuple[Reg, Reg]) -> None:
        """Run the code for tiles that lack the columns that this one lacks."""
        code, g, reach = self.code, self.geometry, self.window.columns[-1] + 1
        left, right = self.window.missing
        whole = code.compare("icmp sle", plus(code, x, i64(PIXELS)), g.out_w)
        beyond = code.binary("sub", plus(code, column, i64(reach)), g.in_w)
        starts, ends = code.compare("icmp sge", column, i64(0)), code.compare("icmp sle", beyond, i64(0))
        cases = [(starts, ends, (0, reach))]
        if 0 < left < reach:
            cases.append((code.compare("icmp eq", column, i64(-left)), ends, (left, reach)))
        if 0 < right < reach:
            cases.append((starts, code.compare("icmp eq", beyond, i64(right)), (0, reach - right)))

        def otherwise(rest: Sequence[tuple[Reg, Reg, tuple[int, int]]]) -> list[Reg]:
            if not rest:
                return self._outer(_Tile(line, y, x, None), column, span)
            first, last, inside = rest[0]
            fits = code.binary("and", whole, code.binary("and", first, last))
            code.either(
                fits, lambda: self._channels(_Tile(line, y, x, inside), span), lambda: otherwise(rest[1:])
            )  # fmt: skip
            return []

        otherwise(cases)

    def _list_rows(self, image: Reg, first_row: Reg, column: Reg) -> None:
        """Where the tile starts in every input row; in zeros for rows outside, or if all columns are."""
        code, g = self.code, self.geometry
        away = code.binary("or", code.compare("icmp sge", column, g.in_w), code.compare(
            "icmp slt", plus(code, column, i64(self.window.columns[-1])), i64(0)))  # fmt: skip
        offset = times(code, column, self.pixel)

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            y = plus(code, first_row, index)
            outside = code.binary("or", code.compare("icmp uge", y, g.in_h), away)
            line = code.binary("urem", y, i64(self.ring)) if self.ring else y
            place = code.at(image, plus(code, times(code, line, g.in_w, self.pixel), offset))
            code.store(code.select(outside, self.blank, place), code.at(self.lists.rows, times(code, index, i64(8))), 8)
            return []

        code.loop(i64(0), self._reach(), i64(1), row)

    def _outer(self, tile: _Tile, first: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        """A tile whose columns outside read one that is inside, and are masked."""
        code, g, window = self.code, self.geometry, self.window
        nearest = clamp(code, first, i64(0), most(code, code.binary("sub", g.in_w, i64(1)), i64(0)))
        anchor = clamp(code, code.binary("sub", nearest, first), i64(0), i64(window.columns[-1]))
        for i, number in enumerate(window.columns):
            inside = code.compare("icmp ult", plus(code, first, i64(number)), g.in_w)
            offset = times(code, code.select(inside, i64(number), anchor), self.pixel)
            code.store(offset, code.at(self.lists.offsets, i64(8 * i)), 8)
            mask = splat(code, code.convert("sext", inside, "i32"), window.lanes)
            code.store(mask, code.at(self.lists.masks, i64(4 * window.lanes * i)), 4)
        return self._channels(tile, span)

    def _channels(self, tile: _Tile, span: tuple[Reg, Reg]) -> list[Reg]:
        """All channels of the span."""
        code, g, window = self.code, self.geometry, self.window

        def vectors(first: Reg, _: list[Reg]) -> list[Reg]:
            last = code.binary("sub", g.channels, i64(window.lanes))
            channel = times(code, least(code, first, last), i64(4))
            zero = [literal(self._kind, 0)] * (window.rows * PIXELS)
            if window.height:
                sums = self._window(tile, channel, zero)
            else:
                sums = code.loop(i64(0), g.kernel_h, i64(1), lambda ky, x: self._tap(tile, ky, channel, x), zero)
            for r in range(window.rows):
                self._store(tile, r, channel, sums[r * PIXELS : (r + 1) * PIXELS])
            return []

        code.loop(*span, i64(window.lanes), vectors)
        return []

    def _window(self, tile: _Tile, channel: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums of windows of a known height: every element of the image is read once for all of them."""
        window, (stride, dilation) = self.window, self.window.steps
        uses = [(r, ky, r * stride + ky * dilation) for r in range(window.rows) for ky in range(window.height)]
        for row in sorted({y for _, _, y in uses}):
            found = [(r, self._weights(i64(ky), channel)) for r, ky, y in uses if y == row]
            sums = self._multiplied(tile, i64(row), channel, found, sums)
        return sums

    def _tap(self, tile: _Tile, ky: Reg, channel: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums after one row of taps."""
        code, (stride, dilation), factors = self.code, self.window.steps, self._weights(ky, channel)
        for r in range(self.window.rows):
            row = plus(code, times(code, ky, i64(dilation)), i64(r * stride))
            sums = self._multiplied(tile, row, channel, [(r, factors)], sums)
        return sums

    def _multiplied(
        self, tile: _Tile, row: Reg, channel: Reg, uses: Sequence[tuple[int, list[Reg]]], sums: list[Reg]
    ) -> list[Reg]:
        """The sums with what an input row gives to some rows of the tile, each with its weights."""
        code, window, totals = self.code, self.window, list(sums)
        place = code.load("ptr", code.at(self.lists.rows, times(code, row, i64(8))), 8)
        start = code.at(place, code.binary("ashr", channel, i64(1)) if self.halves else channel)
        for number, column in enumerate(window.columns):
            if tile.inside is not None and not tile.inside[0] <= column < tile.inside[1]:
                continue
            value = self._column(tile, start, number, column)
            for r, factors in uses:
                for kx, factor in enumerate(factors):
                    i, rest = divmod(column - kx * window.dilation, window.stride)
                    if rest == 0 and 0 <= i < PIXELS:
                        totals[r * PIXELS + i] = fma(code, value, factor, totals[r * PIXELS + i])
        return pinned(code, totals, self.target) if self.target.x86 and window.lanes >= 4 else totals

    def _column(self, tile: _Tile, start: Reg, number: int, column: int) -> Reg:
        """What the tile reads at one of its columns, as float32."""
        code, lanes = self.code, self.window.lanes
        if tile.inside is not None:
            place = code.at(start, times(code, self.pixel, i64(column)))
            value = code.load(vector(lanes, "i16" if self.halves else "float"), place, self._nbytes)
            return code.convert("sitofp", value, self._kind) if self.halves else value
        offset, bits = code.load("i64", code.at(self.lists.offsets, i64(8 * number)), 8), vector(lanes, "i32")
        value = code.load(vector(lanes, f"i{8 * self._nbytes}"), code.at(start, offset), self._nbytes)
        mask = code.load(bits, code.at(self.lists.masks, i64(4 * lanes * number)), 4)
        masked = code.binary("and", code.convert("sext", value, bits) if self.halves else value, mask)
        return code.convert("sitofp" if self.halves else "bitcast", masked, self._kind)

    def _weights(self, ky: Reg, channel: Reg) -> list[Reg]:
        code, width = self.code, self.window.width
        place = code.at(self.w, plus(code, times(code, ky, i64(width), self._line), channel))
        return [code.load(self._kind, code.at(place, times(code, self._line, i64(kx))), 4) for kx in range(width)]

    def _store(self, tile: _Tile, r: int, channel: Reg, sums: list[Reg]) -> None:
        """A row of the tile, if the result has it."""
        code, g = self.code, self.geometry

        def store() -> list[Reg]:
            place = times(code, plus(code, times(code, plus(code, tile.line, i64(r)), g.out_w), tile.x), self._line)
            left = least(code, code.binary("sub", g.out_w, tile.x), i64(PIXELS))
            count = i64(PIXELS) if tile.inside is not None else left
            self.finish(Results(sums, count, self._line, place, channel))
            return []

        if r:
            code.either(code.compare("icmp slt", plus(code, tile.y, i64(r)), g.out_h), store, lambda: [])
        else:
            store()
