"""Section 3.10 of the specification: request objects and their states."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from gpu_engine import RequestState
from gpu_engine.errors import EngineClosed, ExecutionError, InputError, QueueFull, RequestBusy, RequestCancelled
from gpu_engine.runtime.reusable import ReusableRequest
from tests.recording_device import F32, MakeEngine, RecordingDevice, double, occupy, plan_of, poisoned, rows, until

IDLE, BUSY, CANCELLED, STOP = RequestState.IDLE, RequestState.BUSY, RequestState.CANCELLED, RequestState.STOP


def test_3_10_idle_busy_idle(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    assert request.state is IDLE and request.wait() is None and repr(request) == "<ReusableRequest: IDLE>"
    recorder.hold()
    request.start(rows(1), userdata="mine")
    assert request.state is BUSY and not request.wait_for(0) and not request.wait_for(1)
    recorder.release()
    np.testing.assert_array_equal(request.wait(), rows(3))
    assert request.state is IDLE and request.wait_for(0) and request.userdata == "mine"
    np.testing.assert_array_equal(request.wait(), rows(3))
    np.testing.assert_array_equal(request.run(rows(2)), rows(5))
    with pytest.raises(ValueError, match="milliseconds"):
        request.wait_for(-1)


def test_3_10_busy_errors(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    recorder.hold()
    request.start(rows(1))
    for call in (
        lambda: request.set_tensor("x", rows(1)),
        lambda: request.start(rows(1)),
        lambda: request.run(rows(1)),
        lambda: request.profiling_info,
        lambda: request.latency_ms,
        lambda: request.get_tensor("y"),
        lambda: request.outputs,
        lambda: request.set_callback(None),
    ):
        with pytest.raises(RequestBusy, match="runs"):
            call()
    recorder.release()
    request.wait()


def test_3_10_tensors(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = lambda x, b: [x + b, x - b]
    ports = {"x": (F32, ("N", 4)), "b": (F32, ("N", 4))}, {"y": (F32, ("N", 4)), "z": (F32, ("N", 4))}
    request = make_engine(recorder, plan_of(*ports), streams=1).request()
    request.set_tensor("x", rows(5))
    with pytest.raises(InputError, match="missing input 'b'"):
        request.start()
    assert request.state is IDLE
    request.set_tensor("b", rows(2))
    request.start()
    assert sorted(request.wait()) == ["y", "z"]
    np.testing.assert_array_equal(request.get_tensor("z"), rows(3))
    np.testing.assert_array_equal(request.get_tensor("x"), rows(5))
    request.run([rows(1), rows(1)])
    np.testing.assert_array_equal(request.get_tensor("z"), rows(0))
    request.set_tensor("b", rows(3))
    np.testing.assert_array_equal(request.run()["y"], rows(4))
    for call in (lambda: request.set_tensor("xx", rows(1)), lambda: request.get_tensor("yy")):
        with pytest.raises(InputError, match="did you mean"):
            call()


def test_3_10_times(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    occupy(engine, recorder, rows(0))
    request = engine.request()
    request.start(rows(1))
    threading.Event().wait(0.05)
    recorder.release()
    request.wait()
    info = request.profiling_info
    assert 40e6 < info["queue_ns"] < 30e9 and 0 < info["run_ns"] < 30e9
    assert request.latency_ms == pytest.approx(sum(info.values()) / 1e6)


def test_3_10_cancel_idle_is_nothing(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    assert not request.cancel() and request.state is IDLE
    request.run(rows(1))
    assert not request.cancel() and request.state is IDLE and request.wait()[0, 0] == 3


def test_3_10_cancelled_in_the_queue(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    occupy(engine, recorder, rows(0))
    request = engine.request()
    called: list[Any] = []
    request.set_callback(lambda each, userdata: called.append((each.error, each.state, userdata)))
    for _ in range(2):
        request.start(rows(1), 7)
        assert request.cancel() and request.state is CANCELLED
        with pytest.raises(RequestCancelled):
            request.wait()
        assert request.wait() is None, "Cancelled is raised once"
    assert [(type(error), state, userdata) for error, state, userdata in called] == [(RequestCancelled, BUSY, 7)] * 2
    request.start(rows(4))
    recorder.release()
    assert request.wait()[0, 0] == 9 and request.state is IDLE
    assert engine.statistics().cancelled == 2


def test_3_10_cancelled_when_dispatched_runs_and_its_result_is_dropped(
    recorder: RecordingDevice, make_engine: MakeEngine
) -> None:
    request = make_engine(recorder, streams=1).request()
    recorder.hold()
    request.start(rows(1))
    recorder.wait_begun()
    assert not request.cancel() and request.state is BUSY
    recorder.release()
    with pytest.raises(RequestCancelled):
        request.wait()
    assert request.state is CANCELLED and request.outputs is None
    assert request.run(rows(2))[0, 0] == 5


def test_3_10_cancel_in_the_callback_comes_too_late(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    """The result is there, so neither the callback nor another thread can take the request out of the queue."""
    request = make_engine(recorder, streams=1).request()
    found: list[bool] = []

    def callback(each: ReusableRequest, userdata: Any) -> None:
        other = threading.Thread(target=lambda: found.append(each.cancel()))
        other.start()
        other.join(30)
        found.append(each.cancel())

    request.set_callback(callback)
    for value in (1, 2):
        assert request.run(rows(value))[0, 0] == 2 * value + 1
        assert request.state is IDLE and found == [False, False]
        found.clear()


def test_3_10_cancel_in_every_other_state_is_nothing(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    occupy(engine, recorder, rows(0))
    request = engine.request()
    request.start(rows(1))
    assert request.cancel() and not request.cancel() and request.state is CANCELLED and request.wait_for(0)
    request.close()
    assert request.state is STOP and not request.cancel() and request.state is STOP
    with pytest.raises(RequestCancelled):
        request.wait()
    assert request.wait() is None
    recorder.release()


def test_3_10_errors_stay_until_the_next_start(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    request = make_engine(recorder, streams=1).request()
    request.start(rows(np.nan))
    for _ in range(2):
        with pytest.raises(ExecutionError, match="NaN"):
            request.wait()
    assert isinstance(request.error, ExecutionError) and request.outputs is None
    assert request.run(rows(1))[0, 0] == 3 and request.error is None


def test_3_10_a_refused_start_changes_nothing(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    called: list[Any] = []
    request.run(rows(1))
    request.set_callback(lambda *given: called.append(given))
    with pytest.raises(InputError):
        request.start(np.zeros(3, F32))
    assert request.state is IDLE and request.outputs[0, 0] == 3 and request.error is None and not called


def test_3_10_the_callback_runs_before_the_request_is_idle(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    found: list[Any] = []

    def callback(each: ReusableRequest, userdata: Any) -> None:
        found.append((each.state, userdata, each.outputs[0, 0], each.wait()[0, 0], each.get_tensor("y")[0, 0]))
        found.append(each.latency_ms > 0)
        with pytest.raises(RequestBusy):
            each.start(rows(1))

    request.set_callback(callback)
    request.start(rows(1), "data")
    request.wait()
    assert found == [(BUSY, "data", 3, 3, 3), True] and request.state is IDLE


def test_3_10_an_exception_in_the_callback_replaces_the_result(
    recorder: RecordingDevice, make_engine: MakeEngine
) -> None:
    recorder.model = poisoned(double)
    request = make_engine(recorder, streams=1).request()
    request.set_callback(lambda *_: 1 / 0)
    for value in (1, np.nan):
        request.start(rows(value))
        with pytest.raises(ZeroDivisionError):
            request.wait()
        assert request.outputs is None
    request.set_callback(None)
    assert request.run(rows(1))[0, 0] == 3


def test_3_10_a_callback_may_wait_for_another_request_of_its_batch(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, streams=1, batch=2)
    occupy(engine, recorder, rows(0))
    first, second = engine.request(), engine.request()
    future = engine.submit(rows(3))
    found: list[Any] = []
    first.set_callback(lambda *_: found.append((second.wait()[0, 0], engine.run(rows(4))[0, 0], future.result()[0, 0])))
    for request in (first, second):
        request.start(rows(2))
    recorder.release()
    first.wait()
    assert found == [(5, 9, 7)]


def test_3_10_stop_when_closed(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    occupy(engine, recorder, rows(0))
    request = engine.request()
    request.start(rows(1))
    request.close()
    assert request.state is STOP
    with pytest.raises(EngineClosed, match="request was closed"):
        request.start(rows(1))
    other = engine.request()
    other.start(rows(1))
    recorder.release()
    engine.close()
    assert other.wait()[0, 0] == 3 and other.state is STOP
    with pytest.raises(EngineClosed):
        other.start(rows(1))
    assert other.state is STOP


def test_3_10_close_waits_for_what_runs(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    recorder.hold()
    request.start(rows(1))
    recorder.wait_begun()
    threading.Timer(0.05, recorder.release).start()
    request.close()
    assert request.state is STOP and isinstance(request.error, RequestCancelled)


def test_3_10_close_in_the_callback(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1).request()
    request.set_callback(lambda each, _: each.close())
    request.start(rows(1))
    assert request.wait()[0, 0] == 3 and request.state is STOP


def test_3_10_engine_closed_without_draining(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    occupy(engine, recorder, rows(0))
    request = engine.request()
    request.start(rows(1))
    threading.Timer(0.05, recorder.release).start()
    engine.close(drain=False)
    with pytest.raises(EngineClosed):
        request.wait()
    assert request.state is STOP


def test_3_10_a_dropped_request_that_runs_ends_first(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1)
    recorder.hold()
    called: list[Any] = []
    request = engine.request()
    request.set_callback(lambda each, _: called.append(each.outputs[0, 0]))
    request.start(rows(1))
    del request
    recorder.release()
    until(lambda: called == [3])


def test_3_10_a_full_queue_makes_start_wait(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=1)
    occupy(engine, recorder, rows(0))
    engine.submit(rows(1))
    with pytest.raises(QueueFull):
        engine.submit(rows(1))
    request = engine.request()
    thread = threading.Thread(target=request.start, args=(rows(2),))
    thread.start()
    until(lambda: engine._pool._vacancy.threads == 1)
    recorder.release()
    thread.join(30)
    assert request.wait()[0, 0] == 5


def test_3_10_no_rows(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    request = make_engine(recorder, streams=1, batch=4).request()
    called: list[Any] = []
    request.set_callback(lambda *_: called.append(1))
    assert request.run(np.zeros((0, 4), F32)).shape == (0, 4) and called == [1]


def test_3_10_many_threads_start_and_cancel_one_request(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=2)
    request, calls = engine.request(), []
    request.set_callback(lambda *_: calls.append(1))
    started = [0] * 4

    def client(number: int) -> None:
        for i in range(200):
            try:
                request.start(rows(number))
            except RequestBusy:
                continue
            started[number] += 1
            if i % 3 == 0:
                request.cancel()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert request.wait_for(30_000) and len(calls) == sum(started) > 0
