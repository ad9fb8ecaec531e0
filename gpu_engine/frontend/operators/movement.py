"""Joining, cutting and repeating along axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import room
from gpu_engine.frontend.operators.operands import (
    fresh_at,
    fresh_type,
    known_extents,
    known_ints,
    normal_axes,
    static_length,
)
from gpu_engine.frontend.registry import emit_array, normal_axis, operator
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Concat, Expand, Pad, Reshape, Slice


@operator("Concat", since=1)
def concat_1(b: Builder, *inputs: Value, axis: int = 1) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Concat.html (axis 1 by default)"""
    return concat(b, *inputs, axis=axis)


@operator("Concat", since=4)
def concat(b: Builder, *inputs: Value, axis: int) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Concat.html"""
    if not inputs:
        raise InvalidModel("Concat of nothing")
    if len(inputs) == 1:
        return inputs[0]
    return b.emit(Concat(normal_axis(axis, inputs[0].rank)), *inputs)


@operator("Split", since=2)
def split_2(
    b: Builder, x: Value, *, axis: int = 0, split: tuple[int, ...] | None = None, output_count: int
) -> tuple[Value, ...]:
    """https://onnx.ai/onnx/operators/onnx__Split.html (sizes as an attribute)"""
    axis = normal_axis(axis, x.rank)
    return split_at(b, x, axis, equal_parts(x, axis, output_count) if split is None else split, output_count)


@operator("Split", since=13)
def split(
    b: Builder,
    x: Value,
    split: Value | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    output_count: int,
) -> tuple[Value, ...]:
    """https://onnx.ai/onnx/operators/onnx__Split.html"""
    axis, count = normal_axis(axis, x.rank), num_outputs or output_count
    if split is None:
        sizes = equal_parts(x, axis, count) if num_outputs is None else uneven_parts(x.shape[axis], count)
        return split_at(b, x, axis, sizes, count)
    return split_by_value(b, x, axis, split, output_count)


def split_by_value(b: Builder, x: Value, axis: int, split: Value, count: int) -> tuple[Value, ...]:
    """Consecutive slices of the sizes that `split` holds, be they known or not."""
    sizes = known_extents(split)
    if sizes is not None:
        return split_at(b, x, axis, sizes, count)
    types = tuple(fresh_at(b, x.type, (axis,)) for _ in range(count))
    return emit_array(b, split_by, lambda b, x, split, **_: types, (x, split), {"axis": axis})


def equal_parts(x: Value, axis: int, count: int) -> list[Dim]:
    """`count` equal sizes; InvalidModel where the extent is known not to divide."""
    extent = x.shape[axis]
    if isinstance(extent, int) and extent % count:
        raise InvalidModel(f"axis {axis} of {x.type} does not split into {count} equal parts")
    return [dims.floor_div(extent, count)] * count


def uneven_parts(extent: Dim, count: int) -> list[Dim]:
    """`count` sizes, the last one smaller where the extent does not divide."""
    whole = dims.ceil_div(extent, count)
    return [*[whole] * (count - 1), extent - whole * (count - 1)]


def split_at(b: Builder, x: Value, axis: int, sizes: Sequence[Dim], count: int) -> tuple[Value, ...]:
    """Consecutive slices of these sizes."""
    total, extent = sum(sizes, 0), x.shape[axis]
    if len(sizes) != count or any(isinstance(size, int) and size < 0 for size in sizes):
        raise InvalidModel(f"Split of axis {axis} of {x.type} into {list(sizes)} for {count} outputs")
    if isinstance(total, int) and isinstance(extent, int) and total != extent:
        raise InvalidModel(f"Split of axis {axis} of {x.type} into {list(sizes)}, which make {total}")
    parts, start = [], 0  # type: tuple[list[Value], Dim]
    for size in sizes:
        parts.append(cut(b, x, {axis: (start, 1, size)}))
        start = start + size
    return tuple(parts)


def split_by(xp: Any, x: Any, split: Any, *, axis: int) -> Any:
    ends = [int(size) for size in xp.cumsum(split)]
    return tuple(xp.split(x, ends[:-1], axis=axis))


def cut(b: Builder, x: Value, spans: dict[int, tuple[Dim, int, Dim]]) -> Value:
    """The slice of x that takes (start, step, extent) along the axes named and everything along the others."""
    full = [spans.get(axis, (0, 1, extent)) for axis, extent in enumerate(x.shape)]
    starts, steps, extents = (tuple(part) for part in zip(*full, strict=True)) if full else ((), (), ())
    if all((start, step, extent) == (0, 1, whole) for start, step, extent, whole in zip(
        starts, steps, extents, x.shape, strict=True
    )):  # fmt: skip
        return x
    return b.emit(Slice(starts, steps, extents), x)


@operator("Slice", since=1)
def slice_1(
    b: Builder, x: Value, *, starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...] | None = None
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Slice.html (bounds as attributes)"""
    chosen = normal_axes(range(len(starts)) if axes is None else axes, x.rank)
    if not len(starts) == len(ends) == len(chosen):
        raise InvalidModel(f"Slice from {list(starts)} to {list(ends)} along {list(chosen)}")
    return cut(b, x, {a: span(s, e, 1, x.shape[a]) for a, s, e in zip(chosen, starts, ends, strict=True)})


@operator("Slice", since=10)
def slice_(
    b: Builder, x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Slice.html"""
    count = static_length(starts, "starts")
    chosen = list(range(count)) if axes is None else known_extents(axes)
    first, last = known_extents(starts), known_extents(ends)
    strides = [1] * count if steps is None else known_ints(steps)
    if chosen is None or first is None or last is None or strides is None:
        open_axes = range(x.rank) if chosen is None else normal_axes(chosen, x.rank)
        kind = fresh_at(b, x.type, open_axes)
        return emit_array(b, slice_by, lambda b, *_: kind, (x, starts, ends, axes, steps), {})[0]
    if not len(first) == len(last) == len(chosen) == len(strides):
        raise InvalidModel(f"Slice from {first} to {last} along {chosen} by {strides}")
    spans = {
        axis: span(start, end, step, x.shape[axis])
        for axis, start, end, step in zip(normal_axes(chosen, x.rank), first, last, strides, strict=True)
    }
    return cut(b, x, spans)


def slice_by(xp: Any, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    """Slices by bounds that only running tells."""
    index = [slice(None)] * x.ndim
    for i, start in enumerate(starts.ravel()):
        axis = int(axes.ravel()[i]) if axes is not None else i
        step = int(steps.ravel()[i]) if steps is not None else 1
        first, count = _whole_span(int(start), int(ends.ravel()[i]), step, x.shape[axis])
        stop = first + step * count
        index[axis] = slice(0, 0) if count == 0 else slice(first, None if stop < 0 else stop, step)
    return x[tuple(index)]


def span(start: Dim, end: Dim, step: int, extent: Dim) -> tuple[Dim, int, Dim]:
    """(first index, step, how many) of ONNX's start:end:step over an axis, first index and count not negative."""
    if step == 0:
        raise InvalidModel("Slice by steps of 0")
    if isinstance(start, int) and isinstance(end, int) and isinstance(extent, int):
        first, count = _whole_span(start, end, step, extent)
        return first, step, count
    if step > 0:
        first_, last = _clamped(start, extent, 0, extent), _clamped(end, extent, 0, extent)
        count_ = last - first_ if step == 1 else dims.ceil_div(last - first_, step)
        fits = first_ == 0 or last == extent
        return first_, step, count_ if fits else dims.maximum(0, count_)
    first_ = dims.minimum(_clamped(start, extent, 0, extent - 1), extent - 1)
    last = _clamped(end, extent, -1, extent - 1)
    fits = last == -1 or first_ == extent - 1
    count_ = first_ - last if step == -1 else dims.ceil_div(first_ - last, -step)
    return first_, step, count_ if fits else dims.maximum(0, count_)


def _whole_span(start: int, end: int, step: int, extent: int) -> tuple[int, int]:
    """(first index, how many); unlike Python's, a start before the axis counts as 0 when stepping backwards."""
    low, high = (0, extent) if step > 0 else (-1, extent - 1)
    first = min(max(start + extent if start < 0 else start, 0), high)
    last = min(max(end + extent if end < 0 else end, low), high)
    count = max(0, -((first - last) // step))
    return (first if count else 0), count


def _clamped(bound: Dim, extent: Dim, low: Dim, high: Dim) -> Dim:
    """A bound of a slice, counted from the end if it is negative, within [low, high]."""
    least, most = dims.bounds(bound)
    from_start = dims.minimum(bound, high) if not _is_huge(bound) else high
    if least is not None and least >= 0:
        return from_start
    from_end = dims.maximum(bound + extent, low) if not _is_huge(bound) else low
    if most is not None and most < 0:
        return from_end
    counts_forward = dims.maximum(0, dims.minimum(1, bound + 1))
    return counts_forward * from_start + (1 - counts_forward) * from_end


def _is_huge(bound: Dim) -> bool:
    """Whether the bound is so large that no axis reaches it, as exporters write "to the end"."""
    return isinstance(bound, int) and abs(bound) >= 10**9


@operator("Tile", since=6)
def tile(b: Builder, x: Value, repeats: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Tile.html"""
    times = known_extents(repeats)
    if times is None:
        return emit_array(b, tile_by, lambda b, x, repeats: fresh_type(b, x.type, x.rank), (x, repeats), {})[0]
    if len(times) != x.rank:
        raise InvalidModel(f"{len(times)} repeats for {x.type}")
    apart = tuple(extent for pair in zip([1] * x.rank, x.shape, strict=True) for extent in pair)
    wide = tuple(extent for pair in zip(times, x.shape, strict=True) for extent in pair)
    if wide == apart:
        return x
    joined = tuple(count * extent for count, extent in zip(times, x.shape, strict=True))
    return b.emit(Reshape(joined), b.emit(Expand(wide), b.emit(Reshape(apart), x)))


def tile_by(xp: Any, x: Any, repeats: Any) -> Any:
    times = tuple(int(count) for count in repeats.ravel())
    room(count * extent for count, extent in zip(times, x.shape, strict=True))
    return xp.tile(x, times)


@operator("Pad", since=2)
def pad_2(b: Builder, x: Value, *, pads: tuple[int, ...], mode: str = "constant", value: float = 0.0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Pad.html (pads as an attribute)"""
    return padded(b, x, pads, range(x.rank), mode, b.constant(x.dtype.type(value)))


@operator("Pad", since=11)
def pad(
    b: Builder,
    x: Value,
    pads: Value,
    constant_value: Value | None = None,
    axes: Value | None = None,
    *,
    mode: str = "constant",
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Pad.html"""
    amounts = known_extents(pads)
    chosen = list(range(x.rank)) if axes is None else known_extents(axes)
    if amounts is not None and chosen is not None:
        return padded(b, x, amounts, normal_axes(chosen, x.rank), mode, constant_value)
    open_axes = range(x.rank) if chosen is None else normal_axes(chosen, x.rank)
    kind = fresh_at(b, x.type, open_axes)
    operands = (x, pads, constant_value, axes)
    return emit_array(b, pad_by, lambda b, *_, **__: kind, operands, {"mode": mode})[0]


def padded(
    b: Builder, x: Value, pads: Sequence[Dim], axes: Sequence[int], mode: str, value: Value | None = None
) -> Value:
    """x with pads[i] before and pads[n + i] after axes[i], in one of ONNX's modes; negative pads crop."""
    if len(pads) != 2 * len(axes):
        raise InvalidModel(f"{len(pads)} pads for {len(axes)} axes of {x.type}")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise InvalidModel(f"Pad has no mode {mode!r}")
    if all(isinstance(amount, int) and amount == 0 for amount in pads):
        return x
    before, after = [0] * x.rank, [0] * x.rank  # type: tuple[list[Dim], list[Dim]]
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[len(axes) + i]
    operands = (x,) if value is None or mode != "constant" else (x, b.emit(Reshape(()), value))
    return b.emit(Pad(tuple(before), tuple(after), mode), *operands)


def pad_by(xp: Any, x: Any, pads: Any, value: Any = None, axes: Any = None, *, mode: str) -> Any:
    """Pads by amounts that only running tells."""
    amounts = [int(amount) for amount in pads.ravel()]
    chosen = range(x.ndim) if axes is None else [int(axis) % x.ndim for axis in axes.ravel()]
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(chosen):
        before[axis], after[axis] = amounts[i], amounts[len(amounts) // 2 + i]
    room(a + extent + b for a, extent, b in zip(before, x.shape, after, strict=True))
    operands = (x,) if value is None else (x, value)
    return Pad(tuple(before), tuple(after), mode).evaluate(xp, *operands)[0]
