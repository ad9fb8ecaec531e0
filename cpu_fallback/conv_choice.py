"""Which algorithm a 3 x 3 convolution takes: an estimate of processor cycles."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from cpu_fallback.caches import caches
from cpu_fallback.conv_tiles import tile_shape
from cpu_fallback.native import Target
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.ops import Conv

TRANSFORM_CYCLES = {2: 90, 4: 280}
"""Of one image tile and one vector of channels, there and back; benchmarks/conv.py measures what follows from it."""
FAR_NBYTES = 8
"""Bytes a cycle of weights that the second cache cannot keep."""
SMALL, LARGE = 1, 512
"""What extents count that are not known: a batch, an image."""
GAIN = 0.9
"""Winograd must take less than this part of the time."""


def best_winograd(op: Conv, weights: Sequence[int], x: Sequence[Dim], out: Sequence[Dim], target: Target) -> int:
    """The m of F(m x m, 3 x 3) for `op` on x [N, H, W, C], 0 for none."""
    lanes = tile_shape(target).lanes
    fits = tuple(weights[2:]) == (3, 3) and op.group == 1 and min(weights[:2]) >= lanes
    if not fits or any(step != 1 for step in (*op.strides, *op.dilations)):
        return 0
    images = _typical(out[0], SMALL)
    height, width = (_typical(extent, LARGE) for extent in out[1:3])
    products = prod(weights[:2]) / (2 * lanes)
    costs = {0: images * height * width * 9 * products + _loading(9 * prod(weights[:2]))}
    for m, transform in TRANSFORM_CYCLES.items():
        tiles, points = images * -(-height // m) * -(-width // m), (m + 2) ** 2
        vectors = sum(-(-channels // lanes) for channels in weights[:2]) / 2
        costs[m] = tiles * (points * products + vectors * transform) + _loading(points * prod(weights[:2]))
    best = min(costs, key=lambda m: costs[m])
    return best if costs[best] < GAIN * costs[0] else 0


def _loading(elements: int) -> float:
    """Cycles to bring weights in that are not there."""
    return elements * 4 / FAR_NBYTES if elements * 4 > caches().l2 // 2 else 0.0


def _typical(extent: Dim, unknown: int) -> int:
    found = dims.substitute(extent, dict.fromkeys(dims.symbols(extent), unknown))
    return max(1, found) if isinstance(found, int) else unknown
