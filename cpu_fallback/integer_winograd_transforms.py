"""The transforms of Winograd convolutions F(m x m, 3 x 3) in whole numbers: those of `winograd_transforms`, scaled.

Weights take most of the scale, results what would not fit int16. A convolution of bytes less a zero point by weights
of int8 comes out SCALES[m] times too great.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.conv_tiles import TileShape
from cpu_fallback.conv_weights import aligned
from cpu_fallback.vector_math import Num

Row = Sequence[Num]
FILTERS = {
    2: np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]),
    4: np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 6]]),
}
SCALES = {2: 4, 4: 576}
NINTH = pow(9, -1, 2**32)
"""Modulo 2**32."""


def transformed_integers(weights: NDArray[np.int16], m: int) -> NDArray[np.float32]:
    """[points, channels, outputs] of weights [outputs, channels, 3, 3]; whole numbers that float32 holds."""
    outputs, channels = weights.shape[:2]
    taps = weights.reshape(outputs, channels, -1).transpose(2, 1, 0).astype(np.float32)
    found: NDArray[np.float32] = _matrix(m) @ taps.reshape(len(taps), -1)
    return found.reshape(-1, channels, outputs)


def _matrix(m: int) -> NDArray[np.float32]:
    """[points, 9]: a kernel's transform."""
    return np.kron(FILTERS[m], FILTERS[m]).astype(np.float32)


def packed_integers(weights: NDArray[np.int16], m: int, shape: TileShape) -> NDArray[np.float32]:
    """For every panel all points, [pairs of channels, width] each; a pair is the bits of a float32."""
    points = transformed_integers(weights, m).astype(np.int16)
    count, channels, outputs = points.shape
    apart = points.reshape(count, channels // 2, 2, outputs).transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(apart).view(np.float32)[..., 0]
    parts = []
    for start in range(0, outputs, shape.width):
        panel = pairs[..., start : start + shape.width]
        missing = shape.panel_width(panel.shape[-1]) - panel.shape[-1]
        parts.append(np.pad(panel, ((0, 0), (0, 0), (0, missing))).ravel())
    return aligned(np.concatenate(parts))


def fits(weights: NDArray[np.int16], m: int, greatest: int) -> bool:
    """Whether transformed weights fit int16 and results fit what is left of int32, for images of such magnitude."""
    magnitudes = np.abs(weights.reshape(len(weights), -1).astype(np.int32))
    totals = magnitudes.sum(axis=1, dtype=np.int64)
    small = int(magnitudes.max()) * np.abs(_matrix(m)).sum(axis=1).max() < 2**15
    small = small or np.abs(transformed_integers(weights, m)).max() < 2**15
    growth = {2: 4, 4: 100}[m]
    return small and growth * greatest < 2**15 and int(totals.max()) * greatest * _even(m) < 2**31


def _even(m: int) -> int:
    """The power of two in the scale."""
    return SCALES[m] & -SCALES[m]


def divided(x: Num, m: int) -> Num:
    """A result without its scale."""
    shift = _even(m).bit_length() - 1
    odd = x * NINTH if m == 4 else x
    return odd.shift("ashr", shift)


def _forward2(d: Row) -> Row:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]]


def _forward4(d: Row) -> Row:
    even, odd = d[4] - d[2].shift("shl", 2), d[3] - d[1].shift("shl", 2)
    far, near = d[4] - d[2], (d[3] - d[1]).shift("shl", 1)
    first = d[0].shift("shl", 2) - d[2].shift("shl", 2) - d[2] + d[4]
    last = d[1].shift("shl", 2) - d[3].shift("shl", 2) - d[3] + d[5]
    return [first, even + odd, even - odd, far + near, far - near, last]


def _backward2(v: Row) -> Row:
    return [v[0] + (v[1] + v[2]), (v[1] - v[2]) + v[3]]


def _backward4(v: Row) -> Row:
    even, odd, far, near = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    last = (near.shift("shl", 1) + v[5]).shift("shl", 2)
    return [v[0] + even + far, near.shift("shl", 1) + odd, far.shift("shl", 2) + even, last + odd]


FORWARD = {2: _forward2, 4: _forward4}
BACKWARD = {2: _backward2, 4: _backward4}
