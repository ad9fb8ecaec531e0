"""Resize and Upsample."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
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
    return resize_10(b, x, scales, mode=mode)  # type: ignore[no-any-return]


@operator("Upsample", since=7)
def upsample_7(b: Builder, x: Value, *, scales: Sequence[float], mode: str = "nearest") -> Value:
    """https://onnx.ai/onnx/operators/onnx__Upsample.html of opset 7"""
    return upsample(b, x, b.constant(np.array(scales, np.float32)), mode=mode)  # type: ignore[no-any-return]


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
    attributes = {"op": _Unresolved(op), "axes": tuple(axes), "policy": policy}
    (result,) = emit_array(
        b, _resize_late, lambda *_, **__: TensorType(x.dtype, shape), (x, roi, scales, sizes), attributes
    )
    return result


class _Unresolved:
    """A Resize whose extents are found when it runs."""

    def __init__(self, op: ops.Resize) -> None:
        self.op = op


def _resize_late(
    xp: Any, x: Any, roi: Any, scales: Any, sizes: Any, *, op: _Unresolved, axes: Sequence[int], policy: str
) -> Any:
    pairs = [float(value) for value in roi] if roi is not None else None
    if scales is not None:
        found = _by_scales(op.op, x.shape, [float(scale) for scale in scales], axes, pairs)
    else:
        found = _by_sizes(op.op, x.shape, [int(extent) for extent in sizes], axes, policy, pairs)
    return found.evaluate(xp, x)[0]
