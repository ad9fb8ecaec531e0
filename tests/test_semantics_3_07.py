"""Section 3.7 of the specification: cores, streams and their shares. DeepSparse's argument names come with its door."""

from __future__ import annotations

from typing import Any

import pytest

import gpu_engine
from cpu_fallback.cores import partition, usable_cores
from gpu_engine.options import validated
from gpu_engine.runtime.sizing import choose
from tests.recording_device import MakeEngine, RecordingDevice, double
from tests.test_semantics_3_02 import CPU, GPU
from tests.test_semantics_3_03 import product_model


@pytest.mark.parametrize(
    ("count", "streams", "sizes"),
    [
        (16, 3, [6, 5, 5]),
        (16, 4, [4, 4, 4, 4]),
        (5, 4, [2, 1, 1, 1]),
        (1, 1, [1]),
        (2, 3, [1, 1, 1]),
        (1, 4, [1, 1, 1, 1]),
    ],
)
def test_3_07_partition(count: int, streams: int, sizes: list[int]) -> None:
    shares = partition(range(10, 10 + count), streams)
    assert [len(share) for share in shares] == sizes
    if streams <= count:
        assert [core for share in shares for core in share] == list(range(10, 10 + count))


def test_3_07_streams_beyond_the_cores_are_capped_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="num_streams exceeds num_cores - capping to 64"):
        assert choose(validated(streams=65), CPU).streams == 64
    assert choose(validated(streams=65), GPU).streams == 65


@pytest.mark.parametrize("name", ["streams", "threads"])
def test_3_07_negative_counts(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative"):
        validated(**{name: -3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "streams"), [({"streams": 9}, 3), ({"streams": 0}, 2), ({"streams": 2}, 2), ({}, 1)]
)
def test_3_07_what_is_read_back_is_in_effect(make_engine: MakeEngine, options: dict[str, Any], streams: int) -> None:
    recorder = RecordingDevice(double, stream_limit=3)
    if options.get("streams", 0) > 3:
        with pytest.warns(RuntimeWarning, match="num_streams exceeds num_cores - capping to 3"):
            engine = make_engine(recorder, **options)
    else:
        engine = make_engine(recorder, **options)
    assert engine.streams == engine.get_property("NUM_STREAMS") == streams
    assert recorder.opened is not None and recorder.opened[0] == streams


def test_3_07_cores_bound_streams_and_are_capped_with_a_warning(make_engine: MakeEngine) -> None:
    """INFERENCE_NUM_THREADS is DeepSparse's num_cores: min(physical, num_cores) streams."""
    with pytest.warns(RuntimeWarning, match="num_streams exceeds num_cores - capping to 2"):
        assert choose(validated(streams=5, all_threads=2), CPU).streams == 2
    assert choose(validated(streams=5, all_threads=2), GPU).streams == 5
    few = len(usable_cores().numbers)
    with pytest.warns(RuntimeWarning, match=f"threads exceeds the cores of a stream - capping to {few}"):
        engine = gpu_engine.compile(product_model(), device="cpu", streams=1, threads=few + 7, warmup=False)
    assert engine.get_property("INFERENCE_NUM_THREADS") == few
    engine.close()


def test_3_07_a_single_stream_is_one(make_engine: MakeEngine) -> None:
    assert make_engine(RecordingDevice(double), scheduler="single_stream", streams=5).streams == 1
