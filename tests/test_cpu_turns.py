"""Threads that come back from native code to Python: they take turns, and short runs do not leave it."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpu_engine
from cpu_fallback import stream
from cpu_fallback.native import LIBRARY, compile_module, host, takes_turns
from cpu_fallback.program import TRIALS
from cpu_fallback.stream import CpuSlot
from cpu_fallback.walk_code import MOST_SKIPPED, walk_module
from gpu_engine.ir.ops import Map
from gpu_engine.plan.plan import Plan
from tests.cpu_execution import lowered, run_slot
from tests.cpu_teams import N, X, large, opened
from tests.reference import graph_of
from tests.test_interruption import counting

needs_turns = pytest.mark.skipif(not takes_turns(), reason="threads do not compete for the GIL here")
NO_STEPS = (ctypes.c_int64 * 2)(0, 0)
Walk = Callable[[int], None]


@pytest.fixture
def walk() -> Iterator[Walk]:
    """`walk_in_turn` with turns of its own."""
    engine = compile_module(walk_module(host().x86, turns=True), host())
    yield ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("walk_in_turn"))
    del engine


def small() -> Plan:
    return lowered(graph_of({"x": (N, 8)}, lambda b, x: b.emit(Map(X + 1), x)))


def is_held(slot: CpuSlot) -> bool:
    assert slot._bound is not None
    return [function for function, _ in slot._bound.calls] == [LIBRARY.holding_walker()]


def walks(walk: Walk, times: int) -> float:
    """The fastest of so many, in seconds."""
    job, least_s = ctypes.addressof(NO_STEPS), float("inf")
    for _ in range(times):
        started = time.perf_counter()
        walk(job)
        least_s = min(least_s, time.perf_counter() - started)
    return least_s


@needs_turns
def test_any_number_of_threads_get_their_turns(walk: Walk) -> None:
    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(lambda _: walks(walk, 2000), range(10)))) == 10


@needs_turns
def test_a_thread_that_kept_its_turn_delays_others_once(walk: Walk) -> None:
    thread = threading.Thread(target=walks, args=(walk, 1))
    thread.start()
    thread.join()
    walks(walk, 1)
    assert walks(walk, 100) < 20e-6


@needs_turns
def test_waiting_in_vain_becomes_rare(walk: Walk) -> None:
    """Two threads of which one always keeps its turn while the other walks."""
    here, there, took_s = threading.Semaphore(0), threading.Semaphore(0), []

    def other() -> None:
        for _ in range(4 * MOST_SKIPPED):
            there.acquire()
            walks(walk, 1)
            here.release()

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(4 * MOST_SKIPPED):
        took_s.append(walks(walk, 1))
        there.release()
        here.acquire()
    thread.join()
    assert np.median(took_s[2 * MOST_SKIPPED :]) < 20e-6


def test_every_caller_gets_its_own_result() -> None:
    engine = gpu_engine.compile(counting(40), device="cpu", streams="auto", threads=1, auto_batching=False)

    def ask(caller: int) -> None:
        for i in range(300):
            x = np.full(2, caller * 1000 + i, np.float32)
            np.testing.assert_array_equal(engine.run(x), x + 40)

    with engine, ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))


def test_short_runs_keep_the_gil_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every run takes 1 us: other programs make no run of this test a long one."""
    monkeypatch.setattr(stream, "perf_counter", itertools.count(0, 1e-6).__next__)
    plan, x = small(), np.arange(24, dtype=np.float32).reshape(3, 8)
    with opened(plan, 1) as lane:
        (slot,) = lane.slots
        for _ in range(TRIALS + 2):
            (found,) = run_slot(slot, plan, [x])
            np.testing.assert_array_equal(found, x + 1)
        assert is_held(slot)


def test_a_run_too_long_for_a_trial_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "TRIED_S", 0.0)
    plan, x = small(), np.ones((3, 8), np.float32)
    with opened(plan, 1) as lane:
        (slot,) = lane.slots
        run_slot(slot, plan, [x])
        assert slot._bound is not None and not slot._bound.trials and not is_held(slot)


def test_long_runs_leave_the_gil() -> None:
    plan, x = large()
    with opened(plan, 1) as lane:
        (slot,) = lane.slots
        for _ in range(TRIALS + 1):
            run_slot(slot, plan, [x])
        assert slot._bound is not None and not slot._bound.trials and not is_held(slot)


def test_loops_leave_the_gil_however_short() -> None:
    with gpu_engine.compile(counting(1), device="cpu", streams=1, threads=1) as engine:
        for _ in range(TRIALS + 1):
            engine.run(np.zeros(2, np.float32))
        assert not is_held(engine._pool._workers[0].slot)  # type: ignore[arg-type]
