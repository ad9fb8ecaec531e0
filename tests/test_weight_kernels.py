"""Weights as kernels read them: packed natively, and element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback import tiles
from cpu_fallback.conv_tiles import TileShape
from cpu_fallback.conv_weights import tile_weights, winograd_weights
from cpu_fallback.packing import pack_panels, panel_widths
from cpu_fallback.winograd_transforms import FILTERS

Array = NDArray[Any]
SHAPES = st.sampled_from([TileShape(6, 3, 2, 8), TileShape(14, 7, 2, 16), TileShape(6, 3, 2, 4), TileShape(4, 2, 3, 4)])
VIEWS = ("rows", "columns", "one element", "reversed")


def numbers(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return (9 * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


def panels_of(matrix: Array, shape: TileShape) -> list[Array]:
    """[..., outputs] cut into panels, the last one filled up with zeros."""
    cut = [matrix[..., start : start + shape.width] for start in range(0, matrix.shape[-1], shape.width)]
    return [
        np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, shape.panel_width(part.shape[-1]) - part.shape[-1])])
        for part in cut
    ]


@settings(max_examples=60)
@given(
    SHAPES, st.integers(1, 3), st.integers(1, 40), st.integers(1, 9),
    st.sampled_from([(), (1,), (3,), (1, 1), (3, 2), (2, 1, 3)]), st.booleans(),
)  # fmt: skip
def test_tiles(
    shape: TileShape, group: int, columns: int, channels: int, kernel: tuple[int, ...], planar: bool
) -> None:  # fmt: skip
    weights = numbers((group * columns, channels, *kernel))
    expected = []
    for part in weights.reshape(group, columns, channels, -1):
        depth = part if planar else part.swapaxes(1, 2)
        expected += [panel.ravel() for panel in panels_of(depth.reshape(columns, -1).T, shape)]
    found = tile_weights(weights, group, shape, planar=planar)
    np.testing.assert_array_equal(found, np.concatenate(expected))
    np.testing.assert_array_equal(tile_weights(weights[:, ::-1], group, shape, planar=planar).shape, found.shape)


@settings(max_examples=40)
@given(SHAPES, st.sampled_from([2, 4]), st.integers(1, 40), st.integers(1, 20))
def test_transformed_filters(shape: TileShape, m: int, outputs: int, channels: int) -> None:
    weights = numbers((outputs, channels, 3, 3))
    points = np.einsum("ih,ochw,jw->ijco", FILTERS[m], weights.astype(np.float64), FILTERS[m])
    expected = [panel.ravel() for panel in panels_of(points.reshape(-1, channels, outputs), shape)]
    found = winograd_weights(weights, m, shape)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=2e-7, atol=1e-7)


def viewed(matrix: Array, view: str) -> Array:
    """The same extents, differently in memory."""
    match view:
        case "columns":
            return np.ascontiguousarray(matrix.swapaxes(-1, -2)).swapaxes(-1, -2)
        case "one element":
            return np.broadcast_to(matrix.dtype.type(7), matrix.shape)
        case "reversed":
            return matrix[..., ::-1]
    return matrix


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float64])
@pytest.mark.parametrize("view", VIEWS)
@settings(max_examples=40)
@given(
    st.sampled_from([(2, 8), (3, 8), (4, 4), (2, 16)]),
    st.tuples(st.integers(0, 40), st.integers(0, 70)),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
)
def test_panels(view: str, dtype: Any, tile: tuple[int, int], extents: tuple[int, int], lead: tuple[int, ...]) -> None:
    scalar = {np.float32: "float", np.int32: "i32", np.float64: "double"}[dtype]
    shape = tiles.TileShape(6, *tile, scalar)
    b = viewed(numbers((*lead, *extents), dtype), view)
    expected, start = [], 0
    for width in panel_widths(extents[1], shape):
        part = b[..., start : start + width * shape.lanes]
        padded = np.pad(part, [(0, 0)] * (b.ndim - 1) + [(0, width * shape.lanes - part.shape[-1])])
        expected.append(padded.reshape(*lead, -1))
        start += width * shape.lanes
    found = pack_panels(b, shape, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.concatenate([np.zeros((*lead, 0), dtype), *expected], -1))
