"""Section 3.9 of the specification: a pool of request objects with one callback."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from gpu_engine import RequestPool, RequestState
from gpu_engine.errors import EngineClosed, ExecutionError, InputError, RequestBusy
from gpu_engine.runtime import request_pool
from gpu_engine.runtime.reusable import ReusableRequest
from tests.recording_device import F32, MakeEngine, RecordingDevice, double, poisoned, rows, until


def test_3_09_facts(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, requests=16)
    pool = RequestPool(engine)
    assert len(pool) == engine.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") == 16
    assert repr(pool) == "<RequestPool: 16 jobs>" and pool.userdata == [None] * 16 and pool.is_ready()
    assert list(pool) == [pool[i] for i in range(16)] and pool[3].state is RequestState.IDLE
    assert len(RequestPool(engine, 3)) == 3
    with pytest.raises(ValueError, match="jobs"):
        RequestPool(engine, -1)
    with pytest.raises(TypeError, match="jobs"):
        RequestPool(engine, True)


def test_3_09_every_input_is_answered_with_its_userdata(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=4)
    pool, found = RequestPool(engine), {}

    def callback(request: ReusableRequest, userdata: Any) -> None:
        assert request.state is RequestState.BUSY
        found[userdata] = request.outputs[0, 0]

    pool.set_callback(callback)
    buffer = np.empty((1, 4), F32)
    for i in range(300):
        buffer[:] = i
        pool.start(buffer, i)
    pool.wait_all()
    assert found == {i: 2 * i + 1 for i in range(300)} and pool.is_ready()
    assert max(launch.rows for launch in recorder.launches) > 1


def test_3_09_start_blocks_while_all_are_busy(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    pool = RequestPool(make_engine(recorder, streams=1), 2)
    recorder.hold()
    taken = [pool.start(rows(1)), pool.start(rows(2))]
    assert len(set(taken)) == 2 and not pool.is_ready()
    thread = threading.Thread(target=lambda: taken.append(pool.start(rows(3))))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    recorder.release()
    thread.join(30)
    pool.wait_all()
    assert taken[2] in taken[:2] and taken[2].outputs[0, 0] == 7


def test_3_09_inputs_may_be_shared(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    pool = RequestPool(engine, 8)
    recorder.hold()
    x = rows(1)
    requests = [pool.start(x, share_inputs=shared) for shared in (False, True) for _ in range(4)]
    until(lambda: engine.statistics().waiting == (6 if recorder.asynchronous else 7))
    x[:] = 5
    recorder.release()
    pool.wait_all()
    assert [request.outputs[0, 0] for request in requests] == [3] * 4 + [11] * 4
    pool.start([x]), pool.start({"x": x})
    pool.wait_all()


def test_3_09_the_first_error_is_raised_once(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    pool = RequestPool(make_engine(recorder, streams=1, batch=1), 3)
    called: list[Any] = []
    pool.set_callback(lambda request, userdata: called.append((userdata, type(request.error).__name__)))
    for i, value in enumerate((1, np.nan, 2, np.nan, 3)):
        pool.start(rows(value), i)
    with pytest.raises(ExecutionError, match="NaN"):
        pool.wait_all()
    assert [type(error) for error in pool.exceptions] == [ExecutionError] * 2
    pool.wait_all()
    assert pool.exceptions == ()
    expected = [(i, "ExecutionError" if i in (1, 3) else "NoneType") for i in range(5)]
    assert sorted(called) == expected, "the callback is called for failed runs too"


def test_3_09_of_very_many_errors_the_first_is_raised(
    recorder: RecordingDevice, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_pool, "REMEMBERED", 3)
    pool = RequestPool(make_engine(recorder, streams=1, batch=1), 1)

    def callback(request: ReusableRequest, userdata: Any) -> None:
        raise LookupError(userdata)

    pool.set_callback(callback)
    for i in range(5):
        pool.start(rows(1), i)
    with pytest.raises(LookupError, match="0"):
        pool.wait_all()
    assert [error.args for error in pool.exceptions] == [(0,), (1,), (2,)]


def test_3_09_errors_of_callbacks_are_pending_too(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    pool = RequestPool(make_engine(recorder, streams=1), 2)
    pool.set_callback(lambda request, userdata: 1 / userdata)
    for divisor in (1, 0, 0, 2):
        pool.start(rows(1), divisor)
    with pytest.raises(ZeroDivisionError):
        pool.wait_all()
    assert len(pool.exceptions) == 2
    pool.start(rows(1), 1)
    pool.wait_all()


def test_3_09_a_refused_input_frees_its_request(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    pool = RequestPool(make_engine(recorder, streams=1), 1)
    pool.start(rows(np.nan))
    for _ in range(3):
        with pytest.raises(InputError):
            pool.start(np.zeros(3, F32))
        assert pool.is_ready()
    with pytest.raises(ExecutionError):
        pool.wait_all()
    assert len(pool.exceptions) == 1
    assert pool.start(rows(1)).wait()[0, 0] == 3


def test_3_09_cancelled_requests_are_no_errors(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    pool = RequestPool(engine, 6)
    recorder.hold()
    requests = [pool.start(rows(i)) for i in range(6)]
    until(lambda: engine.statistics().waiting == (4 if recorder.asynchronous else 5))
    assert requests[-1].cancel() and pool.is_ready()
    recorder.release()
    pool.wait_all()
    assert requests[-1].state is RequestState.CANCELLED


def test_3_09_requests_may_be_used_on_their_own(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    pool = RequestPool(make_engine(recorder, streams=1), 2)
    recorder.hold()
    pool[0].start(rows(1))
    assert pool.start(rows(2)) is pool[1] and not pool.is_ready()
    recorder.release()
    pool.wait_all()
    for _ in range(500):
        pool[0].run(rows(1))
    assert len(pool._idle) == 2


def test_3_09_many_producers_never_share_a_request(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    pool = RequestPool(make_engine(recorder, streams=2, batch=2), 4)
    found: list[tuple[float, Any]] = []
    pool.set_callback(lambda request, userdata: found.append((request.outputs[0, 0], userdata)))

    def produce(first: int) -> None:
        for i in range(first, first + 100):
            pool.start(rows(i), i)

    threads = [threading.Thread(target=produce, args=(1000 * k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pool.wait_all()
    assert len(found) == 600 and all(value == 2 * userdata + 1 for value, userdata in found)


def test_3_09_callbacks_may_start_requests(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    pool = RequestPool(make_engine(recorder, streams=1, batch=4), 4)
    found: list[int] = []

    def callback(request: ReusableRequest, userdata: int) -> None:
        found.append(userdata)
        if userdata < 50:
            pool.start(rows(1), userdata + 1)

    pool.set_callback(callback)
    pool.start(rows(1), 0)
    until(lambda: len(found) == 51)
    pool.wait_all()


def test_3_09_a_callback_never_waits_for_itself(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    pool = RequestPool(make_engine(recorder, streams=1, batch=1), 1)
    for call in (lambda *_: pool.start(rows(1)), lambda *_: pool.wait_all()):
        pool.set_callback(call)
        pool.start(rows(1))
        with pytest.raises(RequestBusy):
            pool.wait_all()
    pool.set_callback(None)
    pool.start(rows(1))
    pool.wait_all()


def test_3_09_a_closed_engine_lets_producers_go(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    pool = RequestPool(engine, 2)
    recorder.hold()
    pool.start(rows(1)), pool.start(rows(1))
    errors: list[BaseException] = []

    def produce() -> None:
        try:
            pool.start(rows(1))
        except EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=produce)
    thread.start()
    threading.Timer(0.05, recorder.release).start()
    engine.close()
    thread.join(30)
    assert not thread.is_alive() and len(errors) <= 1
    pool.wait_all()
    with pytest.raises(EngineClosed):
        pool.start(rows(1))
