"""Several threads on one request: the same results as one thread gives, and nothing left running."""

from __future__ import annotations

import ast
import dataclasses
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gpu_engine
from cpu_fallback import sharing, team
from cpu_fallback.device import CpuDevice
from cpu_fallback.native import host
from cpu_fallback.sharing import LEAST_NBYTES, RUN_NBYTES, shares_of, traffic_of
from cpu_fallback.stream import CpuStream
from cpu_fallback.team import can_have_teams
from cpu_fallback.team_code import team_module
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.graph import Builder, Graph, Value
from gpu_engine.ir.ops import Attention, Conv, Gather, LayerNorm, Map, MatMul, Pool, Reduce, Softmax
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.plan import Plan
from tests.cpu_execution import lowered, run_slot
from tests.reference import graph_of, random_inputs
from tests.test_control import model_of
from tests.test_random_graphs import random_graphs

pytestmark = pytest.mark.skipif(not can_have_teams(), reason="streams have one thread on this system")
Array = NDArray[Any]
ROOT = Path(__file__).parent.parent
N, S = dims.symbol("N"), dims.symbol("S")
X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def weights(*shape: int) -> Array:
    return (np.random.default_rng(shape).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


@contextmanager
def opened(plan: Plan, threads: int, cores: Sequence[int] = ()) -> Iterator[CpuStream]:
    stream = CpuStream(plan, 1, cores, threads)
    try:
        yield stream
    finally:
        stream.close()


def results(plan: Plan, inputs: Sequence[Array], threads: int, runs: int = 1) -> list[list[Array]]:
    """The outputs of every run on so many threads; of more runs if in none of them workers came in time."""
    found: list[list[Array]] = []
    with opened(plan, threads) as stream:
        while len(found) < runs or (threads > 1 and len(found) < 20 and not came(stream)):
            found.append(run_slot(stream.slots[0], plan, inputs))
    return found


def came(stream: CpuStream) -> bool:
    """Whether all workers took part if anything was shared."""
    assert stream._team is not None
    first, *others = stream._team.parts()
    return not first or all(others)


def assert_equal_bits(plan: Plan, inputs: Sequence[Array], runs: int = 2) -> None:
    """Whatever the number of threads, and whether or not workers come in time."""
    (expected,) = results(plan, inputs, 1)
    for threads in (2, 3):
        for found in results(plan, inputs, threads, runs):
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is too small to be shared."""
    monkeypatch.setattr(sharing, "LEAST_NBYTES", 0)
    monkeypatch.setattr(sharing, "RUN_NBYTES", 0)


def transformer(builder: Builder, x: Value) -> Value:
    """A block over [N, S, 64] whose steps are of many sizes."""
    q, k, v = (builder.emit(MatMul(), x, builder.constant(weights(64, 64))) for _ in range(3))
    y = builder.emit(Attention(0.125), q, k, v)
    y = builder.emit(LayerNorm(2, 1e-5), builder.emit(Map(X + Y), y, x))
    means = builder.emit(Reduce("mean", (1, 2), True), y)
    wide = builder.emit(MatMul(epilogue=expr.tanh(X)), y, builder.constant(weights(64, 256)))
    y = builder.emit(MatMul(), wide, builder.constant(weights(256, 64)))
    return builder.emit(Softmax(2), builder.emit(Map(X * Y), y, means))


def network(builder: Builder, x: Value) -> Value:
    """Convolutions of every form over [N, 3, S, S]."""

    def conv(x: Value, inside: int, outside: int, size: int, stride: int = 1, group: int = 1) -> Value:
        pad, weight = (size // 2,) * 2, builder.constant(weights(outside, inside // group, size, size))
        return builder.emit(Conv((stride,) * 2, pad, pad, (1, 1), group), x, weight)

    x = conv(x, 3, 16, 3, stride=2)
    x = builder.emit(Map(expr.maximum(X, 0)), conv(x, 16, 48, 1))
    x = conv(x, 48, 48, 3, group=48)
    x = builder.emit(Pool("max", (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), False), conv(x, 48, 24, 1))
    x = builder.emit(Map(X + Y), conv(x, 24, 24, 3), x)
    return builder.emit(Reduce("mean", (2, 3), False), conv(x, 24, 136, 1))


NETWORKS: Mapping[str, tuple[Graph, Callable[[int], tuple[int, ...]]]] = {
    "transformer": (graph_of({"x": (N, S, 64)}, transformer), lambda s: (2, s, 64)),
    "network": (graph_of({"x": (N, 3, S, S)}, network), lambda s: (1 + s % 2, 3, 8 + s, 8 + s)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_change_no_bit(name: str) -> None:
    graph, shape = NETWORKS[name]
    plan = lowered(optimize(graph))
    for size in (56, 97):
        assert_equal_bits(plan, [weights(*shape(size))])


@pytest.mark.usefixtures("share_everything")
@pytest.mark.parametrize("name", NETWORKS)
def test_small_steps_may_be_shared_too(name: str) -> None:
    graph, shape = NETWORKS[name]
    plan = lowered(optimize(graph))
    for size in (1, 2, 3, 7, 13, 32):
        assert_equal_bits(plan, [weights(*shape(size))], runs=3)


@pytest.mark.usefixtures("share_everything")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_graphs(), st.integers(1, 3))
def test_random_graphs(graph: Graph, extent: int) -> None:
    inputs = [np.asarray(array) for array in random_inputs(graph, N=extent).values()]
    assert_equal_bits(lowered(optimize(graph)), inputs, runs=1)


@pytest.mark.usefixtures("share_everything")
def test_array_steps_run_once_between_shared_ones() -> None:
    def build(builder: Builder, x: Value, i: Value) -> Value:
        for _ in range(3):
            x = builder.emit(Gather(0), builder.emit(Map(expr.tanh(X) + 0.5), x), i)
            x = builder.emit(MatMul(), x, builder.constant(weights(32, 32)))
        return x

    plan = lowered(graph_of({"x": (N, 32), "i": (INT64, (N,))}, build))
    assert not plan.program.segments[0].only_native
    order = np.random.default_rng(0).permutation(100)
    assert_equal_bits(plan, [weights(100, 32), order], runs=5)


LOOPED = """
g (int64 n, bool odd, float[N, 64] x, float[64, 64] w) => (float[N, 64] last) {
  last = Loop (n, , x) <body = step (int64 i, bool go, float[N, 64] s) => (bool go, float[N, 64] next) {
      t = MatMul (s, w)
      u = If (odd) <then_branch = yes () => (float[N, 64] a) { b = Tanh (t)  a = Add (b, x) },
                    else_branch = no () => (float[N, 64] c) { c = Sigmoid (t) }>
      next = Sub (u, s)
  }>
}"""


@pytest.mark.usefixtures("share_everything")
def test_loops_and_branches_are_shared_too() -> None:
    with gpu_engine.compile(model_of(LOOPED), device="cpu") as engine:
        plan = engine.plan
    assert not plan.program.segments[0].table.functions.all(), "nothing jumps"
    for trips, odd, rows in ((0, True, 3), (1, False, 40), (6, True, 130), (5, False, 1)):
        inputs = [np.array(trips), np.array(odd), weights(rows, 64), weights(64, 64)]
        assert_equal_bits(plan, inputs)


def test_one_stream_serves_many_shapes() -> None:
    graph, shape = NETWORKS["transformer"]
    plan = lowered(graph)
    with opened(plan, 2, CORES[:2]) as stream:
        stream.enter()
        try:
            for size in (100, 1, 64, 2, 100, 33, 1, 300):
                x = weights(*shape(size))
                np.testing.assert_array_equal(run_slot(stream.slots[0], plan, [x])[0], results(plan, [x], 1)[0][0])
        finally:
            os.sched_setaffinity(0, CORES)


def test_streams_with_threads_run_at_once() -> None:
    graph, shape = NETWORKS["network"]
    plan = lowered(graph)
    inputs = [weights(*shape(40 + i)) for i in range(4)]
    expected = [results(plan, [x], 1)[0][0] for x in inputs]
    failures: list[BaseException] = []

    def serve(number: int) -> None:
        try:
            with opened(plan, 2 + number) as stream:
                for i in range(30):
                    found = run_slot(stream.slots[0], plan, [inputs[(i + number) % 4]])[0]
                    np.testing.assert_array_equal(found, expected[(i + number) % 4])
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures, failures[0]


def test_the_code_is_sound_on_every_architecture() -> None:
    for machine, x86 in (("x86_64", True), ("aarch64", False)):
        llvm.parse_assembly(team_module(dataclasses.replace(host(), x86=x86), machine)).verify()


def test_which_steps_are_shared() -> None:
    small, large = LEAST_NBYTES, RUN_NBYTES + 1
    nbytes = np.array([small, large // 2, small, large, small, 0, large, large])
    shares, worth = shares_of(nbytes, np.array([0, 3, 5, 8]), np.array([3, 2, 3, 0]))
    assert shares.tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
    assert worth == [False, True, True, False]


def test_sizes_beyond_all_memory_are_shared() -> None:
    numbers = Numbers(("N",))
    traffic = traffic_of([(1 << 70, 8), (8,), (N * 8, N)], numbers)
    numbers.compile()
    found = traffic.nbytes(np.array(numbers.evaluate((1 << 20,)), np.int64))
    assert found.tolist() == [1 << 40, 8, 9 << 20]


def test_small_models_have_no_workers() -> None:
    plan, before = lowered(graph_of({"x": (N, 8)}, lambda b, x: b.emit(Map(X + 1), x))), native_threads()
    with opened(plan, 2) as stream:
        run_slot(stream.slots[0], plan, [weights(3, 8)])
        assert native_threads() == before
        run_slot(stream.slots[0], plan, [weights(1 << 16, 8)])
        assert native_threads() == before + 1
    assert ends_with(before)


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def ends_with(threads: int) -> bool:
    """Whether so many threads are left: the system lists one that was joined for a moment longer."""
    deadline = time.monotonic() + 5
    while native_threads() != threads and time.monotonic() < deadline:
        time.sleep(1e-3)
    return native_threads() == threads


def large() -> tuple[Plan, Array]:
    graph, shape = NETWORKS["transformer"]
    return lowered(graph), weights(*shape(128))


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
from tests.test_cpu_threads import large, native_threads, opened, run_slot
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
    "cpu_fallback.team": "workers of a stream, native: like the lanes of a device they never run Python",
}


def test_threads_are_made_in_two_places() -> None:
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
