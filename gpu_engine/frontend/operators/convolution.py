"""Convolution."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.frontend.windows import halves, per_axis, split_pads, windows
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Value


@operator("Conv", since=1)
def conv(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Conv.html"""
    kernel = kernel_extents(w, kernel_shape)
    found = windows(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    product = b.emit(ops.Conv(found.strides, found.before, found.after, found.dilations, group), x, w)
    return with_bias(b, product, bias)


@operator("ConvTranspose", since=1)
def conv_transpose(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    output_padding: Sequence[int] = (),
    output_shape: Sequence[int] = (),
    group: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ConvTranspose.html"""
    rank = x.rank - 2
    found = windows(x.shape[2:], kernel_extents(w, kernel_shape), strides, dilations)
    before, after = split_pads(pads, rank)
    extra: tuple[Dim, ...] = per_axis(output_padding, rank, "output_padding") if output_padding else (0,) * rank
    if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        full = [
            stride * (extent - 1) + padding + (kernel - 1) * dilation + 1
            for extent, stride, padding, kernel, dilation in zip(
                x.shape[2:], found.strides, extra, found.kernel, found.dilations, strict=True
            )
        ]
        wanted = _wanted_extents(x, found.strides, output_shape)
        before, after, extra = _cut(full, wanted, extra, more_after=auto_pad == "SAME_UPPER")
    op = ops.ConvTranspose(found.strides, before, after, found.dilations, extra, group)
    return with_bias(b, b.emit(op, x, w), bias)


def kernel_extents(w: Value, kernel_shape: Sequence[int]) -> tuple[Dim, ...]:
    """The kernel's extents as the weights or the node tell; InvalidModel if these contradict."""
    held = w.shape[2:]
    wrong = any(isinstance(extent, int) and extent != told for extent, told in zip(held, kernel_shape, strict=False))
    if kernel_shape and (wrong or len(held) != len(kernel_shape)):
        raise InvalidModel(f"kernel_shape {list(kernel_shape)} with weights {w.type}")
    return tuple(kernel_shape) or held


def with_bias(b: Builder, product: Value, bias: Value | None) -> Value:
    """product [N, M, spatial...] plus bias [M]."""
    if bias is None:
        return product
    return emit_map(b, lambda p, c: p + c, product, per_channel(b, bias, product.rank))


def per_channel(b: Builder, value: Value, rank: int) -> Value:
    """value [C] as [C, 1...], so that it broadcasts against [N, C, ...] of `rank` axes."""
    if value.rank != 1:
        raise InvalidModel(f"{value.type} has one element per channel and so one axis")
    return b.emit(ops.Reshape((value.shape[0], *(1,) * (rank - 2))), value)


def _wanted_extents(x: Value, strides: Sequence[int], output_shape: Sequence[int]) -> list[Dim]:
    spatial = x.shape[2:]
    if not output_shape:
        return [extent * stride for extent, stride in zip(spatial, strides, strict=True)]
    if len(output_shape) not in (len(spatial), x.rank):
        raise InvalidModel(f"output_shape {list(output_shape)} for {len(spatial)} spatial axes")
    return list(output_shape[-len(spatial) :])


def _cut(
    full: Sequence[Dim], wanted: Sequence[Dim], extra: Sequence[Dim], *, more_after: bool
) -> tuple[tuple[Dim, ...], tuple[Dim, ...], tuple[Dim, ...]]:
    """(before, after, output_padding) that take `full` extents to the `wanted` ones."""
    totals = [total - extent for total, extent in zip(full, wanted, strict=True)]
    before, after = halves([dims.maximum(total, 0) for total in totals], more_after=more_after)
    return before, after, tuple(padding + dims.maximum(-total, 0) for padding, total in zip(extra, totals, strict=True))
