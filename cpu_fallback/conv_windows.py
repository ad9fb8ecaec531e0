"""Windows of an image, copied to scratch with zeros where they reach over its edge.

A window is what a tile of output pixels reads: of neighbours in one row, the stretch of input below them; of pixels
anywhere, one window for each. Kernels then walk it without ever testing for an edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.epilogues import masked_load
from cpu_fallback.integers import ceil_div, least, most, plus, times
from cpu_fallback.loops import lane_mask
from cpu_fallback.native import Target, attributes

SLACK = 64
"""Bytes behind windows that copies of whole vectors may overwrite."""
SCALING = "ptr %to, ptr %from, ptr %gate, i64 %pixel, i64 %rows, i64 %channels, i64 %image"
COPY = "ptr %to, ptr %from, i64 %left, i64 %pieces, i64 %count, i64 %step, i64 %right"


class Geometry(NamedTuple):
    """A convolution in numbers: extents while lowering, registers inside a kernel. Axes are depth, height, width.

    `pixels` counts all results of one channel, over the whole batch. A window begins `crop - pad` elements into the
    image. Results lie `step` pixels apart in a tensor of `full` extents. `channels` of x lie side by side,
    `group_channels` of them belong to a group.
    """

    pixels: Any
    out_d: Any
    out_h: Any
    out_w: Any
    in_d: Any
    in_h: Any
    in_w: Any
    kernel_d: Any
    kernel_h: Any
    kernel_w: Any
    stride_d: Any
    stride_h: Any
    stride_w: Any
    dilation_d: Any
    dilation_h: Any
    dilation_w: Any
    pad_d: Any
    pad_h: Any
    pad_w: Any
    crop_d: Any
    crop_h: Any
    crop_w: Any
    step_d: Any
    step_h: Any
    step_w: Any
    full_d: Any
    full_h: Any
    full_w: Any
    channels: Any
    group_channels: Any
    groups: Any
    outputs: Any
    group_outputs: Any


@dataclass(frozen=True)
class Windows:
    """How to copy windows: `span` input columns, `column_step` apart, from every row that a tap reads.

    Planar images are [N, C, D, H, W], others [N, D, H, W, C]. All registers are loop invariants of the kernel.
    """

    target: Target
    planar: bool
    geometry: Geometry
    span: Reg
    column_step: Reg

    @property
    def _elements(self) -> Reg:
        """Side by side for every column."""
        return i64(1) if self.planar else self.geometry.group_channels

    def segments(self, code: Code) -> Reg:
        """Rows of a window."""
        g = self.geometry
        planes = g.group_channels if self.planar else i64(1)
        return times(code, planes, g.kernel_d, g.kernel_h)

    def segment_nbytes(self, code: Code) -> Reg:
        return times(code, self.span, self._elements, i64(4))

    def copy(self, code: Code, x: Reg, group: Reg, pixel: Reg, to: Reg) -> None:
        """The window of the output pixel number `pixel` over the channels of `group`, to `to`."""
        g, rest = self.geometry, pixel
        places = []
        for extent in (g.out_w, g.out_h, g.out_d):
            places.append(code.binary("urem", rest, extent))
            rest = code.binary("udiv", rest, extent)
        firsts = [
            plus(code, times(code, place, stride), code.binary("sub", crop, pad))
            for place, stride, pad, crop in zip(
                places,
                (g.stride_w, g.stride_h, g.stride_d),
                (g.pad_w, g.pad_h, g.pad_d),
                (g.crop_w, g.crop_h, g.crop_d),
                strict=True,
            )
        ]
        image = code.at(x, times(code, rest, g.in_d, g.in_h, g.in_w, g.channels, i64(4)))
        if not self.planar:
            image = code.at(image, times(code, group, g.group_channels, i64(4)))
        self._copy_rows(code, image, firsts, to)

    def _copy_rows(self, code: Code, image: Reg, firsts: list[Reg], to: Reg) -> None:
        g = self.geometry
        pixel_nbytes = i64(4) if self.planar else times(code, g.channels, i64(4))
        row_nbytes = times(code, g.in_w, pixel_nbytes)
        low, high = self._columns(code, firsts[0])
        start = times(code, plus(code, firsts[0], times(code, low, self.column_step)), pixel_nbytes)
        sizes = self._sizes(code, low, high, pixel_nbytes)
        blank = [times(code, self.span, self._elements), i64(0), i64(0), i64(0), i64(0)]
        name = define_copy(code, self.target)

        def row(index: Reg, carried: list[Reg]) -> list[Reg]:
            ky = code.binary("urem", index, g.kernel_h)
            above = code.binary("udiv", index, g.kernel_h)
            kz = code.binary("urem", above, g.kernel_d)
            y = plus(code, firsts[1], times(code, ky, g.dilation_h))
            z = plus(code, firsts[2], times(code, kz, g.dilation_d))
            inside = code.binary(
                "and", code.compare("icmp ult", y, g.in_h), code.compare("icmp ult", z, g.in_d)
            )  # fmt: skip
            plane = z
            if self.planar:
                plane = plus(code, times(code, code.binary("udiv", above, g.kernel_d), g.in_d), z)
            line = plus(code, times(code, plus(code, times(code, plane, g.in_h), y), row_nbytes), start)
            found = [code.select(inside, real, empty) for real, empty in zip(sizes, blank, strict=True)]
            arguments = [carried[0], code.at(image, line), *found]
            code.do(f"call void @{name}({', '.join(map(str, arguments))})")
            return [code.at(carried[0], self.segment_nbytes(code))]

        code.loop(i64(0), self.segments(code), i64(1), row, [to])

    def _columns(self, code: Code, first: Reg) -> tuple[Reg, Reg]:
        """[low, high) of the columns that lie inside the image."""
        ends = []
        for edge in (i64(0), self.geometry.in_w):
            missing = most(code, code.binary("sub", edge, first), i64(0))
            ends.append(least(code, ceil_div(code, missing, self.column_step), self.span))
        return ends[0], most(code, ends[0], ends[1])

    def _sizes(self, code: Code, low: Reg, high: Reg, pixel_nbytes: Reg) -> list[Reg]:
        """left, pieces, count, step and right of a copy: see `define_copy`."""
        g = self.geometry
        count = code.binary("sub", high, low)
        side_by_side = code.compare("icmp eq", self.column_step, i64(1))
        if not self.planar:
            whole = code.compare("icmp eq", g.channels, g.group_channels)
            side_by_side = code.binary("and", side_by_side, whole)
        right = times(code, code.binary("sub", self.span, high), self._elements)
        return [
            times(code, low, self._elements),
            code.select(side_by_side, i64(1), count),
            code.select(side_by_side, times(code, count, self._elements), self._elements),
            times(code, self.column_step, pixel_nbytes),
            right,
        ]


def define_scaling(code: Code, target: Target) -> str:
    """The name of a function that copies `rows` pixels of `channels` elements, from number `pixel` on, times the gates
    of their images, which have `image` pixels each."""
    name = f"scale_pixels{target.vector_nbytes}"
    code.define(name, SCALING, attributes(target), lambda inner: _write_scaling(inner, target))
    return name


def _write_scaling(code: Code, target: Target) -> None:
    to, source, gate, pixel, rows, channels, image = (
        Reg(text.split()[1], text.split()[0]) for text in SCALING.split(", ")
    )
    line, lanes = times(code, channels, i64(4)), target.vector_nbytes // 4
    whole = code.binary("and", channels, i64(-lanes))

    def row(index: Reg, _: list[Reg]) -> list[Reg]:
        here, there = (code.at(base, times(code, index, line)) for base in (to, source))
        own = code.at(gate, times(code, code.binary("udiv", plus(code, pixel, index), image), line))

        def scaled(width: int) -> Callable[[Reg, list[Reg]], list[Reg]]:
            def body(channel: Reg, _: list[Reg]) -> list[Reg]:
                offset, kind = times(code, channel, i64(4)), vector(width, "float")
                value, factor = (code.load(kind, code.at(base, offset), 4) for base in (there, own))
                code.store(code.binary("fmul", value, factor), code.at(here, offset), 4)
                return []

            return body

        code.loop(i64(0), whole, i64(lanes), scaled(lanes))
        code.loop(whole, channels, i64(1), scaled(1))
        return []

    code.loop(i64(0), rows, i64(1), row)


def define_copy(code: Code, target: Target) -> str:
    """The name of a function that writes `left` zeros, `pieces` of `count` elements that lie `step` bytes apart, and
    `right` zeros, one after another. It may write up to a vector of anything behind the last."""
    name = f"copy_row{target.vector_nbytes}"
    code.define(name, COPY, attributes(target), lambda inner: _write_copy(inner, target))
    return name


def _write_copy(code: Code, target: Target) -> None:
    to, source, left, pieces, count, step, right = (Reg(text.split()[1], text.split()[0]) for text in COPY.split(", "))
    lanes = target.vector_nbytes // 4
    kind = vector(lanes, "float")

    def zeros(place: Reg, total: Reg) -> Reg:
        def body(index: Reg, _: list[Reg]) -> list[Reg]:
            code.store(literal(kind, 0), code.at(place, times(code, index, i64(4))), 4)
            return []

        code.loop(i64(0), total, i64(lanes), body)
        return code.at(place, times(code, total, i64(4)))

    def piece(_: Reg, carried: list[Reg]) -> list[Reg]:
        here, there = carried
        whole = code.binary("and", count, i64(-lanes))

        def body(index: Reg, _: list[Reg]) -> list[Reg]:
            offset = times(code, index, i64(4))
            code.store(code.load(kind, code.at(there, offset), 4), code.at(here, offset), 4)
            return []

        code.loop(i64(0), whole, i64(lanes), body)

        def tail(index: Reg, _: list[Reg]) -> list[Reg]:
            offset = times(code, index, i64(4))
            mask = lane_mask(code, lanes, code.binary("sub", count, index))
            code.store(masked_load(code, kind, code.at(there, offset), mask), code.at(here, offset), 4)
            return []

        code.loop(whole, count, i64(lanes), tail)
        return [code.at(here, times(code, count, i64(4))), code.at(there, step)]

    here = zeros(to, left)
    here, _ = code.loop(i64(0), pieces, i64(1), piece, [here, source])
    zeros(here, right)
