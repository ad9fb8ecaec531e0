"""Pad: every element of the result says by index arithmetic where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.walks import write_inside, write_tile
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import can_copy
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Pad
from gpu_engine.plan.axes import contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


@dataclass(frozen=True)
class Border:
    """An axis of `extent` elements, of which `skipped` and what lies behind the next `inside` are taken off, with
    `low` and `high` elements around those."""

    extent: Dim
    skipped: Dim
    inside: Dim
    low: Dim
    high: Dim

    @property
    def plain(self) -> bool:
        return self.low == 0 and self.high == 0 and self.skipped == 0 and self.inside == self.extent

    @property
    def full(self) -> Dim:
        return self.low + self.inside + self.high

    def times(self, inner: Dim) -> Border:
        """With an axis behind that is left as it is."""
        return Border(*(part * inner for part in (self.extent, self.skipped, self.inside, self.low, self.high)))


def lower_pad(lowering: Lowering, op: Pad, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """An axis without elements has nothing to repeat: where only running tells so, the result holds zeros."""
    x = node.inputs[0]
    if not can_copy(x.dtype):
        return False
    borders = [_border(*axis) for axis in zip(x.shape, op.before, op.after, strict=True)]
    if op.mode != "constant" and any(border.inside == 0 and not border.plain for border in borders):
        return False
    borders = _joined(borders, joins_border=op.mode == "constant")
    text = KernelText(lowering, "pad", bits=True)
    steps = contiguous_strides(tuple(border.full for border in borders))
    axes = [(border.full, [step]) for border, step in zip(borders, steps, strict=True)]
    tile = write_tile(text, axes, x.dtype.itemsize, "tl.program_id(0)", flat=True)
    conditions: list[str] = []
    places = [
        _source(text, index, border, op.mode, conditions) for index, border in zip(tile.indices, borders, strict=True)
    ]
    own = contiguous_strides(tuple(border.extent for border in borders))
    source = " + ".join(f"{place} * {text.number(step)}" for place, step in zip(places, own, strict=True))
    target = tile.flat or " + ".join(
        f"{index} * {text.number(step)}" for index, step in zip(tile.indices, steps, strict=True)
    )
    value = text.load(inputs[1], "0") if len(inputs) > 1 else "0"
    known = text.let("known", " & ".join(conditions)) if conditions else None

    def body(mask: str | None) -> None:
        masks = " & ".join(part for part in (mask, known) if part is not None)
        found = text.load(inputs[0], source, masks or None, "0" if masks else None)
        result = f"tl.where({known}, {found}, {value})" if known and len(inputs) > 1 else found
        text.store(outputs[0], target, result, mask)

    write_inside(text, tile, body)
    text.launch([tile.programs], inputs, outputs)
    return True


def _border(extent: Dim, before: Dim, after: Dim) -> Border:
    """Negative numbers take elements off first."""
    skipped, dropped = (dims.maximum(0, -1 * pad) for pad in (before, after))
    return Border(extent, skipped, extent - skipped - dropped, dims.maximum(0, before), dims.maximum(0, after))


def _joined(borders: Sequence[Border], *, joins_border: bool) -> list[Border]:
    """Axes that are left as they are, joined with the one before: any such axis, or any at all."""
    found: list[Border] = []
    for border in borders:
        if found and border.plain and (joins_border or found[-1].plain):
            found[-1] = found[-1].times(border.extent)
        else:
            found.append(border)
    return found or [Border(1, 0, 1, 0, 0)]


def _source(text: KernelText, index: str, border: Border, mode: str, conditions: list[str]) -> str:
    """Where an index of the result lies along an axis of x. Adds what must hold for it to be an element of x."""
    if border.plain:
        return index
    place = index if border.low == 0 else text.let("s", f"{index} - {text.number(border.low)}")
    if mode == "constant":
        conditions += [f"({place} >= 0)"] * (border.low != 0)
        conditions += [f"({place} < {text.number(border.inside)})"] * (border.high != 0)
    else:
        if not isinstance(border.inside, int):
            conditions.append(f"({text.number(border.inside)} > 0)")
        place = _repeated(text, place, text.number(border.inside), mode)
    return place if border.skipped == 0 else f"({place} + {text.number(border.skipped)})"


def _repeated(text: KernelText, place: str, inside: str, mode: str) -> str:
    """Which of `inside` elements stands at a place around them."""
    if mode == "edge":
        return text.let("s", f"tl.minimum(tl.maximum({place}, 0), {inside} - 1)")
    period = text.let("period", f"tl.maximum({inside if mode == 'wrap' else f'2 * {inside} - 2'}, 1)")
    rest = text.let("s", f"({place} % {period} + {period}) % {period}")
    return rest if mode == "wrap" else text.let("s", f"tl.minimum({rest}, {period} - {rest})")
