"""What an engine refuses or fails, and that it serves everybody else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import ExecutionError, InputError, OutOfMemory
from tests.recording_device import (
    F32,
    MakeEngine,
    RecordingDevice,
    double,
    occupy,
    plan_of,
    poisoned,
    rows,
)


def test_a_poisoned_request_fails_alone(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    engine = make_engine(recorder, streams=1, batch=8)
    first = occupy(engine, recorder, rows(0))
    futures = [engine.submit(rows(np.nan if i == 5 else i)) for i in range(8)]
    recorder.release()
    for i, future in enumerate(futures):
        if i == 5:
            with pytest.raises(ExecutionError, match="a NaN came in"):
                future.result(30)
        else:
            np.testing.assert_array_equal(future.result(30), rows(i) * 2 + 1)
    assert max(launch.rows for launch in recorder.launches) == 8
    counts = engine.statistics()
    assert (counts.failed, counts.retried) == (1, 3) and counts.inference_count == 7 + len(first)
    np.testing.assert_array_equal(engine.run(rows(1)), rows(1) * 2 + 1)


def test_an_error_on_the_callers_thread_leaves_the_engine_serving(
    recorder: RecordingDevice, make_engine: MakeEngine
) -> None:
    recorder.model = poisoned(double)
    engine = make_engine(recorder)
    for _ in range(3):
        with pytest.raises(ExecutionError):
            engine.run(rows(np.nan))
        np.testing.assert_array_equal(engine.run(rows(1)), rows(1) * 2 + 1)
    assert engine.statistics().failed == 3


def test_a_failing_part_fails_the_whole_request_once(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    engine = make_engine(recorder, streams=2, batch=2)
    x = rows(*range(40))
    x[7] = np.nan
    future, other = engine.submit(x), engine.submit(rows(3))
    with pytest.raises(ExecutionError):
        future.result(30)
    np.testing.assert_array_equal(other.result(30), rows(3) * 2 + 1)
    assert engine.statistics().failed == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((1, 4)), "float64"),
        (np.zeros((1, 5), F32), "axis 1"),
        (np.zeros(4, F32), "rank 1"),
        ({"X": rows(1)}, "did you mean 'x'"),
        ([], "list of 0"),
        ("text", "is a str"),
        (None, "NoneType"),
    ],
)
def test_bad_inputs_are_refused_before_admission(
    recorder: RecordingDevice, make_engine: MakeEngine, inputs: Any, message: str
) -> None:
    engine = make_engine(recorder, streams=2, requests=16)
    for call in (engine.run, engine.submit, engine.run_many, lambda x: list(engine.map([x]))):
        with pytest.raises(InputError, match=message):
            call(inputs)
    assert not recorder.launches
    np.testing.assert_array_equal(engine.run(rows(1)), rows(1) * 2 + 1)


def test_a_request_beyond_the_memory_is_refused_before_allocating(
    recorder: RecordingDevice, make_engine: MakeEngine
) -> None:
    recorder.row_nbytes, recorder.free_nbytes = 1 << 30, 64 << 30
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    engine = make_engine(recorder, plan, streams=1)
    with pytest.raises(OutOfMemory, match=r"an execution at N = 1, w = 100 needs 107,374,182,400 bytes"):
        engine.run(np.zeros((1, 100), F32))
    assert engine.run(np.zeros((1, 9), F32)).shape == (1, 9)
    unbatched = make_engine(recorder, hint="latency")
    with pytest.raises(OutOfMemory):
        unbatched.submit(rows(*range(100)))


def test_memory_limits_the_rows_of_each_shape(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.row_nbytes, recorder.free_nbytes = 1 << 20, 64 << 20
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    engine = make_engine(recorder, plan, streams=2, batch=8, memory_fraction=1)
    slots = 4 if recorder.asynchronous else 2
    assert engine.run(np.zeros((40, 8), F32)).shape == (40, 8)
    assert max(launch.rows for launch in recorder.launches) == 64 // (8 * slots)


def test_the_batch_is_limited_by_memory_at_compile_time(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.row_nbytes, recorder.free_nbytes = 1000, 13_000
    engine = make_engine(
        recorder, plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}), streams=1, batch=100, memory_fraction=1
    )
    slots = 2 if recorder.asynchronous else 1
    plan, memory = engine.explain_batching(), engine.memory_plan()
    assert (plan.batch, plan.limiting_factor) == (12 // slots, "memory")
    assert (memory.weights, memory.activations, memory.slots) == (1000, plan.batch * 1000 * slots, slots)
    assert memory.total == 13_000


def test_memory_running_out_halves_the_batch(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    def model(x: Any) -> list[Any]:
        if len(x) > 2:
            raise OutOfMemory("no room for more than 2 rows")
        return double(x)

    recorder.model = model
    engine = make_engine(recorder, streams=1, batch=8)
    results = list(engine.map(rows(i) for i in range(8)))
    np.testing.assert_array_equal(np.concatenate(results), rows(*range(8)) * 2 + 1)


def test_map_raises_at_the_place_of_the_error(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    engine = make_engine(recorder, streams=2, batch=2)
    for bad, error in ((rows(np.nan), ExecutionError), (np.zeros(3, F32), InputError)):
        results = engine.map([rows(1), rows(2), bad, rows(3)])
        assert [next(results)[0, 0], next(results)[0, 0]] == [3, 5]
        with pytest.raises(error):
            next(results)
        assert list(results) == []
    assert list(engine.map([])) == []
