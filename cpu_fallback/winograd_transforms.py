"""The transforms of Winograd convolutions F(m x m, 3 x 3): m is 2 or 4, at the points 0, 1, -1 (, 2, -2) and infinity.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", https://arxiv.org/abs/1509.09308.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.vector_math import Num

Row = Sequence[Num]
FILTERS = {
    2: np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
    4: np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
}


def transformed_weights(weights: NDArray[np.float32], m: int) -> NDArray[np.float64]:
    """[points, channels, outputs] of weights [outputs, channels, 3, 3]."""
    found = np.einsum("ih,ochw,jw->ijco", FILTERS[m], weights.astype(np.float64), FILTERS[m], optimize=True)
    points: NDArray[np.float64] = found.reshape((m + 2) ** 2, *found.shape[2:])
    return points


def points(m: int) -> int:
    return (m + 2) ** 2


def twice(once: Callable[[Row], Row], values: Sequence[Row]) -> list[Row]:
    """A one-dimensional transform of the columns, then of the rows."""
    columns = [once(column) for column in zip(*values, strict=True)]
    return [once(row) for row in zip(*columns, strict=True)]


def _forward2(d: Row) -> Row:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]]


def _forward4(d: Row) -> Row:
    even, odd = d[2].fma(-4, d[4]), d[1].fma(-4, d[3])
    far, near = d[4] - d[2], d[3] - d[1]
    first, last = d[0].fma(4, d[2].fma(-5, d[4])), d[1].fma(4, d[3].fma(-5, d[5]))
    return [first, even + odd, even - odd, near.fma(2, far), near.fma(-2, far), last]


def _backward2(v: Row) -> Row:
    return [v[0] + (v[1] + v[2]), (v[1] - v[2]) + v[3]]


def _backward4(v: Row) -> Row:
    even, odd, far, near = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    return [v[0] + even + far, near.fma(2, odd), far.fma(4, even), near.fma(8, odd) + v[5]]


FORWARD = {2: _forward2, 4: _forward4}
BACKWARD = {2: _backward2, 4: _backward4}
