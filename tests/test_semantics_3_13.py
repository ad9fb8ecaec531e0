"""Section 3.13 of the specification: continuous batching. Ours needs no compiled sizes: nothing is stuck."""

from __future__ import annotations

import pytest

from gpu_engine.runtime.scheduler import Batcher
from tests.recording_device import MakeEngine, RecordingDevice, rows
from tests.test_scheduler import Item


@pytest.mark.parametrize(
    ("waiting", "batch", "sizes"),
    [
        (20, 8, [8, 8, 4]),
        (6, 8, [6]),
        (4, 8, [4]),
        (3, 8, [3]),
        (5, 4, [4, 1]),
        (3, 4, [3]),
        (23, 8, [8, 8, 7]),
    ],
)
def test_3_13_nothing_is_stuck(waiting: int, batch: int, sizes: list[int]) -> None:
    batcher: Batcher[Item] = Batcher()
    for i in range(waiting):
        batcher.add(Item(i, limit=batch))
    taken = []
    while (found := batcher.take(0.0)) is not None:
        taken.append(found.rows)
    assert taken == sizes


def test_3_13_the_longest_waiting_head_goes_first_whatever_fills_more() -> None:
    batcher: Batcher[Item] = Batcher()
    batcher.add(Item(0, key="lonely", arrival=0.0))
    for i in range(40):
        batcher.add(Item(i + 1, key="crowd", arrival=0.001))
    first = batcher.take(0.002)
    assert first is not None and [item.name for item, _, _ in first.parts] == [0]


def test_3_13_every_request_of_a_mixed_crowd_ends(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=4)
    futures = [engine.submit(rows(*range(1 + i % 7))) for i in range(60)]
    assert [len(future.result(30)) for future in futures] == [1 + i % 7 for i in range(60)]
