"""Weights of convolutions packed the way their kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.conv_tiles import TileShape
from cpu_fallback.pages import PAGES
from cpu_fallback.winograd_transforms import transformed_weights

Floats = NDArray[np.float32]


def tile_weights(weights: Floats, group: int, shape: TileShape, *, planar: bool = False) -> Floats:
    """ONNX's [outputs, channels, kernel...]: for every group panels of as many vectors as they need, [depth, width]
    each. The depth goes as windows do: kernel then channels, or channels then kernel if `planar`."""
    outputs, channels, *kernel = weights.shape
    rank = len(kernel)
    parts = weights.reshape(group, outputs // group, channels, *kernel)
    order = (0, 2, *range(3, 3 + rank), 1) if planar else (0, *range(3, 3 + rank), 2, 1)
    matrices = parts.transpose(order).reshape(group, -1, outputs // group)
    return _joined([part for matrix in matrices for part in _panels(matrix, shape)])


def winograd_weights(weights: Floats, m: int, shape: TileShape) -> Floats:
    """For every panel all points, [channels, width] each."""
    points = [_panels(matrix, shape) for matrix in transformed_weights(weights, m)]
    return _joined([part for panel in zip(*points, strict=True) for part in panel])


def depthwise_weights(weights: Floats) -> Floats:
    """[taps, channels]."""
    return aligned(weights.reshape(weights.shape[0], -1).T)


def _panels(matrix: NDArray[Any], shape: TileShape) -> list[NDArray[Any]]:
    """[depth, outputs] cut into panels, the last one padded to whole vectors."""
    found = []
    for start in range(0, matrix.shape[1], shape.width):
        part = matrix[:, start : start + shape.width]
        width = shape.panel_width(part.shape[1])
        found.append(np.pad(part, ((0, 0), (0, width - part.shape[1]))))
    return found


def _joined(parts: Sequence[NDArray[Any]]) -> Floats:
    return aligned(np.concatenate([part.ravel() for part in parts]))


def aligned(array: NDArray[Any]) -> Floats:
    """A float32 copy that starts on a cache line, in large pages."""
    result: Floats = PAGES.zeros(array.shape, np.float32)
    result[...] = array
    return result
