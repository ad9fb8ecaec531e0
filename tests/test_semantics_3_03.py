"""Section 3.3 of the specification, the batcher, beside tests/test_scheduler.py and tests/test_equivalence.py: buckets,
bits that do not depend on the batch, warm-up that measures, and callers that come back together."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import gpu_engine
from cpu_fallback.device import CpuDevice
from gpu_engine.errors import ExecutionError
from gpu_engine.runtime import rounds as rounds_of_slots
from gpu_engine.runtime.buckets import bucket, powers
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.warmup import Measured
from tests.recording_device import (
    F32,
    MakeEngine,
    RecordingDevice,
    double,
    occupy,
    plain,
    plan_of,
    rows,
    until,
)


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_buckets_are_powers_of_two_below_the_batch_and_the_batch(batch: int, sizes: tuple[int, ...]) -> None:
    assert powers(batch) == sizes
    for n in range(1, batch + 1):
        assert bucket(n, sizes) == min(size for size in sizes if size >= n)
    assert bucket(batch + 1, sizes) == batch + 1 and bucket(0, sizes) == 0


class Launches:
    """A model that keeps what it was given."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []

    def __call__(self, x: Any) -> list[Any]:
        self.inputs.append(x.copy())
        return double(x)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_the_smallest_bucket_runs_and_the_last_row_is_repeated(
    make_engine: MakeEngine, asynchronous: bool, count: int
) -> None:
    model = Launches()
    recorder = RecordingDevice(model, asynchronous=asynchronous, bucketed=True)
    engine = make_engine(recorder, streams=1, batch=6)
    found = engine.run(rows(*range(count)))
    size = bucket(count, (1, 2, 4, 6))
    assert [launch.rows for launch in recorder.launches] == [size]
    np.testing.assert_array_equal(model.inputs[0], rows(*range(count), *[count - 1] * (size - count)))
    np.testing.assert_array_equal(found, double(rows(*range(count)))[0])
    counts = engine.statistics()
    assert (counts.padded_rows, counts.inference_count, counts.batch_sizes) == (size - count, count, {count: 1})


def test_requests_of_a_bucket_get_their_own_rows(make_engine: MakeEngine) -> None:
    """Blocks of several elements of axis 0, and an output of its own extent."""
    recorder = RecordingDevice(lambda x: [np.repeat(x, 2, axis=0)], asynchronous=True, bucketed=True)
    plan = plan_of({"x": (F32, ("3*N", 4))}, {"y": (F32, ("6*N", 4))})
    engine = make_engine(recorder, plan, streams=1, batch=8)
    occupied = occupy(engine, recorder, np.zeros((3, 4), F32))
    inputs = [np.full((3, 4), i, F32) for i in range(5)]
    futures = [engine.submit(x) for x in inputs]
    recorder.release()
    for x, future in zip(inputs, futures, strict=True):
        np.testing.assert_array_equal(future.result(30), np.repeat(x, 2, axis=0))
    assert [future.result(30).shape for future in occupied] == [(6, 4)] * 2
    assert [launch.rows for launch in recorder.launches] == [3, 3, 24] and engine.statistics().padded_rows == 3


def test_a_device_without_buckets_runs_exact_sizes(make_engine: MakeEngine, recorder: RecordingDevice) -> None:
    engine = make_engine(recorder, streams=1, batch=8)
    engine.run(rows(*range(5)))
    assert recorder.launches[0].rows == 5 and engine.statistics().padded_rows == 0
    assert not CpuDevice.bucketed


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_deterministic_uses_one_bucket_where_bits_may_differ(make_engine: MakeEngine, count: int) -> None:
    recorder = RecordingDevice(double, bits=False)
    engine = make_engine(recorder, streams=1, batch=8, deterministic=True)
    np.testing.assert_array_equal(engine.run(rows(*range(count))), double(rows(*range(count)))[0])
    assert {launch.rows for launch in recorder.launches} == {8}
    known = RecordingDevice(double, bits=True)
    make_engine(known, streams=1, batch=8, deterministic=True).run(rows(1, 2, 3))
    assert known.launches[0].rows == 3


def test_deterministic_cuts_requests_of_an_engine_that_joins_none(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double, bits=False)
    engine = make_engine(recorder, hint="latency", deterministic=True)
    np.testing.assert_array_equal(engine.run(rows(1, 2, 3)), double(rows(1, 2, 3))[0])
    assert [launch.rows for launch in recorder.launches] == [1, 1, 1]


def product_model(width: int = 40, recurrent: bool = False) -> onnx.ModelProto:
    """x [N, 3, width] through a product whose rows are 3 N, or an LSTM over 3 steps of N rows, then Relu."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((width, width), F32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"])]
    if recurrent:
        weights = {f"w{i}": random.standard_normal((1, 4 * width, width), F32) / 8 for i in range(2)}
        nodes = [
            helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
            helper.make_node("LSTM", ["steps", "w0", "w1"], ["sequence", "", ""], hidden_size=width),
            helper.make_node("Squeeze", ["sequence", "one"], ["squeezed"]),
            helper.make_node("Transpose", ["squeezed"], ["m"], perm=[1, 0, 2]),
        ]
        weights["one"] = np.array([1])  # type: ignore[assignment]
    nodes.append(helper.make_node("Relu", ["m"], ["y"]))
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, width]) for name in "xy"]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "product", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_a_row_do_not_depend_on_its_batch(recurrent: bool, threads: int) -> None:
    """Every composition of up to 9 rows; without `deterministic` small tiles sum in an order of their own."""
    inputs = np.random.default_rng(1).standard_normal((9, 3, 40), F32)
    options: dict[str, Any] = {"device": "cpu", "streams": 1, "threads": threads, "batch": 16, "warmup": False}
    with gpu_engine.compile(product_model(recurrent=recurrent), deterministic=True, **options) as engine:
        assert isinstance(engine, Engine)
        alone = np.concatenate([engine.run(x[None]) for x in inputs])
        for count in range(2, 10):
            for start in range(0, 10 - count):
                together = engine.run(inputs[start : start + count])
                assert together.tobytes() == alone[start : start + count].tobytes()
        assert engine.statistics().padded_rows == 0


@pytest.mark.parametrize("options", [{"streams": 1, "batch": 4}, {"hint": "latency"}, {"deterministic": True}])
def test_no_rows_are_answered_without_a_launch(options: dict[str, Any]) -> None:
    with gpu_engine.compile(product_model(), device="cpu", warmup=False, **options) as engine:
        assert isinstance(engine, Engine)
        for call in (
            engine.run,
            engine.run_many,
            lambda x: engine.submit(x).result(0),
            lambda x: next(engine.map([x])),
        ):
            found = call(np.zeros((0, 3, 40), F32))
            assert (found.shape, found.dtype) == ((0, 3, 40), F32)
        assert engine.statistics().execution_count == 0


def test_the_costs_decide_how_many_rows() -> None:
    calls = Measured({1: 1e-3, 2: 1.05e-3, 4: 1.1e-3, 8: 1.2e-3})
    arithmetic = Measured({1: 1e-3, 2: 2.01e-3, 4: 4.2e-3, 8: 9e-3})
    up_to_four = Measured({1: 1e-3, 2: 1.2e-3, 4: 1.6e-3, 8: 3.3e-3})
    assert (calls.batch, arithmetic.batch, up_to_four.batch) == (8, 1, 4)
    assert Measured({1: 1e-6, 2: 2e-6, 4: 4e-6, 8: 8e-6}).batch == 8, "an execution costs something beside the device"
    assert str(calls) == "measured 1: 1 ms, 2: 1.05 ms, 4: 1.1 ms, 8: 1.2 ms"


def working(row_s: float, call_s: float) -> Any:
    """`double`, which computes so long."""

    def model(x: Any) -> list[Any]:
        ends = time.thread_time() + call_s + row_s * len(x)
        while time.thread_time() < ends:
            pass
        return double(x)

    return model


@pytest.mark.parametrize(("row_s", "call_s", "batch"), [(5e-3, 0.0, 1), (1e-5, 2e-3, 8)])
def test_warmup_measures_and_uses_what_a_batch_costs(
    make_engine: MakeEngine, row_s: float, call_s: float, batch: int
) -> None:
    recorder = RecordingDevice(working(row_s, call_s), batch_limit=8)
    engine = make_engine(recorder, streams=2, requests=32, warmup=True)
    plan, factor = engine.explain_batching(), "device" if batch < 8 else "requests"
    assert (plan.batch, plan.limiting_factor, engine.batch) == (batch, factor, batch)
    assert "32 requests // (2 streams * 2) = 8; measured 1: " in plan.reason and f": {batch}" in plan.reason
    assert engine.optimal_requests == batch * 2 * 2
    assert engine.statistics().inference_count == 0, "rows of the warm-up are nobody's"
    futures = [engine.submit(rows(i)) for i in range(24)]
    for i, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(30), double(rows(i))[0])
    assert max(engine.statistics().batch_sizes) <= batch


def test_an_explicit_batch_is_never_changed_and_the_formula_never_exceeded(make_engine: MakeEngine) -> None:
    slow = RecordingDevice(working(5e-3, 0.0), batch_limit=8)
    engine = make_engine(slow, streams=1, batch=16, warmup=True)
    assert (engine.batch, engine.explain_batching().limiting_factor) == (16, "user")
    calls = RecordingDevice(working(1e-5, 2e-3), batch_limit=8)
    assert make_engine(calls, streams=2, requests=16, warmup=True).batch == 4


def test_warmup_can_be_switched_off_and_asked_for(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(working(5e-3, 0.0), batch_limit=8)
    engine = make_engine(recorder, streams=2, requests=16, warmup=False)
    assert not recorder.launches and engine.batch == 4
    assert engine.warmup().batch == engine.batch == 1
    with pytest.raises(TypeError, match="warmup must be True, False"):
        make_engine(recorder, warmup=1)


def test_open_extents_are_measured_with_the_rows_of_requests(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(working(5e-3, 0.0), batch_limit=8)
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    engine = make_engine(recorder, plan, streams=1, requests=16, warmup=True)
    assert not recorder.launches
    for _ in range(20):
        futures = [engine.submit(rows(i)) for i in range(8)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(30), double(rows(i))[0])
    assert "at [1, 4]: 1" in engine.explain_batching().reason and engine.batch == 8
    before = len(recorder.launches)
    [future.result(30) for future in [engine.submit(rows(i)) for i in range(8)]]
    assert [launch.rows for launch in recorder.launches[before:]] == [1] * 8
    for width in range(5, 12):
        assert engine.warmup(np.zeros((1, width), F32)).reason.endswith(f"at [1, {width}]: 1")
    assert engine.explain_batching().reason.count("measured") == 4, "the last few are told"


def test_a_model_that_refuses_made_up_inputs_is_measured_with_requests(make_engine: MakeEngine) -> None:
    def particular(x: Any) -> list[Any]:
        if (x < 2).any():
            raise ExecutionError("Gather 'g': an index is out of range")
        return working(5e-3, 0.0)(x)

    engine = make_engine(RecordingDevice(particular, batch_limit=8), streams=1, requests=16, warmup=True)
    assert engine.batch == 8
    with pytest.raises(ExecutionError, match="out of range"):
        engine.warmup()
    for _ in range(20):
        futures = [engine.submit(rows(2 + i)) for i in range(3)]
        [future.result(30) for future in futures]
    assert engine.batch == 1


def test_warmup_switches_off_batches_that_mix_rows(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(lambda x: [x + x.mean(axis=0, keepdims=True)])
    engine = make_engine(recorder, streams=1, batch=4, warmup=True)
    plan = engine.explain_batching()
    assert (plan.batch, plan.limiting_factor) == (1, "graph")
    assert "output 0 differs in 12 of 12 elements between rows together and rows alone" in plan.reason
    before = len(recorder.launches)
    futures = [engine.submit(rows(i)) for i in range(5)]
    for i, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(30), 2 * rows(i))
    assert [launch.rows for launch in recorder.launches[before:]] == [1] * 5


def test_callers_of_a_batch_come_back_together(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deviation: after a batch of several requests its callers have a tenth of its time to come back."""
    monkeypatch.setattr(rounds_of_slots, "RETURN_S", 10.0)
    monkeypatch.setattr(rounds_of_slots, "RETURN_SHARE", 1e6)
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, plain(), streams=1, batch=4)
    occupied = occupy(engine, recorder, rows(9))
    first = [engine.submit(rows(i)) for i in range(4)]
    recorder.release()
    for future in [*occupied, *first]:
        future.result(30)
    second = []
    for i in range(4):
        second.append(engine.submit(rows(i)))
        time.sleep(0.01)
    for future in second:
        future.result(30)
    assert [launch.rows for launch in recorder.launches] == [1, 4, 4]
    monkeypatch.setattr(rounds_of_slots, "RETURN_S", 0.0)


def test_a_lone_request_is_never_held_back(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_of_slots, "RETURN_S", 100.0)
    monkeypatch.setattr(rounds_of_slots, "RETURN_SHARE", 1e9)
    engine = make_engine(RecordingDevice(double), streams=1, batch=4)
    for i in range(20):
        np.testing.assert_array_equal(engine.submit(rows(i)).result(10), double(rows(i))[0])


def test_with_nothing_queued_no_thread_spins(make_engine: MakeEngine) -> None:
    engine = make_engine(RecordingDevice(double), streams=2, batch=4)
    [future.result(30) for future in [engine.submit(rows(i)) for i in range(16)]]
    until(lambda: engine.statistics().waiting == 0)
    time.sleep(0.01)
    started = time.process_time()
    threading.Event().wait(0.2)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("partial", ["together", "individual"])
def test_partial_batches_run_together_or_each_request_alone(make_engine: MakeEngine, partial: str) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, plain(), streams=1, batch=4, partial=partial)
    occupied = occupy(engine, recorder, rows(0))
    futures = [engine.submit(rows(i)) for i in range(6)]
    recorder.release()
    for i, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(30), double(rows(i))[0])
    occupied[0].result(30)
    assert [launch.rows for launch in recorder.launches] == [1, 4, *([2] if partial == "together" else [1, 1])]
    with pytest.raises(ValueError, match="partial must be one of together, individual, given 'alone'"):
        make_engine(recorder, partial="alone")
