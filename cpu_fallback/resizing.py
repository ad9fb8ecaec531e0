"""Resize of two neighbouring axes, whatever lies around them: nearest and linear, positions computed as they are used.

Positions are computed in float32 in the order in which `ir.ops.image` computes them, so that both agree on ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import clamp, plus, times
from cpu_fallback.loops import Words, splat, thread_share
from cpu_fallback.native import Target
from cpu_fallback.vector_math import Num
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Resize
from gpu_engine.ir.ops.image import keeps_axis
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
)  # fmt: skip


@dataclass(frozen=True)
class ResizeKernel:
    """x [outer, height, width, inner] of float32 resampled along height and width, by content.

    Words: addresses of x and the result; outer, inner; for either axis its extent, the result's, and the scale as
    float32 in the low half of a word, which counts if `given`.
    """

    linear: bool
    coordinates: str
    nearest: str
    given: tuple[bool, bool]

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, out = words.pointers(2)
        outer, inner = words.numbers(2)
        axes = []
        for given in self.given:
            extent, count = words.numbers(2)
            place = words.address()
            axes.append(_Axis(code, self, extent, count, _scale(code, extent, count, place if given else None)))
        _Writer(code, self, x, out, inner, axes[0], axes[1], target.vector_nbytes // 4).write(outer)


def _scale(code: Code, extent: Reg, count: Reg, place: Reg | None) -> Num:
    if place is not None:
        return Num(code, code.load("float", place, 4))
    ends = [code.let("double", f"sitofp {number} to double") for number in (count, extent)]
    return Num(code, code.convert("fptrunc", code.binary("fdiv", *ends), "float"))


@dataclass(frozen=True)
class _Axis:
    """A resampled axis inside the kernel."""

    code: Code
    kernel: ResizeKernel
    extent: Reg
    count: Reg
    scale: Num

    def _float(self, number: Reg) -> Num:
        return Num(self.code, self.code.let("float", f"sitofp {number} to float"))

    def position(self, index: Reg) -> Num:
        """Where in x a result lies."""
        i, kind = self._float(index), self.kernel.coordinates
        one = self.code.compare("icmp sle", self.count, i64(1))
        if kind == "asymmetric":
            return i / self.scale
        if kind == "align_corners":
            last, steps = (
                self._float(self.code.binary("sub", end, i64(1))) for end in (self.extent, self.count)
            )  # fmt: skip
            return Num(self.code, one).select(0.0, i * last / Num(self.code, one).select(1.0, steps))
        middle = (i + 0.5) / self.scale
        if kind == "tf_half_pixel_for_nn":
            return middle
        if kind == "half_pixel_symmetric":
            return self._margin() + middle - 0.5
        found = middle - 0.5
        return Num(self.code, one).select(0.0, found) if kind == "pytorch_half_pixel" else found

    def _margin(self) -> Num:
        wide = [Num(self.code, self.code.let("double", f"sitofp {n} to double")) for n in (self.count, self.extent)]
        adjustment = (wide[0] / (self.scale.cast("fpext", "double") * wide[1])).cast("fptrunc", "float")
        half = (wide[1] * 0.5).cast("fptrunc", "float")
        return half * (Num(self.code, literal("float", 1.0)) - adjustment)

    def nearest(self, index: Reg) -> Reg:
        """The element of x that a result is."""
        position, kind = self.position(index), self.kernel.nearest
        floor, ceil = position.intrinsic("floor"), position.intrinsic("ceil")
        chosen = {
            "floor": lambda: floor,
            "ceil": lambda: ceil,
            "round_prefer_floor": lambda: (position - 0.5).intrinsic("ceil"),
            "round_prefer_ceil": lambda: (position + 0.5).intrinsic("floor"),
            "simple": lambda: self.scale.test("oge", 1.0).select(floor, ceil),
        }[kind]()
        return self._inside(chosen)

    def _inside(self, place: Num) -> Reg:
        whole = self.code.let("i64", f"fptosi {place.reg} to i64")
        return clamp(self.code, whole, i64(0), self.code.binary("sub", self.extent, i64(1)))

    def neighbours(self, index: Reg) -> list[tuple[Reg, Num]]:
        """The two elements of x that a result lies between, with their weights."""
        position = self.position(index)
        base = position.intrinsic("floor")
        ratio = position - base
        low = Num(self.code, literal("float", 1.0)) - ratio
        return [(self._inside(base), low), (self._inside(base + 1.0), ratio)]


@dataclass(frozen=True)
class _Writer:
    """The kernel while it is written."""

    code: Code
    kernel: ResizeKernel
    x: Reg
    out: Reg
    inner: Reg
    rows: _Axis
    columns: _Axis
    lanes: int

    def write(self, outer: Reg) -> None:
        code = self.code

        def line(index: Reg, _: list[Reg]) -> list[Reg]:
            image, y = code.binary("udiv", index, self.rows.count), code.binary("urem", index, self.rows.count)
            base = times(code, image, self.rows.extent)
            start = times(code, index, self.columns.count)
            if self.kernel.linear:
                between = [(plus(code, base, place), weight) for place, weight in self.rows.neighbours(y)]
                code.loop(
                    i64(0), self.columns.count, i64(1), lambda column, _: self._mixed(between, start, column)
                )  # fmt: skip
            else:
                row = plus(code, base, self.rows.nearest(y))
                code.loop(i64(0), self.columns.count, i64(1), lambda column, _: self._copied(row, start, column))
            return []

        code.loop(*thread_share(code, times(code, outer, self.rows.count), 1), i64(1), line)

    def _place(self, row: Reg, column: Reg) -> Reg:
        code = self.code
        return code.at(
            self.x, times(code, plus(code, times(code, row, self.columns.extent), column), self.inner, i64(4))
        )

    def _copied(self, row: Reg, start: Reg, column: Reg) -> list[Reg]:
        source = self._place(row, self.columns.nearest(column))
        self._each(plus(self.code, start, column), lambda kind, offset: self._load(kind, source, offset))
        return []

    def _mixed(self, between: Sequence[tuple[Reg, Num]], start: Reg, column: Reg) -> list[Reg]:
        code, across = self.code, self.columns.neighbours(column)
        sources = [
            ([(self._place(row, place), weight) for row, weight in between], factor) for place, factor in across
        ]  # fmt: skip

        def value(kind: str, offset: Reg) -> Reg:
            lanes = 1 if kind == "float" else self.lanes
            total = None
            for lines, factor in sources:
                parts = [
                    Num(code, self._load(kind, place, offset)) * Num(code, splat(code, weight.reg, lanes))
                    for place, weight in lines
                ]
                part = (parts[0] + parts[1]) * Num(code, splat(code, factor.reg, lanes))
                total = part if total is None else total + part
            assert total is not None
            return total.reg

        self._each(plus(code, start, column), value)
        return []

    def _load(self, kind: str, place: Reg, offset: Reg) -> Reg:
        return self.code.load(kind, self.code.at(place, offset), 4)

    def _each(self, pixel: Reg, value: Any) -> None:
        """All inner elements of a result, whole vectors first."""
        code = self.code
        to = code.at(self.out, times(code, pixel, self.inner, i64(4)))
        whole = code.binary("and", self.inner, i64(-self.lanes))
        for start, stop, lanes in ((i64(0), whole, self.lanes), (whole, self.inner, 1)):

            def step(index: Reg, _: list[Reg], lanes: int = lanes) -> list[Reg]:
                offset = times(code, index, i64(4))
                code.store(value(vector(lanes, "float"), offset), code.at(to, offset), 4)
                return []

            code.loop(start, stop, i64(lanes), step)


def lower_resize(lowering: Lowering, op: Resize, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    """Nearest and linear along one axis or two neighbours; False for anything else."""
    (x,) = node.inputs
    plain = op.mode in ("nearest", "linear") and op.coordinates in COORDINATES
    changed = [axis for axis, extent in enumerate(x.shape) if not keeps_axis(op, axis, extent)]
    if not plain or x.dtype != FLOAT32 or op.exclude_outside or op.antialias or not 0 < len(changed) <= 2:
        return False
    if changed[-1] - changed[0] != len(changed) - 1 or any(_may_vanish(extent) for extent in x.shape):
        return False
    first, last = changed[0], changed[-1]
    kept: tuple[Dim, Dim, int] = (1, 1, _bits(1.0))
    axes = [(x.shape[axis], op.extents[axis], _bits(op.scales[axis] or 0.0)) for axis in changed]
    given = [op.scales[axis] is not None for axis in changed]
    axes, given = ([kept, *axes], [True, *given]) if len(axes) == 1 else (axes, given)
    kernel = ResizeKernel(op.mode == "linear", op.coordinates, op.nearest_mode, (given[0], given[1]))
    outer, inner = dims.product(x.shape[:first]), dims.product(x.shape[last + 1 :])
    numbers = [number for axis in axes for number in axis]
    lowering.emit(Native(kernel, (Address(inputs[0]), Address(outputs[0]), outer, inner, *numbers)), inputs, outputs)
    return True


def _may_vanish(extent: Dim) -> bool:
    return (dims.bounds(extent)[0] or 0) < 1


def _bits(scale: float) -> int:
    return int(np.float32(scale).view(np.uint32))
