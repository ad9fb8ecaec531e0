"""Which algorithm a 3 x 3 convolution of int16 takes: an estimate of processor cycles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpu_fallback.caches import caches
from cpu_fallback.conv_tiles import tile_shape
from cpu_fallback.integer_images import CENTRED
from cpu_fallback.integer_winograd_transforms import fits
from cpu_fallback.native import Target
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.ops import Conv

PRODUCTS = 3
"""Products of a lane in a cycle: three instructions make two pairs."""
TRANSFORM_CYCLES = {2: (25, 40), 4: (80, 150)}
"""Of one image tile: of a vector of int16 there, of a vector of int32 back; benchmarks/integer_conv.py measures what
follows from it."""
FAR_NBYTES = 5
"""Bytes a cycle of weights that the second cache cannot keep."""
SMALL, LARGE = 1, 512
"""What extents count that are not known: a batch, an image."""
GAIN = 0.95
"""Winograd must take less than this part of the time."""


def best_integer_winograd(op: Conv, weights: Any, x: Sequence[Dim], out: Sequence[Dim], target: Target) -> int:
    """The m of F(m x m, 3 x 3) for `op` on x [N, H, W, C], 0 for none; `weights` are ONNX's."""
    lanes = tile_shape(target).lanes
    outputs, channels, *kernel = weights.shape
    suits = kernel == [3, 3] and op.group == 1 and outputs >= lanes and channels >= 2 * lanes
    if not suits or any(step != 1 for step in (*op.strides, *op.dilations)):
        return 0
    images = _typical(out[0], SMALL)
    height, width = (_typical(extent, LARGE) for extent in out[1:3])
    products = outputs * channels / (PRODUCTS * lanes)
    costs = {0: images * height * width * 9 * products + _loading(9 * outputs * channels)}
    for m, (there, back) in TRANSFORM_CYCLES.items():
        tiles, points = images * -(-height // m) * -(-width // m), (m + 2) ** 2
        transform = -(-channels // (2 * lanes)) * there + -(-outputs // lanes) * back
        costs[m] = tiles * (points * products + transform) + _loading(points * outputs * channels)
    good = [m for m, cost in costs.items() if not m or cost < GAIN * costs[0]]
    return next(m for m in sorted(good, key=lambda m: costs[m]) if not m or fits(weights, m, CENTRED))


def _loading(elements: int) -> float:
    """Cycles to bring weights in that are not there."""
    return elements * 2 / FAR_NBYTES if elements * 2 > caches().l2 // 2 else 0.0


def _typical(extent: Dim, unknown: int) -> int:
    found = dims.substitute(extent, dict.fromkeys(dims.symbols(extent), unknown))
    return max(1, found) if isinstance(found, int) else unknown
