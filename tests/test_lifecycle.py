"""Engines end cleanly: closed, dropped, forked, or left open when the interpreter exits."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import EngineClosed
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, plan_of

ROOT = Path(__file__).parent.parent
X = np.ones((1, 4), np.float32)
PLAN = plan_of({"x": (np.float32, ("N", 4))}, {"y": (np.float32, ("N", 4))})


@pytest.fixture(params=["synchronous", "asynchronous"])
def device(request: pytest.FixtureRequest) -> RecordingDevice:
    return RecordingDevice(lambda x: [x * 2], asynchronous=request.param == "asynchronous")


def engine_of(device: RecordingDevice, **options: Any) -> Engine:
    return Engine(PLAN, device, validated(**{"streams": 1, "batch": 2} | options))


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.0005)


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("gpu-engine")}


def busy(device: RecordingDevice, engine: Engine) -> tuple[list[Any], list[Any]]:
    """Futures that run, held on the device, and futures that wait."""
    device.hold()
    running = []
    for _ in range(2 if device.asynchronous else 1):
        running.append(engine.submit(X))
        until(lambda: engine.statistics().waiting == 0)
    return running, [engine.submit(X) for _ in range(5)]


def test_close_runs_what_waits(device: RecordingDevice) -> None:
    engine = engine_of(device)
    running, waiting = busy(device, engine)
    threading.Timer(0.05, device.release).start()
    engine.close()
    assert all(future.result(0)[0, 0] == 2 for future in (*running, *waiting))
    assert not our_threads() and device.closed == [0]
    engine.close()
    assert device.closed == [0]


def test_close_without_draining_fails_what_waits(device: RecordingDevice) -> None:
    engine = engine_of(device)
    running, waiting = busy(device, engine)
    threading.Timer(0.05, device.release).start()
    engine.close(drain=False)
    assert all(future.result(0)[0, 0] == 2 for future in running)
    for future in waiting:
        with pytest.raises(EngineClosed, match="the engine was closed"):
            future.result(0)
    assert not our_threads() and device.closed == [0]


@pytest.mark.parametrize("drain", [True, False])
def test_a_close_that_times_out_fails_what_did_not_finish(device: RecordingDevice, drain: bool) -> None:
    engine = engine_of(device)
    running, waiting = busy(device, engine)
    engine.close(drain=drain, timeout_s=0.05)
    for future in (*running, *waiting):
        with pytest.raises(EngineClosed):
            future.result(0)
    assert device.closed == []
    device.release()
    until(lambda: not our_threads() and device.closed == [0])


def test_close_while_a_caller_serves_itself(device: RecordingDevice) -> None:
    engine = engine_of(device)
    device.hold()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(engine.run(X)))
    thread.start()
    device.wait_begun()
    closer = threading.Thread(target=engine.close)
    closer.start()
    device.release()
    thread.join(30), closer.join(30)
    assert found[0][0, 0] == 2 and device.closed == [0]


def test_submitters_that_wait_for_room_are_told(device: RecordingDevice) -> None:
    engine = engine_of(device, max_queue_size=5)
    busy(device, engine)
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            engine.submit(X, block=True)
        except EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    threading.Timer(0.05, device.release).start()
    engine.close(drain=False)
    thread.join(30)
    assert not thread.is_alive() and len(errors) <= 1


def test_close_in_a_callback(device: RecordingDevice) -> None:
    engine = engine_of(device)
    device.hold()
    future, other = engine.submit(X), engine.submit(X)
    future.add_done_callback(lambda _: engine.close())
    device.release()
    until(lambda: not our_threads() and device.closed == [0])
    assert future.result(0)[0, 0] == 2 == other.result(0)[0, 0]


def test_many_threads_close(device: RecordingDevice) -> None:
    engine = engine_of(device, streams=3)
    futures = [engine.submit(X) for _ in range(50)]
    threads = [threading.Thread(target=engine.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(future.result(0)[0, 0] == 2 for future in futures)
    assert sorted(device.closed) == [0, 1, 2] and not our_threads()


def test_with_drains_unless_an_error_leaves_it(device: RecordingDevice) -> None:
    with engine_of(device) as engine:
        future = engine.submit(X)
    assert future.result(0)[0, 0] == 2
    engine = engine_of(device)
    with pytest.raises(ZeroDivisionError), engine:
        running, waiting = busy(device, engine)
        threading.Timer(0.05, device.release).start()
        raise ZeroDivisionError
    assert running[0].result(0) is not None
    with pytest.raises(EngineClosed):
        waiting[0].result(0)


def test_a_dropped_engine_ends_its_threads_and_fails_what_waits(device: RecordingDevice) -> None:
    engine = engine_of(device)
    running, waiting = busy(device, engine)
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    device.release()
    for future in waiting:
        with pytest.raises(EngineClosed, match="dropped"):
            future.result(30)
    assert all(future.result(30)[0, 0] == 2 for future in running)
    until(lambda: not our_threads() and device.closed == [0])


def test_an_idle_dropped_engine(device: RecordingDevice) -> None:
    engine = engine_of(device)
    engine.submit(X).result(30)
    assert our_threads()
    engine.cycle = engine  # type: ignore[attr-defined]
    del engine
    gc.collect()
    until(lambda: not our_threads() and device.closed == [0])
    engine = engine_of(device)
    engine.run(X)
    del engine
    assert device.closed == [0, 0]


SCRIPT = """
import os, sys, threading
import numpy as np
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, plan_of
X = np.ones((1, 4), np.float32)
device = RecordingDevice(lambda x: [x * 2], asynchronous={asynchronous})
plan = plan_of({{"x": (np.float32, ("N", 4))}}, {{"y": (np.float32, ("N", 4))}})
engine = Engine(plan, device, validated(streams=2, batch=2))
{body}
"""


def script(device: RecordingDevice, body: str) -> str:
    """What a fresh interpreter prints that runs `body` and exits."""
    code = SCRIPT.format(asynchronous=device.asynchronous, body=body)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def test_exit_with_work_pending(device: RecordingDevice) -> None:
    body = """
device.hold()
futures = [engine.submit(X) for _ in range(40)]
device.wait_begun()
for future in futures:
    future.add_done_callback(lambda f: sys.stdout.write(type(f.exception()).__name__ + "\\n"))
threading.Timer(0.1, device.release).start()
"""
    ends = script(device, body).split()
    assert len(ends) == 40 and set(ends) <= {"NoneType", "EngineClosed"}


def test_exit_while_the_device_hangs(device: RecordingDevice) -> None:
    body = """
import gpu_engine.runtime.pool as pool
pool._EXIT_TIMEOUT_S = 0.05
device.hold()
future = engine.submit(X)
future.add_done_callback(lambda f: sys.stdout.write(type(f.exception()).__name__ + "\\n"))
device.wait_begun()
"""
    assert script(device, body).split() == ["EngineClosed"]


def test_exit_of_idle_engines(device: RecordingDevice) -> None:
    assert script(device, "engine.submit(X).result(); engine.run(X); print('end')") == "end\n"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_the_child_of_a_fork_gets_an_error(device: RecordingDevice) -> None:
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
print(sum(future.result(30)[0, 0] == 2 for future in futures), flush=True)
engine.close()
"""
    assert script(device, body).splitlines() == ["EngineClosed True"] * 5 + ["9"]
