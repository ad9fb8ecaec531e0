"""Resize and Upsample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.extents import room
from gpu_engine.frontend.registry import emit_array, normal_axis, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, TensorType, Value

LARGEST_DENOMINATOR = 1024
FULL = (0.0, 1.0)


@operator("Resize", since=10)
def resize_10(b: Builder, x: Value, scales: Value, *, mode: str = "nearest") -> Value:
    """https://onnx.ai/onnx/operators/onnx__Resize.html of opset 10"""
    op = ops.Resize(x.shape, (1.0,) * x.rank, mode, "asymmetric", "simple")
    return emit_resize(b, op, x, None, scales, None, range(x.rank), "stretch")


@operator("Resize", since=11)
def resize(
    b: Builder,
    x: Value,
    roi: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    axes: Sequence[int] = (),
    keep_aspect_ratio_policy: str = "stretch",
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Resize.html"""
    crops = coordinate_transformation_mode == "tf_crop_and_resize"
    op = ops.Resize(
        x.shape,
        (1.0,) * x.rank,
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(exclude_outside),
        bool(antialias) and mode != "nearest",
        extrapolation_value,
        (FULL,) * x.rank if crops else (),
    )
    chosen = [normal_axis(axis, x.rank) for axis in axes] or range(x.rank)
    return emit_resize(
        b, op, x, _given(roi) if crops else None, _given(scales), _given(sizes), chosen, keep_aspect_ratio_policy
    )


@operator("Upsample", since=9)
def upsample(b: Builder, x: Value, scales: Value, *, mode: str = "nearest") -> Value:
    """https://onnx.ai/onnx/operators/onnx__Upsample.html"""
    return resize_10(b, x, scales, mode=mode)


@operator("Upsample", since=7)
def upsample_7(b: Builder, x: Value, *, scales: Sequence[float], mode: str = "nearest") -> Value:
    """https://onnx.ai/onnx/operators/onnx__Upsample.html of opset 7"""
    return upsample(b, x, b.constant(np.array(scales, np.float32)), mode=mode)


def _given(value: Value | None) -> Value | None:
    """An empty tensor stands for an input that is absent."""
    return None if value is None or value.shape == (0,) else value


def emit_resize(
    b: Builder,
    op: ops.Resize,
    x: Value,
    roi: Value | None,
    scales: Value | None,
    sizes: Value | None,
    axes: Sequence[int],
    policy: str,
) -> Value:
    """`op` along `axes` by what the operands say; as a step that finds its own extents if they are known too late."""
    if (scales is None) == (sizes is None):
        raise InvalidModel("exactly one of scales and sizes must be given")
    late = [value for value in (roi, scales) if value is not None and value.constant is None]
    if not late and scales is not None:
        known = [float(scale) for scale in np.asarray(scales.constant).ravel()]
        return b.emit(_by_scales(op, x.shape, known, axes, _pairs(roi)), x)
    if not late and sizes is not None and sizes.known is not None:
        wanted: list[Dim] = [extent if sizes.symbolic else int(extent) for extent in sizes.known.ravel()]
        fixed = all(isinstance(extent, int) for extent in (*wanted, *(x.shape[axis] for axis in axes)))
        if fixed or policy == "stretch":
            return b.emit(_by_sizes(op, x.shape, wanted, axes, policy, _pairs(roi)), x)
    shape = tuple(b.fresh_dim() if axis in axes else extent for axis, extent in enumerate(x.shape))
    attributes = {"op": op, "axes": tuple(axes), "policy": policy}
    (result,) = emit_array(
        b, _resize_late, lambda *_, **__: TensorType(x.dtype, shape), (x, roi, scales, sizes), attributes
    )
    return result


def _resize_late(
    xp: Any, x: Any, roi: Any, scales: Any, sizes: Any, *, op: ops.Resize, axes: Sequence[int], policy: str
) -> Any:
    pairs = None if roi is None else [float(value) for value in roi]
    if scales is not None:
        found = _by_scales(op, x.shape, [float(scale) for scale in scales], axes, pairs)
    else:
        found = _by_sizes(op, x.shape, [int(extent) for extent in sizes], axes, policy, pairs)
    room(dims.number(extent) for extent in found.extents)
    return found.evaluate(xp, x)[0]


def _by_scales(
    op: ops.Resize, shape: Sequence[Dim], scales: Sequence[float], axes: Sequence[int], roi: Sequence[float] | None
) -> ops.Resize:
    chosen = _by_axis(scales, axes, "scales")
    if any(scale <= 0 for scale in scales):
        raise InvalidModel(f"scales {list(scales)} must be positive")
    extents = tuple(
        scaled_extent(extent, chosen[axis]) if axis in chosen else extent for axis, extent in enumerate(shape)
    )
    factors = tuple(chosen.get(axis, 1.0) for axis in range(len(shape)))
    return replace(op, extents=extents, scales=factors, roi=_crops(op, roi, axes))


def _by_sizes(
    op: ops.Resize,
    shape: Sequence[Dim],
    sizes: Sequence[Dim],
    axes: Sequence[int],
    policy: str,
    roi: Sequence[float] | None,
) -> ops.Resize:
    chosen = _by_axis(sizes, axes, "sizes")
    scales: dict[int, float | None] = dict.fromkeys(chosen)
    if policy != "stretch":
        scale, kept = _kept_ratio(shape, chosen, policy)
        chosen, scales = dict(kept), dict.fromkeys(chosen, scale)
    extents = tuple(chosen.get(axis, extent) for axis, extent in enumerate(shape))
    factors = tuple(scales.get(axis, 1.0) for axis in range(len(shape)))
    return replace(op, extents=extents, scales=factors, roi=_crops(op, roi, axes))


def _kept_ratio(shape: Sequence[Dim], sizes: Mapping[int, Dim], policy: str) -> tuple[float, dict[int, int]]:
    """The one scale that keep_aspect_ratio_policy picks, and the extents that it gives."""
    if policy not in ("not_larger", "not_smaller"):
        raise InvalidModel(f"keep_aspect_ratio_policy {policy!r} is not one of stretch, not_larger, not_smaller")
    inside = {axis: int(shape[axis]) for axis in sizes}  # type: ignore[arg-type]
    ratios = [int(size) / inside[axis] for axis, size in sizes.items()]  # type: ignore[arg-type]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return scale, {axis: int(scale * extent + 0.5) for axis, extent in inside.items()}


def scaled_extent(extent: Dim, scale: float) -> Dim:
    """floor(extent * scale) as float32 rounds the product; of a symbolic extent by the fraction that the scale stands
    for."""
    if isinstance(extent, int):
        return int(np.floor(np.float32(extent) * np.float32(scale)))
    fraction = Fraction(scale).limit_denominator(LARGEST_DENOMINATOR)
    if np.float32(float(fraction)) != np.float32(scale):
        fraction = Fraction(scale)
    return dims.floor_div(extent * fraction.numerator, fraction.denominator)


def _by_axis(values: Sequence[Any], axes: Sequence[int], what: str) -> dict[int, Any]:
    if len(values) != len(axes):
        raise InvalidModel(f"{len(values)} {what} for {len(axes)} axes")
    return dict(zip(axes, values, strict=True))


def _pairs(roi: Value | None) -> list[float] | None:
    return None if roi is None else [float(value) for value in np.asarray(roi.constant).ravel()]


def _crops(op: ops.Resize, roi: Sequence[float] | None, axes: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """(start, end) of every axis from ONNX's roi [starts..., ends...] over `axes`."""
    if roi is None:
        return op.roi
    if len(roi) != 2 * len(axes):
        raise InvalidModel(f"{len(roi)} elements of roi for {len(axes)} axes")
    found = dict(zip(axes, zip(roi, roi[len(axes) :], strict=False), strict=True))
    return tuple(found.get(axis, FULL) for axis in range(len(op.roi)))
