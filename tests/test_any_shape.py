"""A new batch size binds: nothing compiles and no pass runs. The witness is the benchmark's."""

from __future__ import annotations

import numpy as np

from benchmarks.binding import WATCHED, count_work, time_binding
from gpu_engine.tools.demo import load_digits

FEEDS = [{"images": np.zeros((rows, 1, 8, 8), np.float32)} for rows in range(1, 21)]


def test_unseen_batches_compile_nothing() -> None:
    compiling, running = count_work(load_digits().model, FEEDS)
    assert all(compiling[kind] > 0 for kind in WATCHED.values()), compiling
    assert running.total() == 0, running


def test_binding_is_timed_per_shape() -> None:
    timing = time_binding(load_digits().model, FEEDS)
    assert len(timing.seconds) == len(FEEDS) and min(timing.seconds) > 0 and timing.steps > 0
