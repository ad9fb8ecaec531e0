"""Section 3.14 of the specification: what a benchmark's numbers mean.

Iterations that round up and open loops are in tests/test_load.py, steadiness and MLPerf's scenarios in
tests/test_measures.py, and what makes a result doubtful in tests/test_bench.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gpu_engine
from benchmarks.batching import closed_loop, open_loop, percentile
from benchmarks.batching_cases import CASES, Case, mlp
from gpu_engine.runtime.engine import Engine
from tests.test_semantics_3_03 import product_model


@pytest.mark.parametrize("count", [1, 2, 7, 100, 101])
def test_a_percentile_is_the_value_that_so_many_reach(count: int) -> None:
    """The ceil(n * p / 100)-th smallest, counted from 1."""
    values = np.random.default_rng(0).permutation(count).astype(float)
    for p in (1, 50, 99, 100):
        assert percentile(values.tolist(), p) == sorted(values)[math.ceil(count * p / 100) - 1]


def feeds(count: int) -> list[Any]:
    return [{"x": np.full((1, 3, 40), i, np.float32)} for i in range(count)]


def test_throughput_counts_rows_and_every_output_is_there() -> None:
    with gpu_engine.compile(product_model(), device="cpu", streams=1, batch=4, warmup=False) as engine:
        assert isinstance(engine, Engine)
        rate, found = closed_loop(engine, feeds(3), 0.05)
        assert {number for number, _ in found} == {0, 1, 2}
        assert engine.statistics().inference_count == len(found)
        assert rate <= len(found) / 0.05
        expected = [engine.run(feed)["y"] for feed in feeds(3)]
        for number, outputs in found:
            np.testing.assert_allclose(outputs["y"], expected[number], rtol=1e-5)


def test_open_loop_latency_counts_from_the_intended_arrival() -> None:
    """Far above what it can do, requests wait longer and longer, though none is sent before its time."""
    with gpu_engine.compile(product_model(), device="cpu", streams=1, batch=1, warmup=False) as engine:
        assert isinstance(engine, Engine)
        latencies, found = open_loop(engine, feeds(4), 1e6, 0.0005)
        assert len(latencies) == len(found) == 500 and min(latencies) > 0
        assert np.mean(latencies[-50:]) > np.mean(latencies[:50])


def test_the_models_whose_gain_is_asked_for() -> None:
    assert CASES["mlp_1024"].target == 4.0 and CASES["mobilenetv2"].target == 0.98
    case: Case = CASES["mlp_1024"]
    assert len(case.feeds(3)) == 3 and case.feeds(1)[0]["x"].shape == (1, 1024)
    assert sum(np.prod(t.dims) for t in mlp().graph.initializer) == 3 * 1024 * 1024
    near = {"y": np.ones(3, np.float32)}
    assert case.agrees(near, near) and not case.agrees({"y": near["y"] + 0.01}, near)
