"""Weights of convolutions packed the way their kernels read them."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.conv_tiles import TileShape
from cpu_fallback.native import host
from cpu_fallback.pages import PAGES
from cpu_fallback.weight_kernels import PanelKernel, WinogradPanelKernel, run_kernel
from cpu_fallback.winograd_transforms import points

Floats = NDArray[np.float32]

SAMPLES, LARGEST_RATIO = 4096, 2.0**12


def tile_weights(weights: Floats, group: int, shape: TileShape, *, planar: bool = False) -> Floats:
    """ONNX's [outputs, channels, kernel...]: for every group panels of as many vectors as they need, [depth, width]
    each. The depth goes as windows do: kernel then channels, or channels then kernel if `planar`."""
    outputs, channels, *kernel = weights.shape
    columns = outputs // group
    packed = PAGES.zeros((group * shape.panel_width(columns) * prod(weights.shape[1:]),), np.float32)
    source = np.ascontiguousarray(weights, np.float32)
    words = (source, packed, group, columns, channels, prod(kernel))
    run_kernel(PanelKernel(shape.lanes, shape.width, not planar), host(), *words)
    return packed


def is_balanced(weights: Floats) -> bool:
    """Whether no weight is so much larger than the others that its rounding errors drown them: transforms add up what
    an ordinary convolution multiplies with zeros."""
    sizes = np.abs(weights).ravel()
    sample = sizes[:: max(1, sizes.size // SAMPLES)]
    sample = sample[sample > 0]
    return bool(sizes.max(initial=0) <= LARGEST_RATIO * float(np.median(sample))) if sample.size else not sizes.any()


def winograd_weights(weights: Floats, m: int, shape: TileShape) -> Floats:
    """For every panel all points, [channels, width] each; transformed in float64."""
    outputs, channels = weights.shape[:2]
    packed = PAGES.zeros((points(m) * channels * shape.panel_width(outputs),), np.float32)
    words = (np.ascontiguousarray(weights, np.float32), packed, 1, outputs, channels)
    run_kernel(WinogradPanelKernel(m, shape.lanes, shape.width), host(), *words)
    return packed


def depthwise_weights(weights: Floats) -> Floats:
    """[taps, channels]."""
    return aligned(weights.reshape(weights.shape[0], -1).T)


def aligned(array: NDArray[Any]) -> Floats:
    """A float32 copy that starts on a cache line, in large pages."""
    result: Floats = PAGES.zeros(array.shape, np.float32)
    result[...] = array
    return result
