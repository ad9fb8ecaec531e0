"""An engine whose device breaks: what waits fails at once, what comes is refused, and it still ends cleanly."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

import gpu_engine
from gpu_engine.errors import DeviceError, DeviceLost, EngineClosed
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from gpu_engine.structured import OpenInput, StructuredEngine
from tests.recording_device import MakeEngine, Model, RecordingDevice, double, occupy, plain, rows, until

REASON = "cuda:0 is lost: cudaErrorIllegalAddress"


def fragile() -> Model:
    """`double`, but a negative number breaks the device for good."""
    broken = threading.Event()

    def model(x: Any) -> list[Any]:
        if broken.is_set() or (x < 0).any():
            broken.set()
            raise DeviceLost(REASON)
        return double(x)

    return model


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("gpu-engine", "recording"))]


@pytest.fixture
def broken(recorder: RecordingDevice) -> RecordingDevice:
    recorder.model = fragile()
    return recorder


def test_what_waits_fails_at_once_and_is_not_retried(broken: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(broken, streams=1, batch=4)
    running = occupy(engine, broken, rows(1))
    waiting = [engine.submit(rows(value)) for value in (2, -1, 3, 4, 5, 6, 7, 8, 9)]
    broken.release()
    for future in running:
        np.testing.assert_array_equal(future.result(30), rows(1) * 2 + 1)
    for future in waiting:
        with pytest.raises(DeviceLost, match="cudaErrorIllegalAddress"):
            future.result(30)
    assert len(broken.launches) - len(running) <= 2, "a broken device was tried again"
    counts = engine.statistics()
    assert (counts.failed, counts.retried, counts.waiting) == (9, 0, 0)


def test_what_comes_is_refused_with_the_reason(broken: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(broken, streams=2, batch=4)
    assert engine.healthy and engine.describe().state == "ready"
    with pytest.raises(DeviceLost):
        engine.run(rows(-1))
    assert not engine.healthy
    launches = len(broken.launches)
    calls = [engine.run, engine.submit, engine.run_many, lambda x: asyncio.run(engine.run_async(x))]
    calls += [lambda x: list(engine.map([x])), lambda x: engine.request().start(x), lambda x: engine.warmup(x)]
    for call in calls:
        with pytest.raises(DeviceLost, match="cudaErrorIllegalAddress"):
            call(rows(1))
    assert len(broken.launches) == launches
    described = engine.describe()
    assert described.state == "unhealthy" and REASON in described.reason
    engine.close()
    assert engine.describe().state == "unhealthy"


def test_closing_a_broken_engine_is_quick_and_leaves_nothing(broken: RecordingDevice) -> None:
    engine = Engine(plain(), broken, validated(streams=2, batch=4, warmup=False))
    futures = [engine.submit(rows(value)) for value in (1, 2, -3, 4, 5, 6)]
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 1
    assert all(future.done() for future in futures)
    assert not our_threads() and sorted(broken.closed) == [0, 1]


def test_a_stream_that_cannot_be_closed_keeps_no_other_open(
    broken: RecordingDevice, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(broken, streams=3, batch=4)
    stream_type = type(engine._pool._lanes[0].stream)
    close = stream_type.close

    def closing(stream: Any) -> None:
        close(stream)
        if stream.index == 1:
            raise DeviceError("cudaErrorIllegalAddress")

    monkeypatch.setattr(stream_type, "close", closing)
    engine.close()
    assert sorted(broken.closed) == [0, 1, 2] and "a stream could not be closed" in caplog.text
    assert not our_threads()


def test_a_request_that_waits_for_room_is_told(broken: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(broken, streams=1, batch=1, max_queue_size=1)
    broken.hold()
    engine.submit(rows(-1))
    until(lambda: engine.statistics().waiting == 0)
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            engine.submit(rows(1), block=True).result(30)
        except DeviceLost as error:
            errors.append(error)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: engine._pool._vacancy.threads >= 1)
    broken.release()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 4


def test_other_failures_of_the_device_fail_only_the_request_at_fault(
    recorder: RecordingDevice, make_engine: MakeEngine
) -> None:
    def model(x: Any) -> list[Any]:
        if (x < 0).any():
            raise DeviceError("cudaErrorInvalidValue")
        return double(x)

    recorder.model = model
    engine = make_engine(recorder, streams=1, batch=8)
    running = occupy(engine, recorder, rows(1))
    good = [engine.submit(rows(value)) for value in range(7)]
    bad = engine.submit(rows(-1))
    recorder.release()
    for future in (*running, *good):
        future.result(30)
    with pytest.raises(DeviceError, match="cudaErrorInvalidValue"):
        bad.result(30)
    assert engine.healthy and engine.statistics().failed == 1


def test_a_device_that_breaks_while_compiling(broken: RecordingDevice) -> None:
    def model(x: Any) -> list[Any]:
        raise DeviceLost(REASON)

    broken.model = model
    with pytest.raises(DeviceLost):
        Engine(plain(), broken, validated(streams=2, batch=4))
    until(lambda: sorted(broken.closed) == [0, 1] and not our_threads())


def test_a_closed_engine_is_healthy_but_not_ready(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder)
    engine.close()
    assert engine.healthy and (engine.describe().state, engine.describe().reason) == ("closed", "the engine was closed")
    with pytest.raises(EngineClosed):
        engine.run(rows(1))


def test_the_error_is_public() -> None:
    assert issubclass(gpu_engine.DeviceLost, gpu_engine.DeviceError)


def test_an_engine_of_many_structures_is_as_healthy_as_all_of_them(broken: RecordingDevice) -> None:
    def compile_structure(structures: Any) -> Engine:
        return Engine(plain(), broken, validated(streams=1, warmup=False))

    with StructuredEngine([OpenInput("x", np.dtype(np.float32), False, None)], compile_structure) as engine:
        engine.run([rows(1)])
        assert engine.healthy
        with pytest.raises(DeviceLost):
            engine.run([rows(-1)])
        assert not engine.healthy
