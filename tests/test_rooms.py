"""Memory of large results that is used again: never while anybody can still see it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_engine.runtime.rooms import LEAST_NBYTES, Rooms

FLOAT, LARGE = np.dtype(np.float32), LEAST_NBYTES // 4


def place(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_what_died_is_used_again() -> None:
    rooms = Rooms()
    first = rooms.empty((4, LARGE), FLOAT)
    assert first.shape == (4, LARGE) and first.dtype == FLOAT and first.flags.writeable and first.flags.c_contiguous
    where = place(first)
    second = rooms.empty((4, LARGE), FLOAT)
    assert place(second) != where
    del first
    third = rooms.empty((3 * LARGE,), FLOAT)
    assert place(third) == where and place(second) != where


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[1:],
        lambda array: array.reshape(-1)[::2],
        lambda array: array.T,
        lambda array: array.view(np.int32)[0],
        lambda array: memoryview(array),
        lambda array: np.asarray(memoryview(array)[2:]),
        lambda array: np.from_dlpack(array),
        lambda array: array.base,
        lambda array: np.lib.stride_tricks.sliding_window_view(array, 2, axis=0),
    ],
)
def test_a_view_keeps_memory(view: object) -> None:
    rooms = Rooms()
    array = rooms.empty((4, LARGE), FLOAT)
    array[...] = 7
    where, kept = place(array), view(array)  # type: ignore[operator]
    del array
    gc.collect()
    others = [rooms.empty((4, LARGE), FLOAT) for _ in range(3)]
    assert where not in map(place, others)
    del kept
    gc.collect()
    assert place(rooms.empty((4, LARGE), FLOAT)) == where


def test_neither_too_small_nor_too_large() -> None:
    rooms = Rooms()
    large = rooms.empty((8, LARGE), FLOAT)
    where = place(large)
    del large
    assert place(rooms.empty((3, LARGE), FLOAT)) != where
    assert rooms.empty((10,), FLOAT).flags.owndata
    assert rooms.empty((LARGE,), np.dtype(object))[0] is None
    assert rooms.empty((LARGE, 0), FLOAT).size == 0


def test_little_is_kept_and_nothing_after_closing() -> None:
    rooms = Rooms()
    arrays = [rooms.empty((2, LARGE), FLOAT) for _ in range(5)]
    del arrays
    assert len(rooms._spares) == 2
    last = rooms.empty((2, LARGE), FLOAT)
    rooms.close()
    del last
    assert not rooms._spares
    assert rooms.empty((2, LARGE), FLOAT).shape == (2, LARGE)
