"""Resize: every result gathers the elements it lies between, all axes in one kernel.

Positions are computed in float32 in the order in which `ir.ops.image` computes them, so that both agree on ties; where
extents are known and positions unusual they are a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from gpu_engine.gpu.printing import computing, is_printable_dtype, literal
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.windows import scaled, sum_of, unravelled
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, FLOAT64, is_float, limits
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Resize
from gpu_engine.ir.ops.image import keeps_axis, resize_table
from gpu_engine.plan.axes import contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
BLOCK = 512
MOST_TAPS = 64
"""Loads for one result up to which they are written out."""
COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
)  # fmt: skip


@dataclass(frozen=True)
class Tap:
    """An element that a result lies at or between: its place along an axis, and its weight."""

    place: str
    weight: str | None


def lower_resize(lowering: Lowering, op: Resize, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """Append the kernel; False for antialiasing, exclusions and crops of symbolic extents, for axes that may be empty,
    and where a result is a sum of very many elements."""
    (x,) = node.inputs
    changed = [axis for axis, extent in enumerate(x.shape) if not keeps_axis(op, axis, extent)]
    if not is_printable_dtype(x.dtype) or (x.dtype == BOOL and op.mode != "nearest"):
        return False
    if any((dims.bounds(extent)[0] or 0) < 1 for extent in x.shape):
        return False
    tables = {axis: _uses_table(op, axis, x.shape[axis]) for axis in changed}
    if any(table is None for table in tables.values()):
        return False
    counts = [_tap_count(lowering, op, axis, x.shape[axis], bool(tables[axis])) for axis in changed]
    if prod(counts) > MOST_TAPS:
        return False
    _Writer(lowering, op, node, inputs[0], outputs[0]).write(tables)
    return True


def _uses_table(op: Resize, axis: int, extent: Dim) -> bool | None:
    """Whether the axis is resampled by a table; None where that would take extents that are not known."""
    plain = op.coordinates in COORDINATES and not op.antialias and not op.exclude_outside
    if plain:
        return False
    return True if isinstance(extent, int) and isinstance(op.extents[axis], int) else None


def _tap_count(lowering: Lowering, op: Resize, axis: int, extent: Dim, table: bool) -> int:
    if table:
        return int(resize_table(op, axis, dims.number(extent)).places.shape[1])
    return {"nearest": 1, "linear": 2, "cubic": 4}[op.mode]


class _Writer:
    """The kernel while it is written."""

    def __init__(self, lowering: Lowering, op: Resize, node: Node, source: int, out: int) -> None:
        self.lowering, self.op, self.node, self.source, self.out = lowering, op, node, source, out
        self.text = KernelText(lowering, f"resize_{op.mode}")
        self.dtype = node.inputs[0].dtype
        integer = not is_float(self.dtype) and op.mode != "nearest"
        self.kind = ("tl.float64" if self.dtype.itemsize >= 4 else "tl.float32") if integer else computing(self.dtype)
        self.read = [source]
        self.outside: list[str] = []

    def write(self, tables: dict[int, bool | None]) -> None:
        text, shape = self.text, self.node.outputs[0].shape
        total = dims.product(shape)
        text.line(f"i = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})")
        text.line(f"inside = i < {text.number(total)}")
        axes, extents, strides = self._joined(tables)
        indices = unravelled(text, "i", extents)
        kept = []
        taps: list[list[Tap]] = []
        for axis, index, stride in zip(axes, indices, strides, strict=True):
            if axis is None:
                kept += scaled(text, index, stride)
                continue
            found = self._table(axis, index) if tables[axis] else self._computed(axis, index)
            taps.append([Tap(sum_of(scaled(text, tap.place, stride)), tap.weight) for tap in found])
        text.store(self.out, "i", self._finished(self._sum(sum_of(kept), taps)), "inside")
        text.launch([dims.ceil_div(total, BLOCK)], tuple(self.read), (self.out,))

    def _joined(self, tables: dict[int, bool | None]) -> tuple[list[int | None], list[Dim], list[Dim]]:
        """(axis that is resampled, or None for neighbours that are kept; extents of the result; pitches of x)."""
        shape = self.node.outputs[0].shape
        axes: list[int | None] = []
        extents: list[Dim] = []
        pitches: list[Dim] = []
        for axis, pitch in enumerate(contiguous_strides(self.node.inputs[0].shape)):
            if axis not in tables and axes and axes[-1] is None:
                extents[-1], pitches[-1] = extents[-1] * shape[axis], pitch
                continue
            axes.append(axis if axis in tables else None)
            extents.append(shape[axis])
            pitches.append(pitch)
        return axes, extents, pitches

    def _sum(self, place: str, taps: Sequence[Sequence[Tap]]) -> str:
        """Axis after axis, as the reference adds."""
        text, values = self.text, {}
        for chosen in itertools.product(*(range(len(axis)) for axis in taps)):
            at = " + ".join([place, *(axis[i].place for i, axis in zip(chosen, taps, strict=True))])
            raw = text.load(self.source, f"{at} + tl.zeros(({BLOCK},), tl.int32)", "inside")
            values[chosen] = raw if self.op.mode == "nearest" else text.let("x", f"{raw}.to({self.kind})")
        for axis in taps:
            parts: dict[tuple[int, ...], str] = {}
            for chosen, value in values.items():
                weight = axis[chosen[0]].weight
                term = value if weight is None else f"{value} * {weight}.to({self.kind})"
                before = parts.get(chosen[1:])
                parts[chosen[1:]] = text.let("x", term if before is None else f"{before} + {term}")
            values = parts
        return values[()]

    def _finished(self, value: str) -> str:
        text, dtype = self.text, self.dtype
        if self.outside:
            filler = np.asarray(self.op.extrapolation_value).astype(dtype if self.op.mode == "nearest" else np.float64)
            fill = literal(filler, dtype if self.op.mode == "nearest" else FLOAT64)
            value = text.let("x", f"tl.where({' | '.join(self.outside)}, ({fill}).to({value}.dtype), {value})")
        if self.op.mode == "nearest" or is_float(dtype):
            return value
        low, high = limits(dtype)
        rounded = text.let("x", f"libdevice.rint({value})")
        clipped = text.let("x", f"tl.minimum(tl.maximum({rounded}, {float(low)!r}), {float(high)!r})")
        return text.let("x", f"{clipped}.to(tl.int64).to({computing(dtype)})")

    def _table(self, axis: int, index: str) -> list[Tap]:
        extent = dims.number(self.node.inputs[0].shape[axis])
        table, text = resize_table(self.op, axis, extent), self.text
        places = self.lowering.constant(table.places.astype(np.int32))
        self.read.append(places)
        count = table.places.shape[1]
        weights = None if table.weights is None else self.lowering.constant(table.weights)
        if weights is not None:
            self.read.append(weights)
        if table.outside is not None and table.outside.any():
            outside = self.lowering.constant(table.outside)
            self.read.append(outside)
            self.outside.append(text.load(outside, index, "inside"))
        return [
            Tap(text.load(places, f"{index} * {count} + {tap}", "inside"),
                None if weights is None else text.load(weights, f"{index} * {count} + {tap}", "inside"))
            for tap in range(count)
        ]  # fmt: skip

    def _computed(self, axis: int, index: str) -> list[Tap]:
        text, extent = self.text, self.node.inputs[0].shape[axis]
        at = _Axis(text, self.op, text.number(extent), text.number(self.op.extents[axis]), self.op.scales[axis])
        if self.op.mode == "nearest":
            return [Tap(at.inside(at.nearest(index)), None)]
        position = at.position(index)
        base = text.let("base", f"tl.floor({position})")
        ratio = text.let("ratio", f"{position} - {base}")
        weights = _linear(text, ratio) if self.op.mode == "linear" else _cubic(text, ratio, self.op.cubic_coeff_a)
        first = 0 if self.op.mode == "linear" else -1
        return [Tap(at.inside(f"{base} + {float(first + i)!r}"), weight) for i, weight in enumerate(weights)]


def _linear(text: KernelText, ratio: str) -> list[str]:
    return [text.let("w", f"1.0 - {ratio}"), ratio]


def _cubic(text: KernelText, ratio: str, a: float) -> list[str]:
    wide = text.let("ratio", f"{ratio}.to(tl.float64)")
    weights = []
    for offset in (-1, 0, 1, 2):
        d = text.let("d", f"tl.abs({float(offset)!r} - {wide})")
        near = f"(({a + 2!r} * {d} - {a + 3!r}) * {d} * {d} + 1.0)"
        far = f"((({a!r} * {d} - {5 * a!r}) * {d} + {8 * a!r}) * {d} - {4 * a!r})"
        form = f"tl.where({d} <= 1.0, {near}, tl.where({d} < 2.0, {far}, 0.0))"
        weights.append(text.let("w", f"{form}.to(tl.float32)"))
    return weights


class _Axis:
    """A resampled axis whose positions the kernel computes; `scale` is None where it is the quotient of the extents."""

    def __init__(self, text: KernelText, op: Resize, extent: str, count: str, scale: float | None) -> None:
        self.text, self.op, self.extent, self.count = text, op, extent, count
        one = "tl.full([], 1, tl.int32)"
        self._extent, self._count = (text.let("extent", f"({number} * {one})") for number in (extent, count))
        self.scale = text.let("scale", self._quotient() if scale is None else _single(scale))

    def _quotient(self) -> str:
        return f"({self._count}.to(tl.float64) / {self._extent}.to(tl.float64)).to(tl.float32)"

    def position(self, index: str) -> str:
        """Where in x a result lies."""
        text, i = self.text, self.text.let("f", f"({index} + tl.zeros(({BLOCK},), tl.int32)).to(tl.float32)")
        kind, scale = self.op.coordinates, f"({self.scale} + tl.zeros(({BLOCK},), tl.float32))"
        if kind == "asymmetric":
            return text.let("position", f"tl.div_rn({i}, {scale})")
        if kind == "align_corners":
            last, steps = (text.let("f", f"({end} - 1).to(tl.float32)") for end in (self._extent, self._count))
            divisor = f"tl.where({self._count} > 1, {steps}, 1.0) + tl.zeros(({BLOCK},), tl.float32)"
            return text.let("position", f"tl.where({self._count} > 1, tl.div_rn({i} * {last}, {divisor}), 0.0)")
        middle = text.let("f", f"tl.div_rn({i} + 0.5, {scale})")
        if kind == "tf_half_pixel_for_nn":
            return middle
        if kind == "half_pixel_symmetric":
            return text.let("position", f"{self._margin()} + {middle} - 0.5")
        found = f"{middle} - 0.5"
        if kind == "pytorch_half_pixel":
            found = f"tl.where({self._count} > 1, {found}, 0.0)"
        return text.let("position", found)

    def _margin(self) -> str:
        wide = [f"{number}.to(tl.float64)" for number in (self._count, self._extent)]
        text = self.text
        ratio = text.let("f", f"({wide[0]} / ({self.scale}.to(tl.float64) * {wide[1]})).to(tl.float32)")
        half = text.let("f", f"({wide[1]} / 2.0).to(tl.float32)")
        return text.let("margin", f"{half} * (1.0 - {ratio})")

    def nearest(self, index: str) -> str:
        position = self.position(index)
        return {
            "floor": f"tl.floor({position})",
            "ceil": f"tl.ceil({position})",
            "round_prefer_floor": f"tl.ceil({position} - 0.5)",
            "round_prefer_ceil": f"tl.floor({position} + 0.5)",
            "simple": f"tl.where({self.scale} >= 1.0, tl.floor({position}), tl.ceil({position}))",
        }[self.op.nearest_mode]

    def inside(self, place: str) -> str:
        whole = self.text.let("at", f"({place}).to(tl.int32)")
        return self.text.let("at", f"tl.minimum(tl.maximum({whole}, 0), {self._extent} - 1)")


def _single(scale: float) -> str:
    return f"tl.full([], {float(np.float32(scale))!r}, tl.float32)"
