"""Weights of int8 whose products with unsigned bytes can be added in pairs of 16 bits: no pair of them saturates.

x86 multiplies 32 pairs of bytes in one instruction, which saturates where two weights beside each other are too great
together. Few are in real weights. What a pair has too much moves to a row of its own behind the others, which the same
element of the other factor multiplies once more: sums stay exact.
https://www.intel.com/content/www/us/en/docs/intrinsics-guide (vpmaddubsw)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 128
"""255 times the sum of a pair of weights, of magnitude up to this, fits int16."""
QUAD = 4
Bytes = NDArray[np.int8]


def split(weights: Bytes) -> tuple[Bytes, list[int]]:
    """weights [K, N] as [K' + E, N] and E numbers of rows: K' is K in whole quads, the rows behind it are multiplied
    with the elements of those numbers. No pair of rows from an even one on saturates; E comes in quads too."""
    missing = -weights.shape[0] % QUAD
    whole = np.pad(weights, ((0, missing), (0, 0))).astype(np.int64)
    over = _excess(whole)
    numbers = [int(pair) * 2 for pair in np.flatnonzero(over.any(axis=1))]
    whole[::2] -= over
    rows: list[Any] = []
    kept: list[int] = []
    for number in numbers:
        row = over[number // 2]
        if len(rows) % 2 and _excess(np.stack((rows[-1], row))).any():
            rows.append(np.zeros_like(row))
            kept.append(0)
        rows.append(row)
        kept.append(number)
    while len(rows) % QUAD:
        rows.append(np.zeros_like(whole[0]))
        kept.append(0)
    return np.concatenate((whole, np.reshape(rows, (-1, whole.shape[1])))).astype(np.int8), kept


def split_all(weights: Bytes) -> tuple[Bytes, NDArray[np.int32]]:
    """`split` of weights [D, K, N], as [D, K' + E, N] and [D, E] with the greatest E."""
    parts = [split(matrix) for matrix in weights]
    most = max((len(numbers) for _, numbers in parts), default=0)
    matrices = [np.pad(matrix, ((0, most - len(numbers)), (0, 0))) for matrix, numbers in parts]
    places = [numbers + [0] * (most - len(numbers)) for _, numbers in parts]
    return np.stack(matrices), np.array(places, np.int32).reshape(len(parts), most)


def _excess(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the first of every pair of rows must lose."""
    sums = rows[::2] + rows[1::2]
    return np.where(sums > LIMIT, sums - LIMIT, np.where(sums < -LIMIT, sums + LIMIT, 0))
