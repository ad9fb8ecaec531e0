"""The transforms of Winograd convolutions F(m x m, 3 x 3): m is 2 or 4.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", https://arxiv.org/abs/1509.09308. F(4 x 4) takes
the points 0, +-sqrt(1/2), +-sqrt(2) and infinity, pairs of reciprocals as Alam, Anderson, Barabasz and Gregg propose,
"Winograd Convolution for Deep Neural Networks: Efficient Point Selection", https://doi.org/10.1145/3524069: errors are
half of those at 0, +-1, +-2, and the largest a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cpu_fallback.vector_math import Num

Row = Sequence[Num]
LOW, HIGH = 0.5**0.5, 2**0.5
FILTERS = {
    2: np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
    4: np.array(
        [
            [1, 0, 0],
            *([-LOW / 1.5, -sign * LOW**2 / 1.5, -(LOW**3) / 1.5] for sign in (1, -1)),
            *([HIGH / 6, sign * HIGH**2 / 6, HIGH**3 / 6] for sign in (1, -1)),
            [0, 0, 1],
        ]
    ),
}


def points(m: int) -> int:
    return (m + 2) ** 2


def twice(once: Callable[[Row], Row], values: Sequence[Row]) -> list[Row]:
    """A one-dimensional transform of the columns, then of the rows."""
    columns = [once(column) for column in zip(*values, strict=True)]
    return [once(row) for row in zip(*columns, strict=True)]


def _forward2(d: Row) -> Row:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]]


def _forward4(d: Row) -> Row:
    even, odd = d[2].fma(-2, d[4]), d[1].fma(-2, d[3])
    far, near = d[2].fma(-0.5, d[4]), d[1].fma(-0.5, d[3])
    first, last = d[2].fma(-2.5, d[0] + d[4]), d[3].fma(-2.5, d[1] + d[5])
    return [first, odd.fma(LOW, even), odd.fma(-LOW, even), near.fma(HIGH, far), near.fma(-HIGH, far), last]


def _backward2(v: Row) -> Row:
    return [v[0] + (v[1] + v[2]), (v[1] - v[2]) + v[3]]


def _backward4(v: Row) -> Row:
    even, odd, far, near = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    return [
        far.fma(LOW, even.fma(HIGH, v[0])),
        odd + near,
        far.fma(HIGH, even * LOW),
        near.fma(2, odd.fma(0.5, v[5])),
    ]


FORWARD = {2: _forward2, 4: _forward4}
BACKWARD = {2: _backward2, 4: _backward4}
