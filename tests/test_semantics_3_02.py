"""Section 3.2 of the specification, the batch size, row by row; with it the hints that decide streams and slots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.options import validated
from gpu_engine.runtime.sizing import (
    BatchPlan,
    Limits,
    capped,
    choose,
    formula,
    memory_cap,
    openvino_batch,
    openvino_cap,
    optimal_requests,
    resized,
)
from tests.recording_device import MakeEngine, RecordingDevice, double

GPU = Limits(auto_streams=2, asynchronous=True)
CPU = Limits(auto_streams=2, streams=64, batch=8)


@pytest.mark.parametrize(
    ("requests", "streams", "batch"),
    [
        (16, 2, 4),
        (4, 1, 2),
        (4, 2, 1),
        (1, 2, 1),
        (2, 2, 1),
        (3, 2, 1),
        (8, 2, 2),
        (9, 2, 2),
        (10, 2, 2),
        (16, 1, 8),
        (64, 2, 16),
        (128, 4, 16),
    ],
)
def test_the_formula(requests: int, streams: int, batch: int) -> None:
    assert formula(requests, streams) == batch
    options = validated(requests=requests, streams=streams)
    on_gpu, on_cpu = choose(options, GPU).batch, choose(options, CPU).batch
    assert (on_gpu.batch, on_gpu.limiting_factor) == (batch, "requests")
    assert on_cpu.batch == min(batch, 8)
    assert on_cpu.limiting_factor == ("device" if batch > 8 else "requests")


@given(batch=st.integers(1, 1000), streams=st.integers(1, 64))
def test_the_formula_inverts_the_optimal_requests(batch: int, streams: int) -> None:
    assert formula(optimal_requests(batch, streams), streams) == batch
    sizes = choose(validated(batch=batch, streams=streams), CPU)
    again = choose(validated(requests=sizes.optimal_requests, streams=streams), CPU)
    assert again.batch.batch == min(batch, 8)


@pytest.mark.parametrize("requests", [None, 0])
@pytest.mark.parametrize("streams", [1, 2, 7])
def test_unknown_requests_leave_the_choice_to_the_device(requests: int | None, streams: int) -> None:
    plan = choose(validated(requests=requests, streams=streams), CPU).batch
    assert (plan.batch, plan.limiting_factor) == (8, "device")
    assert choose(validated(requests=requests, streams=streams), GPU).batch.limiting_factor == "device"


def test_precedence() -> None:
    refused = Limits(auto_streams=2, refused="Softmax 's' normalizes over axis 0")
    explicit = choose(validated(batch=100, requests=16, streams=2), CPU).batch
    assert (explicit.batch, explicit.limiting_factor) == (100, "user")
    graph = choose(validated(batch=100, streams=2), refused)
    assert (graph.batch.batch, graph.batch.limiting_factor, graph.shared) == (1, "graph", False)
    assert "Softmax" in graph.batch.reason
    assert choose(validated(requests=64, streams=2, hint="latency"), CPU).batch.batch == 1
    assert choose(validated(batch=5, hint="LATENCY"), CPU).batch.batch == 5


def test_the_memory_cap() -> None:
    plan = BatchPlan(16, "because", "requests")
    assert capped(plan, memory_cap(free=1000, weights=200, row=100, slots=2)).batch == 4
    assert capped(plan, 4).limiting_factor == "memory"
    assert capped(plan, 16) is plan and capped(plan, None) is plan
    assert memory_cap(free=10, weights=200, row=100, slots=2) == 1
    assert memory_cap(free=10, weights=0, row=0, slots=2) is None
    sizes = choose(validated(requests=64, streams=2), GPU)
    small = resized(sizes, capped(sizes.batch, 3))
    assert (small.batch.batch, small.optimal_requests) == (3, 12)


@pytest.mark.parametrize(
    ("given_options", "limits", "expected"),
    [
        ({}, GPU, (1, 1, 1, False, 1)),
        ({}, CPU, (1, 1, 1, False, 1)),
        ({"hint": "latency"}, GPU, (1, 1, 1, False, 1)),
        ({"hint": "latency", "streams": 3}, GPU, (3, 1, 1, False, 3)),
        ({"hint": "throughput", "requests": 16}, GPU, (2, 2, 4, True, 16)),
        ({"hint": "throughput", "requests": 16}, CPU, (2, 1, 4, True, 16)),
        ({"streams": 1, "requests": 4}, CPU, (1, 1, 2, True, 4)),
        ({"requests": 16}, CPU, (1, 1, 8, True, 16)),
        ({"streams": "auto", "batch": 2}, GPU, (2, 2, 2, True, 8)),
        ({"streams": 0, "batch": 2}, CPU, (2, 1, 2, True, 8)),
        ({"scheduler": "sync", "streams": 8, "batch": 2}, CPU, (1, 1, 2, True, 4)),
        ({"scheduler": "async", "batch": 2}, CPU, (2, 1, 2, True, 8)),
        ({"scheduler": "elastic", "streams": 5, "batch": 2}, CPU, (5, 1, 2, True, 20)),
        ({"streams": 2, "auto_batching": False}, CPU, (2, 1, 1, False, 4)),
        ({"auto_batching": True}, CPU, (1, 1, 8, True, 16)),
    ],
)
def test_streams_slots_and_hints(given_options: dict[str, Any], limits: Limits, expected: tuple[Any, ...]) -> None:
    sizes = choose(validated(**given_options), limits)
    assert (sizes.streams, sizes.slots, sizes.batch.batch, sizes.shared, sizes.optimal_requests) == expected


def test_numa_streams_count_the_nodes() -> None:
    assert choose(validated(streams="numa"), Limits(auto_streams=9, numa_nodes=3)).streams == 3


@pytest.mark.parametrize(
    ("optimal", "requests", "batch"), [(16, 12, 12), (8, 16, 8), (8, 2, 1), (8, None, 8), (2, 9, 1)]
)
def test_the_batch_of_openvino(optimal: int, requests: int | None, batch: int) -> None:
    assert openvino_batch(optimal, requests) == batch


@pytest.mark.parametrize(
    ("batch", "total", "footprint", "expected"),
    [
        (12, 5000, 1000, 4),
        (12, 40960000, 1024000, 12),
        (24, 18000, 1000, 16),
        (32, 180000, 1000, 32),
        (8, 1000, 1000, 1),
        (8, 0, 1000, 1),
        (8, 5000, 0, 8),
    ],
)
def test_the_memory_cap_of_openvino(batch: int, total: int, footprint: int, expected: int) -> None:
    assert openvino_cap(batch, total, footprint) == expected


def test_the_policy_is_an_option() -> None:
    plan = choose(validated(requests=16, streams=2, batch_policy="openvino"), GPU).batch
    assert (plan.batch, plan.limiting_factor) == (16, "requests")
    assert choose(validated(requests=2, streams=2, batch_policy="openvino"), GPU).batch.batch == 1
    assert choose(validated(requests=16, batch=3, batch_policy="openvino"), GPU).batch.batch == 3
    with pytest.raises(ValueError, match="batch_policy must be one of formula, openvino, given 'ov'"):
        validated(batch_policy="ov")


def test_the_memory_cap_counts_every_arena(make_engine: MakeEngine) -> None:
    """(free * fraction - weights) // (a row's activations * slots); the factor is recorded, before the device's."""
    device = RecordingDevice(double, asynchronous=True, free_nbytes=10_000, row_nbytes=500)
    engine = make_engine(device, streams=2, requests=64)
    plan = engine.explain_batching()
    assert plan.batch == int(10_000 * 0.9 - 1000) // (500 * 4) == 4
    assert (plan.limiting_factor, engine.memory_plan().activations) == ("memory", 8000)
    assert "= 16, limited to 4 by free memory" in plan.reason
    small = RecordingDevice(double, free_nbytes=10_000, row_nbytes=500, batch_limit=2)
    assert make_engine(small, streams=2, requests=64).explain_batching().limiting_factor == "device"
