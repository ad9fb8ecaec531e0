"""Depthwise convolutions, channels last: every channel on its own, a vector of channels at a time.

Pixels whose window lies inside the rows are computed four at a time with their columns shared, the others one by one.
So many channels at a time that the rows they are read from stay in the first cache. A last vector that channels do not
fill reaches back and is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.conv_tiles import fma
from cpu_fallback.conv_windows import Geometry
from cpu_fallback.epilogues import SCALAR, Epilogue, Place
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.native import Target

PIXELS = 4
CHAINS = 4
"""Vectors of channels at a time of a pixel on its own: independent sums hide the latency of the multiplier."""
NEAR_NBYTES = 24 << 10
"""Bytes of input rows to keep in the first cache."""


@dataclass(frozen=True)
class DepthwiseKernel:
    """A depthwise convolution by content: columns of a window, their distance, that of windows, and what happens then.

    There are at least as many channels as `lanes`. Words: addresses of x, of weights [taps, channels], of the result
    and of every operand of the epilogue; the Geometry.
    """

    width: int
    dilation: int
    stride: int
    lanes: int
    epilogue: Epilogue

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, w, out, *operands = words.pointers(3 + len(self.epilogue.kinds))
        geometry = Geometry(*words.numbers(len(Geometry._fields)))
        _Writer(code, self, x, w, out, tuple(operands), geometry).write()


@dataclass(frozen=True)
class _Line:
    """A row of results: its first pixel, the row of x (that may lie outside) its windows start in, taps inside x."""

    pixel: Reg
    start: Reg
    taps: tuple[Reg, Reg]


@dataclass(frozen=True)
class _Writer:
    """A convolution while its code is written."""

    code: Code
    kernel: DepthwiseKernel
    x: Reg
    w: Reg
    out: Reg
    operands: tuple[Reg, ...]
    geometry: Geometry

    @property
    def _lanes(self) -> int:
        return self.kernel.lanes

    @property
    def _kind(self) -> str:
        return vector(self._lanes, "float")

    def write(self) -> None:
        code, g = self.code, self.geometry
        pixel = times(code, g.channels, i64(4))
        row = times(code, g.in_w, pixel)
        rows = thread_share(code, code.binary("udiv", g.pixels, most(code, g.out_w, i64(1))), 1)
        inside = self._inside()
        wide = times(code, g.kernel_h, g.in_w, i64(4 * self._lanes))
        vectors = clamp(code, code.binary("udiv", i64(NEAR_NBYTES), most(code, wide, i64(1))), i64(1), g.channels)

        def group(first: Reg, _: list[Reg]) -> list[Reg]:
            span = first, least(code, plus(code, first, times(code, vectors, i64(self._lanes))), g.channels)

            def line(index: Reg, _: list[Reg]) -> list[Reg]:
                self._line(index, row, pixel, span, inside)
                return []

            code.loop(*rows, i64(1), line)
            return []

        code.loop(i64(0), g.channels, times(code, vectors, i64(self._lanes)), group)

    def _inside(self) -> tuple[Reg, Reg]:
        """[start, stop) of the pixels of a row whose window does not reach over its ends."""
        code, g, reach = self.code, self.geometry, (self.kernel.width - 1) * self.kernel.dilation
        first = code.binary("sub", g.crop_w, g.pad_w)
        start = ceil_div(code, most(code, code.binary("sub", i64(0), first), i64(0)), g.stride_w)
        room = code.binary("sub", code.binary("sub", g.in_w, i64(reach)), first)
        stop = ceil_div(code, most(code, room, i64(0)), g.stride_w)
        start = least(code, start, g.out_w)
        return start, clamp(code, stop, start, g.out_w)

    def _line(self, index: Reg, row: Reg, pixel: Reg, span: tuple[Reg, Reg], inside: tuple[Reg, Reg]) -> None:
        code, g = self.code, self.geometry
        image, y = code.binary("udiv", index, g.out_h), code.binary("urem", index, g.out_h)
        first = plus(code, times(code, y, g.stride_h), code.binary("sub", g.crop_h, g.pad_h))
        low = least(code, ceil_div(code, most(code, code.binary("sub", i64(0), first), i64(0)), g.dilation_h), g.kernel_h)
        left = most(code, code.binary("sub", g.in_h, first), i64(0))
        taps = low, clamp(code, ceil_div(code, left, g.dilation_h), low, g.kernel_h)
        start = code.at(self.x, times(code, plus(code, times(code, image, g.in_h), first), row))
        line = _Line(times(code, index, g.out_w), start, taps)
        whole = code.binary("and", code.binary("sub", inside[1], inside[0]), i64(-PIXELS))
        rest = plus(code, inside[0], whole)
        code.loop(i64(0), inside[0], i64(1), lambda x, _: self._single(line, x, row, pixel, span))
        code.loop(inside[0], rest, i64(PIXELS), lambda x, _: self._several(line, x, row, pixel, span))
        code.loop(rest, g.out_w, i64(1), lambda x, _: self._single(line, x, row, pixel, span))

    def _column(self, x: Reg) -> Reg:
        g = self.geometry
        return plus(self.code, times(self.code, x, g.stride_w), self.code.binary("sub", g.crop_w, g.pad_w))

    def _several(self, line: _Line, x: Reg, row: Reg, pixel: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        """PIXELS neighbours, every column loaded once."""
        code, g, kernel = self.code, self.geometry, self.kernel
        start = code.at(line.start, times(code, self._column(x), pixel))
        weights_row = times(code, g.channels, i64(4))

        def channels(first: Reg, _: list[Reg]) -> list[Reg]:
            channel = self._channel(first, 1)

            def tap(ky: Reg, sums: list[Reg]) -> list[Reg]:
                here = code.at(code.at(start, times(code, ky, g.dilation_h, row)), channel)
                factors = self._weights(code.at(self.w, plus(code, times(code, ky, i64(kernel.width), weights_row), channel)))
                columns = _Columns(code, here, pixel, self._kind)
                result = list(sums)
                for i in range(PIXELS):
                    for kx, factor in enumerate(factors):
                        value = columns.load(i * kernel.stride + kx * kernel.dilation)
                        result[i] = fma(code, value, factor, result[i])
                return result

            sums = code.loop(*line.taps, i64(1), tap, [literal(self._kind, 0)] * PIXELS)
            self._store(plus(code, line.pixel, x), channel, sums, PIXELS, 1)
            return []

        code.loop(*span, i64(self._lanes), channels)
        return []

    def _weights(self, place: Reg) -> list[Reg]:
        step = times(self.code, self.geometry.channels, i64(4))
        found = []
        for kx in range(self.kernel.width):
            place = self.code.at(place, step) if kx else place
            found.append(self.code.load(self._kind, place, 4))
        return found

    def _single(self, line: _Line, x: Reg, row: Reg, pixel: Reg, span: tuple[Reg, Reg]) -> list[Reg]:
        """One pixel with the columns that lie inside x, some vectors of channels at a time."""
        code, g, kernel = self.code, self.geometry, self.kernel
        first = self._column(x)
        step = i64(kernel.dilation)
        low = least(code, ceil_div(code, most(code, code.binary("sub", i64(0), first), i64(0)), step), i64(kernel.width))
        left = most(code, code.binary("sub", g.in_w, first), i64(0))
        columns = low, clamp(code, ceil_div(code, left, step), low, i64(kernel.width))
        start = code.at(line.start, times(code, first, pixel))
        many = i64(CHAINS * self._lanes)
        length = code.binary("sub", span[1], span[0])
        rest = plus(code, span[0], times(code, code.binary("udiv", length, many), many))
        for ends, chains in (((span[0], rest), CHAINS), ((rest, span[1]), 1)):
            code.loop(
                *ends, i64(chains * self._lanes),
                lambda channel, _, chains=chains: self._sum(line, x, start, columns, row, pixel, channel, chains),
            )  # fmt: skip
        return []

    def _sum(
        self, line: _Line, x: Reg, start: Reg, columns: tuple[Reg, Reg], row: Reg, pixel: Reg, first: Reg, chains: int
    ) -> list[Reg]:
        code, g, kernel = self.code, self.geometry, self.kernel
        channel, nbytes = self._channel(first, chains), self._lanes * 4

        def tap(ky: Reg, sums: list[Reg]) -> list[Reg]:
            here = code.at(code.at(start, times(code, ky, g.dilation_h, row)), channel)
            weights = code.at(self.w, channel)

            def column(kx: Reg, sums: list[Reg]) -> list[Reg]:
                place = code.at(here, times(code, kx, i64(kernel.dilation), pixel))
                factor = code.at(weights, times(code, plus(code, times(code, ky, i64(kernel.width)), kx), pixel))
                return [
                    fma(code, *(code.load(self._kind, code.at(base, i64(i * nbytes)), 4) for base in (place, factor)), value)
                    for i, value in enumerate(sums)
                ]

            return code.loop(*columns, i64(1), column, sums)

        sums = code.loop(*line.taps, i64(1), tap, [literal(self._kind, 0)] * chains)
        self._store(plus(code, line.pixel, x), channel, sums, 1, chains)
        return []

    def _channel(self, first: Reg, vectors: int) -> Reg:
        """The byte offset of a channel, moved back where fewer channels are left than vectors have lanes."""
        code = self.code
        last = code.binary("sub", self.geometry.channels, i64(vectors * self._lanes))
        return times(code, least(code, first, last) if vectors == 1 else first, i64(4))

    def _store(self, pixel: Reg, channel: Reg, sums: list[Reg], pixels: int, vectors: int) -> None:
        code, step = self.code, times(self.code, self.geometry.channels, i64(4))
        moved = times(code, pixel, step)
        operands = [
            operand if kind == SCALAR else code.at(operand, channel)
            for kind, operand in zip(self.kernel.epilogue.kinds, self.operands, strict=True)
        ]
        base = code.at(self.out, plus(code, moved, channel))
        place = Place(base, step, i64(pixels), None, pixels, vectors, self._lanes, None)
        self.kernel.epilogue.write_tile(code, place, sums, self.kernel.epilogue.moved(code, operands, moved))


class _Columns:
    """Columns of a row, each loaded when first asked for."""

    def __init__(self, code: Code, start: Reg, step: Reg, kind: str) -> None:
        self._code, self._places, self._step, self._kind = code, [start], step, kind
        self._loaded: dict[int, Reg] = {}

    def load(self, column: int) -> Reg:
        while len(self._places) <= column:
            self._places.append(self._code.at(self._places[-1], self._step))
        if column not in self._loaded:
            self._loaded[column] = self._code.load(self._kind, self._places[column], 4)
        return self._loaded[column]
