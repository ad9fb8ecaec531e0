"""Several threads on one request: the same results as one thread gives, and nothing left running."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gpu_engine
from cpu_fallback import sharing
from cpu_fallback.native import host
from cpu_fallback.sharing import LEAST_NBYTES, RUN_NBYTES, shares_of, traffic_of
from cpu_fallback.team import can_have_teams
from cpu_fallback.team_code import team_module
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.graph import Builder, Graph, Value
from gpu_engine.ir.ops import Gather, Map, MatMul
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.plan import Plan
from tests.cpu_execution import lowered, run_slot
from tests.cpu_teams import CORES, NETWORKS, N, X, opened, results, weights
from tests.reference import graph_of, random_inputs
from tests.test_control import model_of
from tests.test_random_graphs import random_graphs

pytestmark = pytest.mark.skipif(not can_have_teams(), reason="streams have one thread on this system")
Array = NDArray[Any]


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
