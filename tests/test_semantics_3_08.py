"""Section 3.8 of the specification: the engine's calls, which DeepSparse's class will rest on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InputError
from tests.recording_device import F32, MakeEngine, RecordingDevice, double, plan_of, rows

TWO = plan_of({"x": (F32, ("N", 4)), "b": (F32, ("N", 4))}, {"y": (F32, ("N", 4)), "z": (F32, ("N", 4))})


@pytest.mark.parametrize("call", ["run", "run_many", "submit", "map"])
def test_3_08_a_list_gives_a_list_and_a_dict_gives_a_dict(
    recorder: RecordingDevice, make_engine: MakeEngine, call: str
) -> None:
    recorder.model = lambda x, b: [x + b, x - b]
    engine = make_engine(recorder, TWO, streams=1, batch=4)

    def called(inputs: Any) -> Any:
        if call == "map":
            return next(engine.map([inputs]))
        result = getattr(engine, call)(inputs)
        return result.result(30) if call == "submit" else result

    ordered, named = called([rows(3), rows(1)]), called({"b": rows(1), "x": rows(3)})
    assert type(ordered) is list and [array[0, 0] for array in ordered] == [4, 2]
    assert type(named) is dict and {name: array[0, 0] for name, array in named.items()} == {"y": 4, "z": 2}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a text", "takes 2 inputs"),
        ([rows(1)], "list of 1"),
        ([rows(1), rows(1, 2)], "axis 0"),
        ([rows(1), rows(1).astype(np.float64)], "float64.*astype"),
        ([rows(1), rows(1)[0]], "rank 1"),
        ({"x": rows(1), "c": rows(1)}, "no input 'c'"),
    ],
)
def test_3_08_bad_inputs_are_named(
    recorder: RecordingDevice, make_engine: MakeEngine, inputs: Any, message: str
) -> None:
    engine = make_engine(recorder, TWO, streams=1, batch=4)
    for call in (engine.run, engine.run_many, engine.submit, lambda x: next(engine.map([x]))):
        with pytest.raises(InputError, match=message) as found:
            call(inputs)
        assert isinstance(found.value, ValueError)
    assert not recorder.launches


def test_3_08_inputs_need_not_be_contiguous(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    """Ours: the reference refuses them."""
    x = np.asfortranarray(np.arange(40, dtype=F32).reshape(10, 4))[::2]
    assert not x.flags.c_contiguous
    np.testing.assert_array_equal(make_engine(recorder, streams=1).run(x), x * 2 + 1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_3_08_bulk_calls_cut_into_batches_and_trim_nothing(make_engine: MakeEngine, asynchronous: bool) -> None:
    """10 rows, batch 4: 4, 4, 2, in parallel, none of them padded."""
    recorder = RecordingDevice(double, asynchronous=asynchronous)
    engine = make_engine(recorder, streams=3, batch=4)
    recorder.hold()
    request = engine.request()
    request.start(rows(*range(10)))
    recorder.wait_begun(3)
    recorder.release()
    np.testing.assert_array_equal(request.wait(), rows(*range(10)) * 2 + 1)
    assert sorted(launch.rows for launch in recorder.launches) == [2, 4, 4]
    assert {launch.stream for launch in recorder.launches} == {0, 1, 2}
    recorder.launches.clear()
    np.testing.assert_array_equal(engine.run_many(rows(*range(10))), rows(*range(10)) * 2 + 1)
    assert sorted(launch.rows for launch in recorder.launches) == [2, 4, 4]
    assert engine.statistics().padded_rows == 0


@pytest.mark.parametrize(("count", "padded"), [(10, 0), (11, 1), (9, 0), (15, 1)])
def test_3_08_the_last_part_is_padded_only_to_its_bucket(make_engine: MakeEngine, count: int, padded: int) -> None:
    recorder = RecordingDevice(double, asynchronous=True, bucketed=True)
    engine = make_engine(recorder, streams=2, batch=4)
    np.testing.assert_array_equal(engine.run_many(rows(*range(count))), rows(*range(count)) * 2 + 1)
    whole, rest = divmod(count, 4)
    assert sorted(launch.rows for launch in recorder.launches) == sorted([4] * whole + [rest + padded])
    assert engine.statistics().padded_rows == padded


def test_3_08_run_is_timed(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    """What timed_run gives is in the statistics, and on a request object per run."""
    engine = make_engine(recorder, streams=1)
    request = engine.request()
    outputs = request.run([rows(1)])
    assert outputs[0][0, 0] == 3 and request.latency_ms > 0
    assert engine.statistics().compute_ns > 0
