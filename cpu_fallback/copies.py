"""Strided copies and padding: what several lowerings move elements with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.maps import Walked, walk_call
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BITS, can_copy
from gpu_engine.plan.axes import Shape, contiguous_strides
from gpu_engine.plan.lower import Lowering


def emit_copy(
    lowering: Lowering,
    source: int,
    target: int,
    extents: Shape,
    strides: tuple[Shape, Shape],
    offsets: tuple[Dim, Dim] = (0, 0),
) -> None:
    """Copy `extents` elements between two walks (strides and offsets in elements, of source and target)."""
    dtype = BITS[lowering.buffers[source].dtype.itemsize]
    walks = [
        Walked(buffer, dtype, steps, offset * dtype.itemsize)
        for buffer, steps, offset in zip((source, target), strides, offsets, strict=True)
    ]
    call = walk_call(expr.arg(0, dtype), walks[:1], walks[1], extents)
    assert call is not None, "every width has a native copy"
    lowering.emit(call, (source,), (target,))


@dataclass(frozen=True)
class Padding:
    """Elements added before and after every axis; negative ones are taken off."""

    before: tuple[Dim, ...]
    after: tuple[Dim, ...]

    def grown(self, shape: Shape) -> Shape:
        """The padded shape."""
        return tuple(a + extent + b for a, extent, b in zip(self.before, shape, self.after, strict=True))


def emit_pad(lowering: Lowering, source: int, value: int, target: int, shape: Shape, padding: Padding) -> None:
    """Steps that write the padded buffer `source` of `shape` to `target`, with the element in buffer `value` around."""
    pads = [*padding.before, *padding.after]
    if not can_copy(lowering.buffers[source].dtype) or any(
        (dims.bounds(pad)[0] or 0) < 0 or _open(pad) for pad in pads
    ):
        lowering.emit(ArrayCall(pad_array, padding), (source, value), (target,))
        return
    full = padding.grown(shape)
    steps = contiguous_strides(full)
    for axis, (low, high, step) in enumerate(zip(padding.before, padding.after, steps, strict=True)):
        for count, first in ((low, 0), (high, low + shape[axis])):
            if count != 0:
                extents = (*full[:axis], count, *full[axis + 1 :])
                emit_copy(lowering, value, target, extents, ((0,) * len(full), steps), (0, first * step))
    inside: Dim = sum((low * step for low, step in zip(padding.before, steps, strict=True)), 0)
    emit_copy(lowering, source, target, shape, (contiguous_strides(shape), steps), (0, inside))


def _open(pad: Dim) -> bool:
    """Whether the pad may be negative for all that is known."""
    return dims.bounds(pad)[0] is None


def pad_array(padding: Padding, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    """The same over arrays, where pads may also crop."""
    before, after = ([int(n) for n in side] for side in (padding.before, padding.after))  # type: ignore[arg-type]
    fill_borders(outputs[0], before, after, inputs[1].reshape(()))
    copy_inside(inputs[0], outputs[0], before, after)


def fill_borders(out: Array, before: Sequence[int], after: Sequence[int], value: Any) -> None:
    """`value` where a padded array lies outside of what it pads."""
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        lead = (slice(None),) * axis
        if low > 0:
            out[(*lead, slice(0, low))] = value
        if high > 0:
            out[(*lead, slice(max(0, out.shape[axis] - high), None))] = value


def copy_inside(x: Array, out: Array, before: Sequence[int], after: Sequence[int]) -> None:
    """x, cropped where a pad is negative, into the middle of `out`."""
    axes = list(zip(before, after, x.shape, out.shape, strict=True))
    source = tuple(slice(max(0, -low), own - max(0, -high)) for low, high, own, _ in axes)
    target = tuple(slice(max(0, low), full - max(0, high)) for low, high, _, full in axes)
    out[target] = x[source]
