"""Native kernels that pack weights, several times as fast as NumPy's strided copies."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.calls import address_of
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import ceil_div, least, most, plus, times
from cpu_fallback.loops import Words, splat, thread_share
from cpu_fallback.native import LIBRARY, Kernel, Target
from cpu_fallback.winograd_transforms import FILTERS, points

TAPS = 9


@dataclass(frozen=True)
class PanelKernel:
    """Panels of float32 weights, `width` columns each but for the last, columns that there are not as zeros.

    Words: address of matrices [columns, outer, inner] one after the other; where their panels go, every matrix as
    panels [depth, columns of the panel]; matrices, columns, outer and inner. The depth goes by inner then outer if
    `turned`, else as it lies.
    """

    lanes: int
    width: int
    turned: bool

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        source, out = words.pointers(2)
        matrices, columns, outer, inner = words.numbers(4)
        depth = times(code, outer, inner)
        sizes = (inner, outer) if self.turned else (outer, inner)
        steps = (i64(1), inner) if self.turned else (inner, i64(1))

        def panel(matrix: Reg, first: Reg, width: Reg, vectors: Reg) -> None:
            from_here = code.at(source, times(code, plus(code, times(code, matrix, columns), first), depth, i64(4)))
            to_here = code.at(out, _panel_offset(code, self.lanes, matrix, columns, first, depth))
            left = code.binary("sub", columns, first)

            def column(lane: Reg) -> None:
                lines = lines_of(code, from_here, lane, left, times(code, depth, i64(4)), self.lanes)
                to_column = code.at(to_here, times(code, lane, i64(4)))

                def row(i: Reg, j: Reg) -> None:
                    step = plus(code, times(code, i, steps[0]), times(code, j, steps[1]))
                    place = times(code, plus(code, times(code, i, sizes[1]), j), width, i64(4))
                    value = gathered(code, lines, times(code, step, i64(4)), left, lane)
                    code.store(value, code.at(to_column, place), 4)

                over(code, sizes[0], lambda i: over(code, sizes[1], lambda j: row(i, j)))

            over(code, vectors, lambda v: column(times(code, v, i64(self.lanes))))

        _panels(code, self.lanes, self.width, matrices, columns, panel)


@dataclass(frozen=True)
class WinogradPanelKernel:
    """Panels of float32 filters of 3 x 3 taps for F(m x m, 3 x 3), transformed in float64.

    Words: address of filters [columns, channels, 9]; where the panels go, each [points, channels, columns of the
    panel]; 1, columns, channels.
    """

    m: int
    lanes: int
    width: int

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        source, out = words.pointers(2)
        matrices, columns, channels = words.numbers(3)
        line = times(code, channels, i64(4 * TAPS))

        def panel(matrix: Reg, first: Reg, width: Reg, vectors: Reg) -> None:
            from_here = code.at(source, times(code, first, line))
            size = times(code, channels, i64(points(self.m)))
            to_here = code.at(out, _panel_offset(code, self.lanes, matrix, columns, first, size))
            left = code.binary("sub", columns, first)

            plane = times(code, channels, width, i64(4))

            def column(lane: Reg) -> None:
                lines = lines_of(code, from_here, lane, left, line, self.lanes)
                to_column = code.at(to_here, times(code, lane, i64(4)))

                def row(channel: Reg) -> None:
                    start = times(code, channel, i64(4 * TAPS))
                    taps = [
                        gathered(code, lines, plus(code, start, i64(4 * tap)), left, lane) for tap in range(TAPS)
                    ]  # fmt: skip
                    place = code.at(to_column, times(code, channel, width, i64(4)))
                    for value in _transformed(code, taps, self.m):
                        code.store(value, place, 4)
                        place = code.at(place, plane)

                over(code, channels, row)

            over(code, vectors, lambda v: column(times(code, v, i64(self.lanes))))

        _panels(code, self.lanes, self.width, matrices, columns, panel)


def _panels(
    code: Code, lanes: int, width: int, matrices: Reg, columns: Reg, write: Callable[[Reg, Reg, Reg, Reg], None]
) -> None:
    """write(matrix, first column, columns with padding, vectors) of every panel of this thread."""
    count = ceil_div(code, columns, i64(width))

    def one(index: Reg, _: list[Reg]) -> list[Reg]:
        matrix = code.binary("udiv", index, count)
        first = times(code, code.binary("urem", index, count), i64(width))
        vectors = ceil_div(code, least(code, code.binary("sub", columns, first), i64(width)), i64(lanes))
        write(matrix, first, times(code, vectors, i64(lanes)), vectors)
        return []

    code.loop(*thread_share(code, times(code, matrices, count), 1), i64(1), one)


def _panel_offset(code: Code, lanes: int, matrix: Reg, columns: Reg, first: Reg, size: Reg) -> Reg:
    """Bytes before a panel: those of the matrices before it and of its own columns, `size` elements each."""
    padded = times(code, ceil_div(code, columns, i64(lanes)), i64(lanes))
    return times(code, plus(code, times(code, matrix, padded), first), size, i64(4))


def over(code: Code, count: Reg, body: Callable[[Reg], None]) -> None:
    """body(i) for i in range(count)."""

    def step(i: Reg, _: list[Reg]) -> list[Reg]:
        body(i)
        return []

    code.loop(i64(0), count, i64(1), step)


def lines_of(code: Code, source: Reg, lane: Reg, left: Reg, nbytes: Reg, lanes: int) -> list[Reg]:
    """Where the lines of a vector's columns start; those that there are not are copies of the last one."""
    last = code.binary("sub", left, i64(1))
    return [
        code.at(source, times(code, least(code, plus(code, lane, i64(i)), last), nbytes)) for i in range(lanes)
    ]  # fmt: skip


def gathered(code: Code, lines: Sequence[Reg], offset: Reg, left: Reg, lane: Reg) -> Reg:
    """One element of each line, zero where there is no such column."""
    kind = vector(len(lines), "float")
    value = Reg("poison", kind)
    for i, line in enumerate(lines):
        element = code.load("float", code.at(line, offset), 1)
        value = code.let(kind, f"insertelement {value}, {element}, i64 {i}")
    iota = Reg("<" + ", ".join(f"i64 {i}" for i in range(len(lines))) + ">", vector(len(lines), "i64"))
    inside = code.compare("icmp slt", iota, splat(code, most(code, code.binary("sub", left, lane), i64(0)), len(lines)))
    return code.select(inside, value, literal(kind, 0))


def _transformed(code: Code, taps: Sequence[Reg], m: int) -> list[Reg]:
    """FILTERS[m] G FILTERS[m]^T for the taps G of one filter in every lane."""
    kind = taps[0].type
    wide = [code.convert("fpext", tap, kind.replace("float", "double")) for tap in taps]
    columns = [[_dot(code, row, wide[j::3]) for j in range(3)] for row in FILTERS[m]]
    return [code.convert("fptrunc", _dot(code, row, line), kind) for line in columns for row in FILTERS[m]]


def _dot(code: Code, factors: NDArray[np.float64], values: Sequence[Reg]) -> Reg:
    total = None
    for factor, value in zip(factors.tolist(), values, strict=True):
        if factor:
            term = code.binary("fmul", value, literal(value.type, factor))
            total = term if total is None else code.binary("fadd", total, term)
    assert total is not None
    return total


def run_kernel(kernel: Kernel, target: Target, *words: int | NDArray[Any]) -> None:
    """Run a kernel on this thread, now; arrays are words by address."""
    block = np.array([word if isinstance(word, int) else address_of(word) for word in words], np.int64)
    kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    ctypes.CFUNCTYPE(None, *kinds)(LIBRARY.addresses([kernel], target)[kernel])(address_of(block), 0, 1)
