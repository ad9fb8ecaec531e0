"""How tensors are walked: element strides over the axes of a result, and neighbours among axes joined."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim

Shape = tuple[Dim, ...]
Axis = tuple[Dim, list[Dim]]


def contiguous_strides(shape: Shape) -> tuple[Dim, ...]:
    """Element strides of a C-contiguous array."""
    strides: list[Dim] = []
    step: Dim = 1
    for extent in reversed(shape):
        strides.append(step)
        step = step * extent
    return tuple(reversed(strides))


def broadcast_strides(own: Shape, shape: Shape) -> tuple[Dim, ...]:
    """Element strides of a contiguous operand of shape `own` over the axes of `shape`, 0 where it is broadcast."""
    padded = (1,) * (len(shape) - len(own)) + own
    return tuple(
        step if extent == full else dims.many(extent) * step
        for extent, full, step in zip(padded, shape, contiguous_strides(padded), strict=True)
    )


def collapsed(extents: Shape, strides: Sequence[Sequence[Dim]]) -> list[Axis]:
    """(extent, stride of every stream) of the axes that are left when neighbours that all walk alike are joined."""
    axes: list[Axis] = []
    for i, extent in enumerate(extents):
        if extent == 1:
            continue
        steps = [stream[i] for stream in strides]
        if axes and all(before == step * extent for before, step in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * extent, steps)
        else:
            axes.append((extent, steps))
    return axes
