"""The engine's calls over a recording device, with real threads."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import EngineClosed
from tests.recording_device import (
    MakeEngine,
    RecordingDevice,
    rows,
)


def test_the_same_kind_comes_back(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder)
    x = rows(1, 2)
    for result in (engine.run(x), engine.run([x])[0], engine.run((x,))[0], engine.run({"x": x})["y"]):
        np.testing.assert_array_equal(result, x * 2 + 1)
    assert type(engine.run((x,))) is list and type(engine.run({"x": x})) is dict
    np.testing.assert_array_equal(engine.run([[[1, 2, 3, 4]]])[0], [[3, 5, 7, 9]])


@pytest.mark.parametrize("call", ["run", "submit", "batched", "run_many", "map"])
def test_outputs_belong_to_the_caller(recorder: RecordingDevice, make_engine: MakeEngine, call: str) -> None:
    recorder.model = lambda x: [np.asfortranarray(x * 2 + 1)]
    engine = make_engine(recorder, streams=1, batch=4)
    x = rows(1, 2, 3)[:, ::-1]
    results = {
        "run": lambda: [engine.run(x)],
        "submit": lambda: [engine.submit(x).result()],
        "batched": lambda: [future.result() for future in [engine.submit(row[None]) for row in x]],
        "run_many": lambda: [engine.run_many(np.repeat(x, 5, axis=0))],
        "map": lambda: list(engine.map([x, x])),
    }[call]()
    engine.run(rows(9, 9, 9, 9))
    for result in results:
        assert result.flags.owndata and result.flags.writeable and result.flags.c_contiguous
        assert set(result.ravel()) <= {3.0, 5.0, 7.0}


def test_the_input_is_read_but_not_changed(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    x = rows(1, 2, 3, 4)[::2, ::-1]
    x.setflags(write=False)
    np.testing.assert_array_equal(make_engine(recorder).run(x), x * 2 + 1)


def test_a_caller_serves_itself_when_a_slot_is_idle(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, requests=16)
    for _ in range(10):
        engine.run(rows(1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-engine")]
    counts = engine.statistics()
    assert counts.served_by_callers == counts.execution_count == counts.inference_count == 10
    assert counts.close_reasons == {"idle": 10}


def test_map_keeps_the_order_and_reads_ahead_a_little(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=2)
    read: list[int] = []

    def source() -> Iterator[Any]:
        for i in range(100):
            read.append(i)
            yield rows(i)

    ahead = 0
    for i, result in enumerate(engine.map(source())):
        np.testing.assert_array_equal(result, rows(i) * 2 + 1)
        ahead = max(ahead, len(read) - i)
    assert len(read) == 100 and ahead <= 2 * engine.optimal_requests


def test_callbacks_may_use_the_engine(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=4)
    found: list[Any] = []
    done = threading.Event()

    def again(future: Any) -> None:
        found.append(engine.run(future.result())[0, 0])
        found.append(engine.run_many(rows(*range(9)))[8, 0])
        engine.submit(rows(5)).add_done_callback(lambda f: (found.append(f.result()[0, 0]), done.set()))

    recorder.hold()
    futures = [engine.submit(rows(1))]
    recorder.wait_begun()
    futures[0].add_done_callback(again)
    futures += [engine.submit(rows(i)) for i in range(6)]
    recorder.release()
    assert done.wait(30)
    assert found == [7, 17, 11]
    concurrent.futures.wait(futures, 30)


def test_a_thread_serves_each_slot_and_enters_its_stream(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=2, threads=3)
    engine.submit(rows(1)).result(30)
    slots = 4 if recorder.asynchronous else 2
    assert recorder.opened == (2, slots // 2, 3)
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("gpu-engine")}
    engine.close()
    assert len(names) == slots and set(recorder.entered) == names


def test_facts(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, requests=16)
    assert engine.device == "recording (a test)" and engine.input_names == ("x",) and engine.output_names == ("y",)
    assert [str(port) for port in (*engine.inputs, *engine.outputs)] == ["x: float32[N, 4]", "y: float32[N, 4]"]
    assert repr(engine) == "<Engine on recording: 2 streams, batch 4>"
    for _ in range(3):
        engine.run(rows(1, 2))
    counts = engine.statistics()
    assert (counts.inference_count, counts.execution_count, counts.mean_batch) == (6, 3, 2)
    assert counts.copy_in_ns > 0 and counts.compute_ns > 0 and counts.copy_out_ns > 0
    assert 0 < sum(counts.busy) <= 2 and engine.streams == 2


def test_nothing_runs_after_close(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=2)
    engine.close()
    for call in (engine.run, engine.submit, engine.run_many):
        with pytest.raises(EngineClosed):
            call(rows(1))
