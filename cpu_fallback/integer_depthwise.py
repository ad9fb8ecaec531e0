"""Depthwise convolutions of int16 images, channels last: tiles as in `conv_depthwise`.

Products of centred bytes and their few sums are whole numbers that float32 holds exactly; a sum is converted once, or
not at all where its epilogue wants a float. Taps outside the image read zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.conv_tiles import fma
from cpu_fallback.conv_windows import Geometry
from cpu_fallback.epilogues import stack
from cpu_fallback.integer_epilogues import IntegerEpilogue, Tile, narrow
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.loops import Words, splat, thread_share
from cpu_fallback.native import Target
from gpu_engine.ir.dtypes import INT16

PIXELS = 4
ROWS = 64
"""Most input rows that a tile may cover."""


@dataclass(frozen=True)
class IntegerDepthwiseKernel:
    """`conv_depthwise.DepthwiseKernel` for int16 images and weights in float32, with the same words. `steps` are the
    distances of windows and of taps down the image; `epilogue` is of float32 sums if `real`, else of int32."""

    width: int
    height: int
    dilation: int
    stride: int
    rows: int
    lanes: int
    steps: tuple[int, int]
    epilogue: IntegerEpilogue
    real: bool

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, w, blank, out = words.pointers(4)
        near, far = words.numbers(2)
        geometry = Geometry(*words.numbers(len(Geometry._fields)))
        operands = words.address()
        kind, count = vector(self.lanes, "float"), len(self.columns)
        lists = _Lists(stack(code, 8 * ROWS), stack(code, 8 * count), stack(code, 4 * self.lanes * count))
        _Writer(code, target, self, x, w, blank, out, operands, geometry, kind, lists).write(near, far)

    @property
    def columns(self) -> list[int]:
        """Input columns that a tile reads, counted from its first."""
        taps = range(0, self.width * self.dilation, self.dilation)
        return sorted({i * self.stride + tap for i in range(PIXELS) for tap in taps})

    def blank_elements(self, channels: int) -> int:
        """Zeros that stand for a row outside the image."""
        return (self.columns[-1] + 1) * channels


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
    kernel: IntegerDepthwiseKernel
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
        """Bytes of the image from pixel to pixel."""
        return times(self.code, self.geometry.channels, i64(2))

    @property
    def _line(self) -> Reg:
        """Bytes of four-byte elements from pixel to pixel."""
        return times(self.code, self.geometry.channels, i64(4))

    def write(self, near: Reg, far: Reg) -> None:
        """Rows of tiles are shared out; small images go by as many channels as the first cache holds rows of."""
        code, g, lanes = self.code, self.geometry, i64(self.kernel.lanes)
        bands = ceil_div(code, g.out_h, i64(self.kernel.rows))
        images = code.binary("udiv", g.pixels, most(code, times(code, g.out_w, g.out_h), i64(1)))
        rows = thread_share(code, times(code, images, bands), 1)
        nbytes = most(code, times(code, self._reach(), g.in_w, i64(2)), i64(1))
        some = times(code, most(code, code.binary("udiv", code.binary("udiv", near, nbytes), lanes), i64(1)), lanes)
        small = code.compare("icmp sle", times(code, g.in_h, g.in_w, g.channels, i64(2)), far)
        step = code.select(small, some, g.channels)

        def channels(first: Reg, _: list[Reg]) -> list[Reg]:
            span = first, least(code, plus(code, first, step), g.channels)
            code.loop(*rows, i64(1), lambda index, _: self._band(index, bands, span))
            return []

        code.loop(i64(0), g.channels, most(code, step, i64(1)), channels)

    def _reach(self) -> Reg:
        """Input rows that a tile covers."""
        code, g = self.code, self.geometry
        taps = times(code, code.binary("sub", g.kernel_h, i64(1)), g.dilation_h)
        return plus(code, times(code, g.stride_h, i64(self.kernel.rows - 1)), taps, i64(1))

    def _band(self, index: Reg, bands: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        code, g, kernel = self.code, self.geometry, self.kernel
        image, band = code.binary("udiv", index, bands), code.binary("urem", index, bands)
        y = times(code, band, i64(kernel.rows))
        first_row = plus(code, times(code, y, g.stride_h), code.binary("sub", g.crop_h, g.pad_h))
        line = plus(code, times(code, image, g.out_h), y)
        start = code.at(self.x, times(code, image, g.in_h, g.in_w, self._pixel))

        def tile(x: Reg, _: list[Reg]) -> list[Reg]:
            column = plus(code, times(code, x, i64(kernel.stride)), code.binary("sub", g.crop_w, g.pad_w))
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
            code.store(code.select(outside, self.blank, place), code.at(self.lists.rows, times(code, index, i64(8))), 8)
            return []

        code.loop(i64(0), self._reach(), i64(1), row)

    def _outer(self, tile: _Tile, first: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        """A tile at the edge: columns outside read one that is inside, and are masked."""
        code, g, lanes = self.code, self.geometry, self.kernel.lanes
        nearest = clamp(code, first, i64(0), most(code, code.binary("sub", g.in_w, i64(1)), i64(0)))
        anchor = clamp(code, code.binary("sub", nearest, first), i64(0), i64(self.kernel.columns[-1]))
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
                sums = self._window(tile, channel, zero)
            else:
                sums = code.loop(i64(0), g.kernel_h, i64(1), lambda ky, x: self._tap(tile, ky, channel, x), zero)
            for r in range(kernel.rows):
                self._store(tile, r, channel, sums[r * PIXELS : (r + 1) * PIXELS])
            return []

        code.loop(*span, i64(kernel.lanes), vectors)
        return []

    def _window(self, tile: _Tile, channel: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums of windows of a known height: every element of the image is converted once for all of them."""
        code, kernel = self.code, self.kernel
        stride, dilation = kernel.steps
        totals, windows = list(sums), [(r, ky) for r in range(kernel.rows) for ky in range(kernel.height)]
        for y in sorted({r * stride + ky * dilation for r, ky in windows}):
            place = code.load("ptr", code.at(self.lists.rows, i64(8 * y)), 8)
            start = code.at(place, narrow(code, channel, INT16))
            uses = [(r, self._weights(i64(ky), channel)) for r, ky in windows if r * stride + ky * dilation == y]
            for number, column in enumerate(kernel.columns):
                value = self._column(tile, start, number, column)
                for r, factors in uses:
                    for kx, factor in enumerate(factors):
                        i, rest = divmod(column - kx * kernel.dilation, kernel.stride)
                        if rest == 0 and 0 <= i < PIXELS:
                            totals[r * PIXELS + i] = fma(code, value, factor, totals[r * PIXELS + i])
            totals = pinned(code, totals, self.target) if self.target.x86 and kernel.lanes >= 4 else totals
        return totals

    def _tap(self, tile: _Tile, ky: Reg, channel: Reg, sums: list[Reg]) -> list[Reg]:
        """The sums after one row of taps."""
        code, g, kernel = self.code, self.geometry, self.kernel
        factors = self._weights(ky, channel)
        result: list[Reg] = []
        for r in range(kernel.rows):
            row = plus(code, times(code, g.stride_h, i64(r)), times(code, ky, g.dilation_h))
            place = code.load("ptr", code.at(self.lists.rows, times(code, row, i64(8))), 8)
            found = self._columns(tile, code.at(place, narrow(code, channel, INT16)))
            for i in range(PIXELS):
                total = sums[r * PIXELS + i]
                for kx, factor in enumerate(factors):
                    total = fma(code, found[i * kernel.stride + kx * kernel.dilation], factor, total)
                result.append(total)
        return result

    def _columns(self, tile: _Tile, start: Reg) -> dict[int, Reg]:
        """What the tile reads of a row."""
        return {column: self._column(tile, start, i, column) for i, column in enumerate(self.kernel.columns)}

    def _column(self, tile: _Tile, start: Reg, number: int, column: int) -> Reg:
        """What the tile reads at one of its columns."""
        code, numbers = self.code, self.kind.replace("float", "i32")
        if tile.inner:
            return self._widened(self._load(code.at(start, times(code, self._pixel, i64(column)))))
        offset = code.load("i64", code.at(self.lists.offsets, i64(8 * number)), 8)
        value = code.convert("sext", self._load(code.at(start, offset)), numbers)
        mask = code.load(numbers, code.at(self.lists.masks, i64(4 * self.kernel.lanes * number)), 4)
        return self._widened(code.binary("and", value, mask))

    def _load(self, place: Reg) -> Reg:
        return self.code.load(vector(self.kernel.lanes, "i16"), place, 2)

    def _widened(self, value: Reg) -> Reg:
        return self.code.convert("sitofp", value, self.kind)

    def _weights(self, ky: Reg, channel: Reg) -> list[Reg]:
        code = self.code
        place = code.at(self.w, plus(code, times(code, ky, i64(self.kernel.width), self._line), channel))
        places = [code.at(place, times(code, self._line, i64(kx))) for kx in range(self.kernel.width)]
        return [code.load(self.kind, place, 4) for place in places]

    def _store(self, tile: _Tile, r: int, channel: Reg, sums: list[Reg]) -> None:
        """A row of the tile, if the result has it."""
        code, g, epilogue = self.code, self.geometry, self.kernel.epilogue

        def store() -> list[Reg]:
            line = plus(code, tile.line, i64(r))
            moved = times(code, plus(code, times(code, line, g.out_w), tile.x), self._line)
            operands = epilogue.addresses(code, self.operands, channel)
            count = i64(PIXELS) if tile.inner else least(code, code.binary("sub", g.out_w, tile.x), i64(PIXELS))
            base = code.at(self.out, narrow(code, plus(code, moved, channel), epilogue.dtype))
            place = Tile(base, self._line, count, None, PIXELS, 1, self.kernel.lanes)
            whole = self.kind.replace("float", "i32")
            totals = sums if self.kernel.real else [code.convert("fptosi", total, whole) for total in sums]
            epilogue.write_tile(code, self.target, place, totals, epilogue.moved(code, operands, moved))
            return []

        if r:
            code.either(code.compare("icmp slt", plus(code, tile.y, i64(r)), g.out_h), store, lambda: [])
        else:
            store()
