"""Rearranging, cropping and decoding of images."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.frontend.extents import extents_of, told, unless_known, whole_numbers
from gpu_engine.frontend.registry import emit_array, normal_axis, operator
from gpu_engine.frontend.windows import per_axis, split_pads
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import UINT8
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.linear import window_count

CHANNELS = {"RGB": 3, "BGR": 3, "Grayscale": 1}


@operator("DepthToSpace", since=1)
def depth_to_space(b: Builder, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    """https://onnx.ai/onnx/operators/onnx__DepthToSpace.html"""
    n, c, h, w = _image_shape(x, blocksize)
    depth = _divided(c, blocksize * blocksize)
    split: tuple[Dim, ...] = (n, blocksize, blocksize, depth, h, w)
    perm = (0, 3, 4, 1, 5, 2)
    if mode == "CRD":
        split, perm = (n, depth, blocksize, blocksize, h, w), (0, 1, 4, 2, 5, 3)
    elif mode != "DCR":
        raise InvalidModel(f"mode {mode!r} is not DCR or CRD")
    moved = b.emit(ops.Transpose(perm), b.emit(ops.Reshape(split), x))
    return b.emit(ops.Reshape((n, depth, h * blocksize, w * blocksize)), moved)


@operator("SpaceToDepth", since=1)
def space_to_depth(b: Builder, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    """https://onnx.ai/onnx/operators/onnx__SpaceToDepth.html"""
    if mode not in ("DCR", "CRD"):
        raise InvalidModel(f"mode {mode!r} is not DCR or CRD")
    n, c, h, w = _image_shape(x, blocksize)
    h, w = _divided(h, blocksize), _divided(w, blocksize)
    split = b.emit(ops.Reshape((n, c, h, blocksize, w, blocksize)), x)
    moved = b.emit(ops.Transpose((0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)), split)
    return b.emit(ops.Reshape((n, c * blocksize * blocksize, h, w)), moved)


def _image_shape(x: Value, blocksize: int) -> tuple[Dim, ...]:
    if x.rank != 4 or blocksize < 1:
        raise InvalidModel(f"{x.type} in blocks of {blocksize} has the axes N, C, H and W")
    return x.shape


def _divided(extent: Dim, by: int) -> Dim:
    if isinstance(extent, int) and extent % by:
        raise InvalidModel(f"an extent of {extent} does not divide into {by}")
    return dims.floor_div(extent, by)


@operator("CenterCropPad", since=18)
def center_crop_pad(b: Builder, x: Value, shape: Value, *, axes: Sequence[int] = ()) -> Value:
    """https://onnx.ai/onnx/operators/onnx__CenterCropPad.html"""
    chosen = [normal_axis(axis, x.rank) for axis in axes] or list(range(x.rank))
    wanted = dict(zip(chosen, extents_of(b, shape, len(chosen)), strict=True))
    target = tuple(wanted.get(axis, extent) for axis, extent in enumerate(x.shape))
    if any(isinstance(extent, int) and extent < 0 for extent in target):
        raise InvalidModel(f"CenterCropPad to {list(target)}")
    if shape.known is None:
        (result,) = emit_array(
            b, _crop_or_pad, lambda *_, **__: TensorType(x.dtype, target), (x, shape), {"axes": tuple(chosen)}
        )
        return result
    kept = tuple(dims.minimum(extent, want) for extent, want in zip(x.shape, target, strict=True))
    starts = tuple(dims.floor_div(extent - keep, 2) for extent, keep in zip(x.shape, kept, strict=True))
    before = tuple(dims.floor_div(want - keep, 2) for want, keep in zip(target, kept, strict=True))
    after = tuple(want - keep - low for want, keep, low in zip(target, kept, before, strict=True))
    cropped = x if kept == x.shape else b.emit(ops.Slice(starts, (1,) * x.rank, kept), x)
    return cropped if kept == target else b.emit(ops.Pad(before, after), cropped)


def _crop_or_pad(xp: Any, x: Any, shape: Any, *, axes: Sequence[int]) -> Any:
    for axis, wanted in zip(axes, (int(extent) for extent in shape), strict=True):
        extent = x.shape[axis]
        if wanted < 0:
            raise ValueError(f"axis {axis} cannot have {wanted} elements")
        start = max(0, extent - wanted) // 2
        x = x[(slice(None),) * axis + (slice(start, start + wanted),)]
        missing = max(0, wanted - extent)
        pads = [(0, 0)] * x.ndim
        pads[axis] = (missing // 2, missing - missing // 2)
        x = xp.pad(x, pads)
    return x


@operator("Col2Im", since=18)
def col2im(
    b: Builder,
    x: Value,
    image_shape: Value,
    block_shape: Value,
    *,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Col2Im.html"""
    image, block = extents_of(b, image_shape), extents_of(b, block_shape)
    rank = len(image)
    before, after = split_pads(pads, rank)
    known = block_shape.known is not None
    channels = dims.floor_div(x.shape[1], dims.product(block)) if known else b.fresh_dim()
    attributes = {
        "windows": (per_axis(strides, rank, "strides"), per_axis(dilations, rank, "dilations"), before, after),
        "extents": (told(image_shape), told(block_shape)),
    }
    kind = TensorType(x.dtype, (x.shape[0], channels, *image))
    operands = (x, unless_known(image_shape), unless_known(block_shape))
    (result,) = emit_array(b, _col2im, lambda *_, **__: kind, operands, attributes)
    return result


def _col2im(xp: Any, x: Any, image_shape: Any, block_shape: Any, *, windows: Any, extents: Any) -> Any:
    image, block = (whole_numbers(*pair) or () for pair in zip(extents, (image_shape, block_shape), strict=True))
    strides, dilations, before, after = windows
    padded = [low + extent + high for low, extent, high in zip(before, image, after, strict=True)]
    counts = [
        int(window_count(extent, size, stride, 0, 0, dilation))  # type: ignore[arg-type]
        for extent, size, stride, dilation in zip(padded, block, strides, dilations, strict=True)
    ]
    taps = x.reshape(x.shape[0], x.shape[1] // int(np.prod(block)), *block, *counts)
    result = xp.zeros((*taps.shape[:2], *padded), x.dtype)
    for tap in np.ndindex(*block):
        place = tuple(
            slice(i * dilation, i * dilation + stride * (count - 1) + 1, stride)
            for i, dilation, stride, count in zip(tap, dilations, strides, counts, strict=True)
        )
        result[(slice(None), slice(None), *place)] += taps[(slice(None), slice(None), *tap)]
    inside = tuple(slice(low, low + extent) for low, extent in zip(before, image, strict=True))
    return result[(slice(None), slice(None), *inside)]


@operator("ImageDecoder", since=20)
def image_decoder(b: Builder, encoded: Value, *, pixel_format: str = "RGB") -> Value:
    """https://onnx.ai/onnx/operators/onnx__ImageDecoder.html; decodes with Pillow, on the host"""
    if pixel_format not in CHANNELS:
        raise InvalidModel(f"pixel_format {pixel_format!r} is not one of {', '.join(CHANNELS)}")
    if importlib.util.find_spec("PIL") is None:
        raise UnsupportedModel(f"{b.source}: ImageDecoder needs Pillow: pip install pillow")
    kind = TensorType(UINT8, (b.fresh_dim(), b.fresh_dim(), CHANNELS[pixel_format]))
    (result,) = emit_array(
        b, _decode_image, lambda *_, **__: kind, (encoded,), {"pixel_format": pixel_format}, host=True
    )
    return result


def _decode_image(xp: Any, encoded: Any, *, pixel_format: str) -> Any:
    # Pillow is an optional library whose import takes 50 ms
    pillow = importlib.import_module("PIL.Image")
    try:
        with pillow.open(io.BytesIO(np.asarray(encoded).tobytes())) as image:
            pixels = np.asarray(image.convert("L" if pixel_format == "Grayscale" else "RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError):
        return xp.zeros((0, 0, CHANNELS[pixel_format]), np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], CHANNELS[pixel_format])
    return pixels[:, :, ::-1] if pixel_format == "BGR" else pixels
