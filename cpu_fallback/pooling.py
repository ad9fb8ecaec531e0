"""Pools, channels last: windows folded to one element, some vectors of channels at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.lanes import STORED, write_expr
from cpu_fallback.loops import Words, splat, thread_share
from cpu_fallback.native import Target
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT16, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Pool
from gpu_engine.plan.words import Address

AXES = 3
CHAINS = 4
LOWEST = {FLOAT32: float("-inf"), INT16: -(2**15)}


class Axis(NamedTuple):
    """One axis in numbers: dims while lowering, registers inside a kernel.

    A window begins `crop - pad` elements into the axis. Its elements in [crop, end) are folded; those below
    `padded_end` are counted where padding counts.
    """

    extent: Any
    results: Any
    kernel: Any
    stride: Any
    dilation: Any
    pad: Any
    crop: Any
    end: Any
    padded_end: Any


@dataclass(frozen=True)
class PoolKernel:
    """A pool of float32, or maxima of int16, by content; there are at least as many channels as `lanes`.

    Words: addresses of x and the result; pixels of the result over the whole batch, channels; the axes, the last first.
    """

    kind: str
    count_padding: bool
    lanes: int
    dtype: DType = FLOAT32

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, out = words.pointers(2)
        pixels, channels = words.numbers(2)
        axes = [Axis(*words.numbers(len(Axis._fields))) for _ in range(AXES)]
        _Writer(code, self, x, out, channels, axes).write(pixels)

    @property
    def fold(self) -> Expr:
        a, b = expr.arg(0, self.dtype), expr.arg(1, self.dtype)
        return expr.apply("max", a, b) if self.kind == "max" else a + b


@dataclass(frozen=True)
class _Writer:
    """The kernel while it is written."""

    code: Code
    kernel: PoolKernel
    x: Reg
    out: Reg
    channels: Reg
    axes: Sequence[Axis]

    @property
    def _kind(self) -> str:
        return vector(self.kernel.lanes, STORED[self.kernel.dtype])

    @property
    def _size(self) -> int:
        """Bytes of an element."""
        return self.kernel.dtype.itemsize

    def write(self, pixels: Reg) -> None:
        code = self.code

        def pixel(index: Reg, _: list[Reg]) -> list[Reg]:
            spans, steps, base, size = self._window(index)
            to = code.at(self.out, times(code, index, self.channels, i64(self._size)))
            lanes = self.kernel.lanes
            many = times(code, code.binary("udiv", self.channels, i64(CHAINS * lanes)), i64(CHAINS * lanes))
            for start, stop, chains in ((i64(0), many, CHAINS), (many, self.channels, 1)):

                def fold(channel: Reg, _: list[Reg], chains: int = chains) -> list[Reg]:
                    return self._fold(spans, steps, base, size, to, channel, chains)

                code.loop(start, stop, i64(chains * lanes), fold)
            return []

        code.loop(*thread_share(code, pixels, 1), i64(1), pixel)

    def _window(self, index: Reg) -> tuple[list[tuple[Reg, Reg]], list[Reg], Reg, Reg]:
        """Of a pixel: per axis the taps inside x and the bytes from one to the next; its first tap; how many count."""
        code, rest = self.code, index
        spans, steps, size = [], [], i64(1)
        base, stride = i64(0), times(code, self.channels, i64(self._size))
        for axis in self.axes:
            results = most(code, axis.results, i64(1))
            place, rest = code.binary("urem", rest, results), code.binary("udiv", rest, results)
            first = plus(code, times(code, place, axis.stride), code.binary("sub", axis.crop, axis.pad))
            low = self._taps(axis, first, axis.crop)
            span = low, most(code, low, self._taps(axis, first, axis.end))
            counted = code.binary("sub", span[1], low)
            if self.kernel.count_padding:
                counted = self._taps(axis, first, axis.padded_end)
            spans.append(span)
            steps.append(times(code, axis.dilation, stride))
            base = plus(code, base, times(code, first, stride))
            size = times(code, size, counted)
            stride = times(code, stride, axis.extent)
        return spans, steps, plus(code, base, times(code, rest, stride)), most(code, size, i64(1))

    def _taps(self, axis: Axis, first: Reg, end: Reg) -> Reg:
        """How many taps lie before `end`."""
        code = self.code
        room = most(code, code.binary("sub", end, first), i64(0))
        return least(code, ceil_div(code, room, axis.dilation), axis.kernel)

    def _fold(
        self, spans: list[tuple[Reg, Reg]], steps: list[Reg], base: Reg, size: Reg, to: Reg, first: Reg, chains: int
    ) -> list[Reg]:
        code, lanes = self.code, self.kernel.lanes
        last = code.binary("sub", self.channels, i64(chains * lanes))
        channel = times(code, clamp(code, first, i64(0), last), i64(self._size))
        start = code.at(self.x, plus(code, base, channel))

        def taps(axis: int, place: Reg, values: list[Reg]) -> list[Reg]:
            if axis < 0:
                return self._folded(place, values)

            def tap(k: Reg, values: list[Reg]) -> list[Reg]:
                return taps(axis - 1, code.at(place, times(code, k, steps[axis])), values)

            if axis or self.kernel.kind == "max":
                return code.loop(*spans[axis], i64(1), tap, values)
            sums = code.loop(*spans[axis], i64(1), tap, [literal(self._kind, 0)] * chains)
            return [code.binary("fadd", value, part) for value, part in zip(values, sums, strict=True)]

        initial = literal(self._kind, LOWEST[self.kernel.dtype] if self.kernel.kind == "max" else 0)
        values = taps(AXES - 1, start, [initial] * chains)
        if self.kernel.kind == "average":
            count = splat(code, code.let("float", f"sitofp {size} to float"), lanes)
            values = [code.binary("fdiv", value, count) for value in values]
        for i, value in enumerate(values):
            code.store(value, code.at(to, plus(code, channel, i64(self._size * lanes * i))), self._size)
        return []

    def _folded(self, place: Reg, values: list[Reg]) -> list[Reg]:
        code, lanes = self.code, self.kernel.lanes
        places = [code.at(place, i64(self._size * lanes * i)) for i in range(len(values))]
        loaded = [code.load(self._kind, own, self._size) for own in places]
        return [
            write_expr(code, self.kernel.fold, {0: value, 1: new}, lanes)
            for value, new in zip(values, loaded, strict=True)
        ]


def pool_call(
    op: Pool, x: tuple[int, tuple[Dim, ...]], out: tuple[int, tuple[Dim, ...]], target: Target, dtype: DType = FLOAT32
) -> Native | None:
    """The pool of buffer and shape `x` [N, spatial..., C] to `out`, at most three spatial axes, float32, or int16 where
    it is a maximum; None if an extent of the channels or of the padding is not known now."""
    channels, rank = x[1][-1], len(op.kernel)
    if not isinstance(channels, int) or not channels or rank > AXES:
        return None
    lanes = min(target.vector_nbytes // dtype.itemsize, 1 << (channels.bit_length() - 1))
    unit: Sequence[Dim] = Axis(1, 1, 1, 1, 1, 0, 0, 1, 1)
    axes = [
        Axis(
            extent, count, kernel, stride, dilation, dims.maximum(before, 0), dims.maximum(-before, 0),
            extent - dims.maximum(-after, 0), extent + after,
        )
        for extent, count, kernel, stride, dilation, before, after in zip(
            x[1][1:-1], out[1][1:-1], op.kernel, op.strides, op.dilations, op.before, op.after, strict=True
        )
    ]  # fmt: skip
    numbers = [number for axis in (*reversed(axes), *[unit] * (AXES - rank)) for number in axis]
    kernel = PoolKernel(op.kind, op.count_include_pad, lanes, dtype)
    return Native(kernel, (Address(x[0]), Address(out[0]), dims.product(out[1][:-1]), channels, *numbers))
