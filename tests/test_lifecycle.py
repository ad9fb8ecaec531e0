"""Engines end cleanly: closed, dropped, forked, or left open when the interpreter exits."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import EngineClosed
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, occupy, plain, until

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
import os, sys, threading
import numpy as np
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, double, plain
X = np.ones((1, 4), np.float32)
device = RecordingDevice(double, asynchronous={asynchronous})
engine = Engine(plain(), device, validated(streams=2, batch=2))
{body}
"""


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
    future.add_done_callback(lambda f: sys.stdout.write(type(f.exception()).__name__ + "\\n"))
threading.Timer(0.1, device.release).start()
"""
    ends = script(recorder, body).split()
    assert len(ends) == 40 and set(ends) <= {"NoneType", "EngineClosed"}


def test_exit_while_the_device_hangs(recorder: RecordingDevice) -> None:
    body = """
import gpu_engine.runtime.pool as pool
pool._EXIT_TIMEOUT_S = 0.05
device.hold()
future = engine.submit(X)
future.add_done_callback(lambda f: sys.stdout.write(type(f.exception()).__name__ + "\\n"))
device.wait_begun()
"""
    assert script(recorder, body).split() == ["EngineClosed"]


def test_exit_of_idle_engines(recorder: RecordingDevice) -> None:
    assert script(recorder, "engine.submit(X).result(); engine.run(X); print('end')") == "end\n"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_the_child_of_a_fork_gets_an_error(recorder: RecordingDevice) -> None:
    body = """
import warnings
warnings.simplefilter("ignore")
device.hold()
futures = [engine.submit(X) for _ in range(9)]
device.wait_begun()
child = os.fork()
if child == 0:
    for call in (engine.run, engine.submit, lambda x: next(engine.map([x])), lambda x: futures[0].result(30),
                 lambda x: futures[8].result(30)):
        try:
            call(X)
        except Exception as error:
            print(type(error).__name__, "fork" in str(error), flush=True)
    engine.close()
    os._exit(0)
os.waitpid(child, 0)
device.release()
print(sum(future.result(30)[0, 0] == 3 for future in futures), flush=True)
engine.close()
"""
    assert script(recorder, body).splitlines() == ["EngineClosed True"] * 5 + ["9"]
