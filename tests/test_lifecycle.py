"""Engines end cleanly: closed, dropped, forked, or left open when the interpreter exits."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_engine import RequestPool
from gpu_engine.errors import EngineClosed
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, double, occupy, plain, until

ROOT = Path(__file__).parent.parent
X = np.ones((1, 4), np.float32)


def engine_of(device: RecordingDevice, **options: Any) -> Engine:
    return Engine(plain(), device, validated(**{"streams": 1, "batch": 2} | options))


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("gpu-engine")}


def busy(device: RecordingDevice, engine: Engine) -> tuple[list[Any], list[Any]]:
    """Futures that run, held on the device, and futures that wait."""
    return occupy(engine, device, X), [engine.submit(X) for _ in range(5)]


def test_close_runs_what_waits(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    running, waiting = busy(recorder, engine)
    threading.Timer(0.05, recorder.release).start()
    engine.close()
    assert all(future.result(0)[0, 0] == 3 for future in (*running, *waiting))
    assert not our_threads() and recorder.closed == [0]
    engine.close()
    assert recorder.closed == [0]


def test_close_without_draining_fails_what_waits(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    running, waiting = busy(recorder, engine)
    threading.Timer(0.05, recorder.release).start()
    engine.close(drain=False)
    assert all(future.result(0)[0, 0] == 3 for future in running)
    for future in waiting:
        with pytest.raises(EngineClosed, match="the engine was closed"):
            future.result(0)
    assert not our_threads() and recorder.closed == [0]


@pytest.mark.parametrize("drain", [True, False])
def test_a_close_that_times_out_fails_what_did_not_finish(recorder: RecordingDevice, drain: bool) -> None:
    engine = engine_of(recorder)
    running, waiting = busy(recorder, engine)
    engine.close(drain=drain, timeout_s=0.05)
    for future in (*running, *waiting):
        with pytest.raises(EngineClosed):
            future.result(0)
    assert recorder.closed == []
    recorder.release()
    until(lambda: not our_threads() and recorder.closed == [0])


def test_close_while_a_caller_serves_itself(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    recorder.hold()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(engine.run(X)))
    thread.start()
    recorder.wait_begun()
    closer = threading.Thread(target=engine.close)
    closer.start()
    recorder.release()
    thread.join(30), closer.join(30)
    assert found[0][0, 0] == 3 and recorder.closed == [0]


def test_submitters_that_wait_for_room_are_told(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder, max_queue_size=5)
    busy(recorder, engine)
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            engine.submit(X, block=True)
        except EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    until(lambda: engine._pool._vacancy.threads == 1)
    threading.Timer(0.05, recorder.release).start()
    engine.close(drain=False)
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1


def test_close_in_a_callback(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    running, waiting = busy(recorder, engine)
    running[0].add_done_callback(lambda _: engine.close())
    recorder.release()
    until(lambda: not our_threads() and recorder.closed == [0])
    assert all(future.result(0)[0, 0] == 3 for future in (*running, *waiting))


def test_every_callback_closes(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder, streams=3)
    recorder.hold()
    futures = [engine.submit(X) for _ in range(40)]
    for future in futures:
        future.add_done_callback(lambda _: engine.close())
    recorder.wait_begun(3)
    recorder.release()
    engine.close()
    until(lambda: not our_threads() and sorted(recorder.closed) == [0, 1, 2])
    assert all(future.result(0)[0, 0] == 3 for future in futures)


def test_many_threads_close(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder, streams=3)
    futures = [engine.submit(X) for _ in range(50)]
    threads = [threading.Thread(target=engine.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(future.result(0)[0, 0] == 3 for future in futures)
    assert sorted(recorder.closed) == [0, 1, 2] and not our_threads()


def test_with_drains_unless_an_error_leaves_it(recorder: RecordingDevice) -> None:
    with engine_of(recorder) as engine:
        future = engine.submit(X)
    assert future.result(0)[0, 0] == 3
    engine = engine_of(recorder)
    with pytest.raises(ZeroDivisionError), engine:
        running, waiting = busy(recorder, engine)
        threading.Timer(0.05, recorder.release).start()
        raise ZeroDivisionError
    assert running[0].result(0) is not None
    with pytest.raises(EngineClosed):
        waiting[0].result(0)


def test_a_dropped_engine_ends_its_threads_and_fails_what_waits(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    running, waiting = busy(recorder, engine)
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    recorder.release()
    for future in waiting:
        with pytest.raises(EngineClosed, match="dropped"):
            future.result(30)
    assert all(future.result(30)[0, 0] == 3 for future in running)
    until(lambda: not our_threads() and recorder.closed == [0])


def test_an_idle_dropped_engine(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    engine.submit(X).result(30)
    assert our_threads()
    engine.cycle = engine  # type: ignore[attr-defined]
    del engine
    gc.collect()
    until(lambda: not our_threads() and recorder.closed == [0])
    engine = engine_of(recorder)
    engine.run(X)
    del engine
    assert recorder.closed == [0, 0]


SCRIPT = """
import asyncio, gc, os, sys, threading, weakref
import numpy as np
import gpu_engine
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, double, plain, until
X = np.ones((1, 4), np.float32)
device = RecordingDevice(double, asynchronous={asynchronous})
def make(**options):
    return Engine(plain(), device, validated(**dict(streams=2, batch=2, warmup=False) | options))
def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gpu-engine")]
def said(future):
    sys.stdout.write(type(future.exception()).__name__ + "\\n")
engine = make()
{body}
"""
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def script(device: RecordingDevice, body: str) -> str:
    """What a fresh interpreter prints that runs `body` and exits."""
    code = SCRIPT.format(asynchronous=device.asynchronous, body=body)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def test_exit_with_work_pending(recorder: RecordingDevice) -> None:
    body = """
device.hold()
futures = [engine.submit(X) for _ in range(40)]
device.wait_begun()
for future in futures:
    future.add_done_callback(said)
threading.Timer(0.1, device.release).start()
"""
    ends = script(recorder, body).split()
    assert len(ends) == 40 and set(ends) <= {"NoneType", "EngineClosed"}


def test_exit_with_request_objects_and_a_bounded_queue_full() -> None:
    body = """
engine = make(max_queue_size=2, streams=1, batch=1)
pool = gpu_engine.RequestPool(engine, 8)
pool.set_callback(lambda request, _: sys.stdout.write(type(request.error).__name__ + "\\n"))
device.hold()
def produce():
    try:
        while True:
            pool.start(X)
    except gpu_engine.EngineClosed:
        sys.stdout.write("told\\n")
producer = threading.Thread(target=produce, daemon=True)
producer.start()
until(lambda: engine._pool._vacancy.threads == 1)
threading.Timer(0.1, device.release).start()
"""
    ends = script(RecordingDevice(double, asynchronous=True), body).split()
    assert set(ends) <= {"NoneType", "EngineClosed", "told"} and len(ends) >= 3


def test_exit_while_the_device_hangs(recorder: RecordingDevice) -> None:
    body = """
import gpu_engine.runtime.pool as pool
pool._EXIT_TIMEOUT_S = 0.05
device.hold()
future = engine.submit(X)
future.add_done_callback(said)
device.wait_begun()
"""
    assert script(recorder, body).split() == ["EngineClosed"]


def test_exit_of_idle_engines(recorder: RecordingDevice) -> None:
    assert script(recorder, "engine.submit(X).result(); engine.run(X); print('end')") == "end\n"


def test_exit_out_of_an_event_loop() -> None:
    body = """
device.hold()
async def main():
    calls = [asyncio.create_task(engine.run_async(X)) for _ in range(9)]
    stream = engine.stream(X for _ in range(50))
    calls.append(asyncio.create_task(anext(stream)))
    await asyncio.sleep(0.05)
    threading.Timer(0.1, device.release).start()
    raise KeyError("the end")
try:
    asyncio.run(main())
except KeyError as error:
    print(error)
"""
    assert script(RecordingDevice(double, asynchronous=True), body) == "'the end'\n"


def test_callbacks_that_raise_end_nothing() -> None:
    body = """
import logging
logging.disable(logging.CRITICAL)
device.hold()
futures = [engine.submit(X) for _ in range(30)]
def fail(future):
    raise (SystemExit if sum(map(ord, repr(id(future)))) % 2 else KeyError)("in a callback")
for future in futures:
    future.add_done_callback(fail)
device.release()
print(sum(future.result(30)[0, 0] == 3 for future in futures), engine.run(X)[0, 0], engine.submit(X).result(30)[0, 0])
slots = 4 if device.asynchronous else 2
print(len(ours()) == slots)
engine.close()
print(len(ours()))
"""
    assert script(RecordingDevice(double, asynchronous=True), body).split() == ["30", "3.0", "3.0", "True", "0"]


def test_a_dropped_engine_leaves_no_thread_and_no_future() -> None:
    body = """
device.hold()
futures = [engine.submit(X) for _ in range(30)]
gone = weakref.ref(engine)
del engine
gc.collect()
print(gone() is None)
device.release()
print(all(future.exception(30) is None or "dropped" in str(future.exception()) for future in futures))
until(lambda: not ours() and sorted(device.closed) == [0, 1])
print("no thread")
"""
    assert script(RecordingDevice(double, asynchronous=True), body).splitlines() == ["True", "True", "no thread"]


def test_request_objects_keep_their_engine_and_make_no_cycle(recorder: RecordingDevice) -> None:
    engine = engine_of(recorder)
    request, pool, gone = engine.request(), RequestPool(engine, 2), weakref.ref(engine)
    del engine
    assert request.run(X)[0, 0] == 3
    pool.start(X)
    pool.wait_all()
    del request
    assert gone() is not None
    gc.disable()
    try:
        del pool
        until(lambda: gone() is None and not our_threads() and recorder.closed == [0])
    finally:
        gc.enable()


def test_close_with_and_without_draining_and_in_time() -> None:
    body = """
for drain, timeout_s in ((True, None), (False, None), (True, 0.05), (False, 0.05)):
    device.hold()
    futures = [engine.submit(X) for _ in range(30)]
    device.wait_begun(2)
    if timeout_s is None:
        threading.Timer(0.05, device.release).start()
    engine.close(drain=drain, timeout_s=timeout_s)
    ends = {type(future.exception(0)).__name__ for future in futures}
    print(drain, timeout_s, sorted(ends))
    device.release()
    until(lambda: not ours())
    while device.began.acquire(blocking=False):
        pass
    engine = make()
"""
    assert script(RecordingDevice(double, asynchronous=True), body).splitlines() == [
        "True None ['NoneType']",
        "False None ['EngineClosed', 'NoneType']",
        "True 0.05 ['EngineClosed']",
        "False 0.05 ['EngineClosed']",
    ]


@FORKS
def test_the_child_of_a_fork_gets_an_error(recorder: RecordingDevice) -> None:
    body = """
import warnings
warnings.simplefilter("ignore")
pool = gpu_engine.RequestPool(engine, 2)
device.hold()
futures = [engine.submit(X) for _ in range(9)]
requests = [engine.request() for _ in range(2)] + [pool.start(X)]
requests[0].start(X)
device.wait_begun()
child = os.fork()
if child == 0:
    for call in (engine.run, engine.submit, engine.run_many, lambda x: next(engine.map([x])),
                 lambda x: futures[0].result(30), lambda x: futures[8].result(30),
                 lambda x: asyncio.run(engine.run_async(x)), lambda x: asyncio.run(anext(engine.stream([x]))),
                 lambda x: requests[0].wait(), lambda x: requests[1].start(x), lambda x: requests[0].start(x),
                 lambda x: requests[2].wait(), lambda x: pool.start(x), lambda x: pool.wait_all()):
        try:
            call(X)
        except Exception as error:
            print(type(error).__name__, "fork" in str(error), flush=True)
    print([request.state.value for request in requests], flush=True)
    engine.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
device.release()
print(sum(future.result(30)[0, 0] == 3 for future in futures), requests[0].wait()[0, 0], flush=True)
pool.wait_all()
engine.close()
"""
    expected = ["ForkedEngineError True"] * 14 + ["['STOP', 'STOP', 'STOP']", "9 3.0"]
    assert script(recorder, body).splitlines() == expected


@FORKS
def test_a_child_compiles_anew() -> None:
    body = """
import warnings
warnings.simplefilter("ignore")
engine.submit(X).result()
child = os.fork()
if child == 0:
    device = RecordingDevice(double, asynchronous=device.asynchronous)
    fresh = make()
    print(fresh.run(X)[0, 0], fresh.submit(X).result(30)[0, 0], flush=True)
    fresh.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(engine.submit(X).result()[0, 0])
"""
    assert script(RecordingDevice(double, asynchronous=True), body).splitlines() == ["3.0 3.0", "3.0"]
