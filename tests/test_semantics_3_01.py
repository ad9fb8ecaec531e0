"""Section 3.1 of the specification: streams and slots; how many of each is in tests/test_semantics_3_02.py."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy as np
import pytest

import gpu_engine
from gpu_engine.options import AUTO, NUMA, validated
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.sizing import Limits, choose
from tests.recording_device import MakeEngine, RecordingDevice, double, occupy, plain, rows, until
from tests.test_semantics_3_03 import product_model


@pytest.mark.parametrize(
    ("asynchronous", "options", "slots", "batch", "requests"),
    [
        (True, {"streams": 2, "requests": 64}, 2, 16, 64),
        (False, {"streams": 2, "requests": 64}, 1, 8, 32),
        (True, {"streams": 2, "hint": "latency"}, 1, 1, 2),
        (False, {"streams": 2, "hint": "latency"}, 1, 1, 2),
    ],
)
def test_the_table(asynchronous: bool, options: dict[str, Any], slots: int, batch: int, requests: int) -> None:
    """The CPU's second slot is the queue: see the next test."""
    limits = Limits(auto_streams=2, asynchronous=asynchronous, batch=None if asynchronous else 8)
    sizes = choose(validated(**options), limits)
    assert (sizes.slots, sizes.batch.batch, sizes.optimal_requests) == (slots, batch, requests)


def test_a_stage_of_the_cpu_stays_open_until_its_stream_frees(make_engine: MakeEngine) -> None:
    """A deviation: what waits is the stage, and its inputs are gathered when the stream frees."""
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, plain(), streams=1, batch=4)
    occupied = occupy(engine, recorder, rows(0))
    later = []
    for i in range(1, 7):
        later.append(engine.submit(rows(i)))
        assert engine.statistics().waiting == i, "nothing is taken while the stream runs"
    recorder.release()
    concurrent.futures.wait([*occupied, *later], 30)
    assert [launch.rows for launch in recorder.launches] == [1, 4, 2]


def test_an_idle_stream_is_served_before_any_batch_fills(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, plain(), streams=2, batch=4)
    recorder.hold()
    futures = [engine.submit(rows(0))]
    recorder.wait_begun()
    futures.append(engine.submit(rows(1)))
    recorder.wait_begun()
    assert [(launch.stream, launch.rows) for launch in recorder.launches] in ([(0, 1), (1, 1)], [(1, 1), (0, 1)])
    until(lambda: engine.statistics().waiting == 0)
    recorder.release()
    concurrent.futures.wait(futures, 30)


def test_what_streams_may_be() -> None:
    cpu = Limits(auto_streams=3, numa_nodes=2, streams=6)
    wanted = {None: 1, 1: 1, 0: 3, AUTO: 3, "auto": 3, "AUTO": 3, NUMA: 2, "numa": 2, 6: 6}
    for streams, expected in wanted.items():
        assert choose(validated(streams=streams, requests=1), cpu).streams == expected
    for bad in (-3, -10):
        with pytest.raises(ValueError, match="streams must not be negative"):
            validated(streams=bad)
    with pytest.raises(TypeError, match="streams must be an integer, given bool"):
        validated(streams=True)


def test_streams_above_the_maximum() -> None:
    with pytest.warns(RuntimeWarning, match="capping to 6"):
        assert choose(validated(streams=9), Limits(auto_streams=2, streams=6)).streams == 6
    assert choose(validated(streams=9), Limits(auto_streams=2, asynchronous=True)).streams == 9


def test_weights_are_there_once_and_activations_for_every_slot() -> None:
    plans = []
    for streams in (1, 2):
        with gpu_engine.compile(product_model(), device="interpret", streams=streams, batch=2, warmup=False) as engine:
            assert isinstance(engine, Engine)
            plans.append(engine.memory_plan())
    assert plans[0].weights == plans[1].weights >= 40 * 40 * 4
    assert plans[1].activations == 2 * plans[0].activations and plans[1].slots == 2 * plans[0].slots
    assert plans[1].total - plans[0].total == plans[0].activations > 0


def test_requests_of_different_shapes_run_at_once(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, plain(), streams=2, batch=4, auto_batching=False)
    recorder.hold()
    futures = [engine.submit(rows(1)), engine.submit(rows(1, 2))]
    recorder.wait_begun(2)
    recorder.release()
    assert [len(future.result(30)) for future in futures] == [1, 2]
    np.testing.assert_array_equal(futures[1].result(), double(rows(1, 2))[0])
