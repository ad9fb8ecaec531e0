"""The attributes that convolutions and pools share: kernel_shape, strides, dilations, pads and auto_pad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim


@dataclass(frozen=True)
class Windows:
    """Windows over spatial axes, every attribute spelled out for every axis."""

    kernel: tuple[Dim, ...]
    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]


def windows(
    spatial: Sequence[Dim],
    kernel: Sequence[Dim],
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
) -> Windows:
    """The windows of `kernel` elements over axes of the extents `spatial`; InvalidModel where lengths disagree."""
    rank = len(spatial)
    if len(kernel) != rank:
        raise InvalidModel(f"kernel_shape {list(kernel)} for {rank} spatial axes")
    steps, apart = per_axis(strides, rank, "strides"), per_axis(dilations, rank, "dilations")
    if any(isinstance(size, int) and size < 1 for size in (*kernel, *steps, *apart)):
        raise InvalidModel(f"kernel_shape {list(kernel)}, strides {steps} and dilations {apart} must be positive")
    covered = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, apart, strict=True)]
    if auto_pad in ("NOTSET", ""):
        before, after = split_pads(pads, rank)
    elif auto_pad == "VALID":
        before, after = (0,) * rank, (0,) * rank
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [_same_padding(*axis) for axis in zip(spatial, covered, steps, strict=True)]
        before, after = halves(totals, more_after=auto_pad == "SAME_UPPER")
    else:
        raise InvalidModel(f"auto_pad {auto_pad!r} is not one of NOTSET, VALID, SAME_UPPER, SAME_LOWER")
    return Windows(tuple(kernel), steps, before, after, apart)


def per_axis(given: Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    """`given`, or 1 for every axis if it is empty."""
    if given and len(given) != rank:
        raise InvalidModel(f"{name} {list(given)} for {rank} spatial axes")
    return tuple(given) or (1,) * rank


def split_pads(pads: Sequence[int], rank: int) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """ONNX's pads [begins..., ends...] as (before, after); no pads are zeros."""
    if pads and len(pads) != 2 * rank:
        raise InvalidModel(f"pads {list(pads)} for {rank} spatial axes")
    return (tuple(pads[:rank]), tuple(pads[rank:])) if pads else ((0,) * rank, (0,) * rank)


def halves(totals: Sequence[Dim], *, more_after: bool) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Every total as two halves, of which the later or the earlier is the greater."""
    small = tuple(dims.floor_div(total, 2) for total in totals)
    large = tuple(total - half for total, half in zip(totals, small, strict=True))
    return (small, large) if more_after else (large, small)


def _same_padding(extent: Dim, covered: Dim, stride: int) -> Dim:
    """What makes ceil(extent / stride) windows of `covered` elements fit: never negative where covered >= stride."""
    total = (dims.ceil_div(extent, stride) - 1) * stride + covered - extent
    if isinstance(total, dims.Sym) and isinstance(covered, int) and covered >= stride:
        return total
    return dims.maximum(total, 0)
