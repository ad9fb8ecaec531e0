"""Workers that help a stream: when they are made, where they run, and that none is left behind."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gpu_engine
from cpu_fallback import team
from cpu_fallback.device import CpuDevice
from cpu_fallback.stream import CpuStream
from cpu_fallback.team import can_have_teams
from gpu_engine.ir.ops import Map
from tests.cpu_execution import lowered, run_slot
from tests.cpu_teams import CORES, N, X, ends_with, large, native_threads, opened, results, weights
from tests.reference import graph_of

pytestmark = pytest.mark.skipif(not can_have_teams(), reason="streams have one thread on this system")
Array = NDArray[Any]
ROOT = Path(__file__).parent.parent


def test_small_models_have_no_workers() -> None:
    plan, before = lowered(graph_of({"x": (N, 8)}, lambda b, x: b.emit(Map(X + 1), x))), native_threads()
    with opened(plan, 2) as stream:
        run_slot(stream.slots[0], plan, [weights(3, 8)])
        assert native_threads() == before
        run_slot(stream.slots[0], plan, [weights(1 << 16, 8)])
        assert native_threads() == before + 1
    assert ends_with(before)


def test_a_stream_that_is_dropped_leaves_no_thread() -> None:
    plan, x = large()
    before = native_threads()
    stream = CpuStream(plan, 1, (), 3)
    run_slot(stream.slots[0], plan, [x])
    assert native_threads() == before + 2
    stream.slots[0].cycle = stream  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert ends_with(before)


def test_closing_twice_and_before_any_run() -> None:
    plan, x = large()
    before = native_threads()
    CpuStream(plan, 1, (), 3).close()
    stream = CpuStream(plan, 1, (), 3)
    run_slot(stream.slots[0], plan, [x])
    stream.close()
    stream.close()
    assert ends_with(before)


def test_workers_sleep_between_requests() -> None:
    plan, x = large()
    with opened(plan, 2) as stream:
        run_slot(stream.slots[0], plan, [x])
        time.sleep(0.01)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.05


def test_many_more_threads_than_cores() -> None:
    plan, x = large()
    expected = results(plan, [x], 1)[0]
    with opened(plan, 4 * len(CORES) + 1) as stream:
        for _ in range(10):
            np.testing.assert_array_equal(run_slot(stream.slots[0], plan, [x])[0], expected[0])


def test_a_leader_goes_on_without_workers_that_do_not_come() -> None:
    plan, x = large()
    (expected,) = results(plan, [x], 1)
    with opened(plan, 2) as stream:
        slot = stream.slots[0]
        run_slot(slot, plan, [x])
        assert stream._team is not None
        stream._team.close()
        (found,) = run_slot(slot, plan, [x])
    np.testing.assert_array_equal(found, expected[0])


def test_without_permission_to_make_threads(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plan, x = large()
    (expected,), before = results(plan, [x], 1), native_threads()
    system, made = team._system(), []

    class Limited:
        """A system with room for one more thread."""

        pthread_join = system.pthread_join

        def pthread_create(self, *arguments: Any) -> int:
            made.append(arguments)
            return system.pthread_create(*arguments) if len(made) == 1 else 11

    monkeypatch.setattr(team, "_system", Limited)
    with opened(plan, 3, (0, 1, 2)) as stream:
        for _ in range(2):
            np.testing.assert_array_equal(run_slot(stream.slots[0], plan, [x])[0], expected[0])
        assert native_threads() == before and len(made) == 2
    assert "one thread" in caplog.text


def test_without_permission_to_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    plan, x = large()
    (expected,) = results(plan, [x], 1)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with opened(plan, 2, (100_000, 100_001)) as stream:
        stream.enter()
        for _ in range(2):
            np.testing.assert_array_equal(run_slot(stream.slots[0], plan, [x])[0], expected[0])


@pytest.mark.skipif(len(CORES) < 2, reason="one core")
def test_workers_keep_off_the_leaders_core() -> None:
    plan, x = large()
    main = {int(task) for task in os.listdir("/proc/self/task")}
    try:
        with opened(plan, 2, CORES[:2]) as stream:
            run_slot(stream.slots[0], plan, [x])
            (worker,) = {int(task) for task in os.listdir("/proc/self/task")} - main
            for leader, other in (CORES[:2], CORES[1::-1]):
                os.sched_setaffinity(0, {leader})
                run_slot(stream.slots[0], plan, [x])
                assert os.sched_getaffinity(worker) == {other}
    finally:
        os.sched_setaffinity(0, CORES)


def test_options_say_how_many_threads() -> None:
    device, (plan, _) = CpuDevice(), large()
    cores = len(device._cores.numbers)
    for streams, threads, expected in ((1, None, cores), (1, 1, 1), (cores, None, 1), (cores, 1, 1)):
        lanes = device.open(plan, streams, 1, threads)
        assert [lane.threads for lane in lanes] == [expected] * streams
        for lane in lanes:
            lane.close()
    with pytest.warns(RuntimeWarning, match="threads exceeds"):
        (lane,) = device.open(plan, 1, 1, cores + 1)
    assert lane.threads == cores
    lane.close()


SCRIPT = """
import os, sys
import numpy as np
import gpu_engine
from tests.cpu_execution import run_slot
from tests.cpu_teams import large, native_threads, opened
{body}
"""


def script(body: str) -> str:
    """What a fresh interpreter prints that runs `body` and exits."""
    code = SCRIPT.format(body=body)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def test_a_fork_runs_alone_and_ends() -> None:
    body = """
import warnings
warnings.simplefilter("ignore")
plan, x = large()
with opened(plan, 3) as stream:
    expected = run_slot(stream.slots[0], plan, [x])[0]
    child = os.fork()
    found = run_slot(stream.slots[0], plan, [x])[0]
    agrees = bool((found == expected).all())
    if child == 0:
        stream.close()
        os._exit(40 + agrees + native_threads())
    print(agrees, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert script(body).split() == ["True", "42"]


def test_an_interpreter_that_exits_with_workers() -> None:
    body = """
plan, x = large()
from cpu_fallback.stream import CpuStream
kept = CpuStream(plan, 1, (), 3)
run_slot(kept.slots[0], plan, [x])
print(native_threads() > 2)
"""
    assert script(body) == "True\n"


def test_engines_leave_no_thread(tmp_path: Path) -> None:
    before = native_threads()
    path = tmp_path / "model.onnx"
    path.write_bytes(matmul_model())
    x = weights(256, 256)
    with gpu_engine.compile(path, device="cpu", hint="latency") as engine:
        found = engine.run(x)
        assert native_threads() == before + len(CpuDevice()._cores.numbers) - 1
        np.testing.assert_array_equal(engine.submit(x).result(30), found)
    assert ends_with(before)
    engine = gpu_engine.compile(path, device="cpu", hint="latency")
    np.testing.assert_array_equal(engine.run(x), found)
    del engine
    gc.collect()
    assert ends_with(before)


def matmul_model() -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 256]) for name in "xy"]
    node, weight = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(weights(256, 256), "w")
    graph = helper.make_graph([node], "product", kinds[:1], kinds[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


THREADS = {
    "gpu_engine.runtime.pool": "threads that serve slots: Python's, joined by Engine.close",
    "gpu_engine.tools.targets": "callers of the load generator behind bench and tune, ended with it",
    "gpu_engine.gpu.ahead": "kernels compiled side by side while a model is compiled, ended with it",
    "cpu_fallback.team": "workers of a stream, native: like the lanes of a device they never run Python",
}


def test_threads_are_made_in_few_places() -> None:
    makers = {"Thread", "ThreadPoolExecutor", "start_new_thread", "pthread_create", "Timer"}
    found = set()
    for package in ("gpu_engine", "cpu_fallback"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func if isinstance(node, ast.Call) else None
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in makers:
                    found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert found == set(THREADS)
