"""The CPU device as the engine uses it: slots, streams, memory, errors."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_fallback import blas
from cpu_fallback import stream as stream_module
from cpu_fallback.device import CpuDevice
from cpu_fallback.stream import CACHED_BINDINGS, CpuStream
from gpu_engine.errors import DeviceError, ExecutionError, OutOfMemory
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Gather, LayerNorm, Map, MatMul, Reshape, Softmax, Transpose
from gpu_engine.ir.ops.array import Array as ArrayOp
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.device import Device, Slot, Stream
from tests.cpu_execution import DEVICE, lowered, run_graph, run_slot
from tests.reference import graph_of
from tests.reference import run_graph as run_reference

Array = NDArray[Any]
N, S = dims.symbol("N"), dims.symbol("S")
X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
WEIGHT = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)


def block(builder: Builder, x: Value) -> Value:
    """A small transformer-like chain over [N, S, 16]."""
    weight = builder.constant(WEIGHT)
    y = builder.emit(MatMul(epilogue=expr.tanh(X)), x, weight)
    y = builder.emit(LayerNorm(2, 1e-5), builder.emit(Map(X + Y), y, x))
    turned = builder.emit(Transpose((0, 2, 1)), y)
    return builder.emit(Softmax(2), builder.emit(MatMul(), y, turned))


GRAPH = graph_of({"x": (N, S, 16)}, block)


def example(rows: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, rows, length)).standard_normal((rows, length, 16)).astype(np.float32)


def expected(x: Array) -> Array:
    return np.asarray(run_reference(GRAPH, {"x": x})["y"])


def opened(plan: Plan, streams: int = 1, slots: int = 1) -> list[CpuStream]:
    return list(DEVICE.open(plan, streams, slots, None))


def test_it_is_a_device() -> None:
    device: Device = CpuDevice()
    assert device.name == "cpu" and "bit vectors" in device.reason and not device.asynchronous
    assert device.batch_limit == 8 and device.stream_limit == device.auto_streams() >= 1
    with pytest.raises(DeviceError, match="cpu:1"):
        CpuDevice(1)
    plan = lowered(GRAPH)
    (lane,) = opened(plan)
    stream: Stream = lane
    slot: Slot = stream.slots[0]
    assert len(slot.stage((2, 3))) == 1
    stream.close()


def test_any_shape_on_poisoned_memory() -> None:
    plan = lowered(GRAPH)
    (stream,) = opened(plan, slots=2)
    for rows, length in ((2, 3), (1, 1), (3, 40), (2, 3), (5, 7), (1, 1), (0, 4), (3, 40)):
        for slot in stream.slots:
            x = example(rows, length)
            (found,) = run_slot(slot, plan, [x])
            np.testing.assert_allclose(found, expected(x), rtol=1e-5, atol=1e-6)
    stream.close()


def test_results_stay_while_another_slot_runs() -> None:
    plan = lowered(GRAPH)
    (stream,) = opened(plan, slots=2)
    first, second = stream.slots
    a, b = example(2, 3), example(4, 30)
    first.stage((2, 3))[0][...] = a
    first.launch()
    (kept,) = first.wait()
    second.stage((4, 30))[0][...] = b
    second.launch()
    np.testing.assert_allclose(kept, expected(a), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second.wait()[0], expected(b), rtol=1e-5, atol=1e-6)
    stream.close()


def test_streams_run_at_once_from_threads() -> None:
    plan = lowered(GRAPH)
    streams = opened(plan, streams=2, slots=2)
    failures: list[BaseException] = []

    def serve(index: int) -> None:
        try:
            streams[index].enter()
            for i in range(40):
                x = example(1 + i % 3, 1 + (i * 7 + index) % 20, index)
                slot = streams[index].slots[i % 2]
                slot.stage(x.shape[:2])[0][...] = x
                slot.launch()
                np.testing.assert_allclose(slot.wait()[0], expected(x), rtol=1e-5, atol=1e-6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        stream.close()
    assert not failures, failures[0]


def test_more_shapes_than_bindings_are_kept() -> None:
    plan = lowered(GRAPH)
    (stream,) = opened(plan)
    slot = stream.slots[0]
    for _ in range(2):
        for length in range(1, CACHED_BINDINGS + 9):
            slot.stage((1, length))
    assert len(slot._cache) <= CACHED_BINDINGS
    x = example(1, 2)
    np.testing.assert_allclose(run_slot(slot, plan, [x])[0], expected(x), rtol=1e-5, atol=1e-6)
    stream.close()


def test_threads_are_pinned_to_disjoint_cores() -> None:
    plan = lowered(GRAPH)
    device = CpuDevice()
    device._cores = dataclasses.replace(device._cores, own=True)
    streams = list(device.open(plan, len(device._cores.numbers), 1, None))
    seen = []
    for stream in streams:
        thread = threading.Thread(target=lambda lane=stream: (lane.enter(), seen.append(os.sched_getaffinity(0))))
        thread.start()
        thread.join()
        stream.close()
    assert [sorted(cores) for cores in seen] == [list(stream.cores) for stream in streams]
    assert [core for cores in seen for core in sorted(cores)] == list(device._cores.numbers)


def test_cores_that_others_share_are_not_pinned_to() -> None:
    """A quota says how many, not which."""
    device, plan = CpuDevice(), lowered(GRAPH)
    device._cores = dataclasses.replace(device._cores, own=False)
    (stream,) = device.open(plan, 1, 1, None)
    before = os.sched_getaffinity(0)
    stream.enter()
    assert os.sched_getaffinity(0) == before and stream.cores == ()
    stream.close()


def test_blas_is_held_to_one_thread_where_array_steps_may_call_it() -> None:
    gather = graph_of({"x": (N, 4), "i": (INT64, (S,))}, lambda b, x, i: b.emit(Gather(0), x, i))
    for graph, held in ((GRAPH, False), (gather, True)):
        plan, before = lowered(graph), list(blas._CAPS)
        assert plan.program.segments[0].only_native != held
        (stream,) = opened(plan)
        assert list(blas._CAPS) == before + [1] * held
        stream.close()
        stream.close()
        assert list(blas._CAPS) == before


def test_memory_is_known_beforehand() -> None:
    plan = lowered(GRAPH)
    weights, small = DEVICE.memory(plan, (1, 8))
    _, large = DEVICE.memory(plan, (4, 8))
    assert weights == WEIGHT.nbytes and 0 < small < large
    (stream,) = opened(plan)
    slot = stream.slots[0]
    slot.stage((4, 8))
    assert slot._arenas[0].array.nbytes + slot._ports[0].array.nbytes >= large
    stream.close()
    assert DEVICE.free_memory() > 0


def test_what_cannot_fit_is_refused_before_allocating(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lowered(GRAPH)
    (stream,) = opened(plan)
    slot = stream.slots[0]
    with pytest.raises(OutOfMemory, match=r"bytes is needed"):
        slot.stage((1 << 20, 1 << 12))
    monkeypatch.setattr(stream_module, "free_memory", lambda: 3 << 20)
    with pytest.raises(OutOfMemory, match=r"3,145,728 are free"):
        slot.stage((64, 256))
    monkeypatch.undo()
    x = example(2, 3)
    np.testing.assert_allclose(run_slot(slot, plan, [x])[0], expected(x), rtol=1e-5, atol=1e-6)
    stream.close()


def test_an_error_belongs_to_one_launch() -> None:
    graph = graph_of({"x": (N, 4), "i": (INT64, (S,))}, lambda b, x, i: b.emit(Map(X + 1), b.emit(Gather(0), x, i)))
    plan = lowered(graph)
    (stream,) = opened(plan)
    slot = stream.slots[0]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with pytest.raises(ExecutionError, match=r"Test 'node': Gather of float32\[2, 4\], int64\[1\]: an index outside"):
        run_slot(slot, plan, [x, np.array([2])])
    np.testing.assert_array_equal(run_slot(slot, plan, [x, np.array([1])])[0], x[1:] + 1)
    stream.close()


def test_outputs_of_every_origin() -> None:
    """An input, a constant, an alias of an input and the same value twice may all be outputs."""

    def build(builder: Builder, x: Value) -> tuple[Value, ...]:
        doubled = builder.emit(Map(X * 2), x)
        flat, more = builder.emit(Reshape((N * 2,)), x), builder.emit(Map(X + 1), doubled)
        return x, builder.constant(np.float32([1, 2])), flat, doubled, doubled, more

    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = list(run_graph(graph_of({"x": (N, 2)}, build), {"x": x}).values())
    for actual, wanted in zip(found, (x, np.float32([1, 2]), x.ravel(), x * 2, x * 2, x * 2 + 1), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_a_later_segment_reads_what_an_earlier_one_owns() -> None:
    """Sizes of `x` occur among the later segment's numbers for no other reason than how much it moves."""
    some = dims.symbol("u1")

    def build(builder: Builder, x: Value, c: Value) -> Value:
        picked = builder.emit(ArrayOp(picks, (TensorType(FLOAT32, (some,)),), binds=("u1",)), c)
        return builder.emit(Map(X + Y), x, picked)

    graph = graph_of({"x": (N,), "c": (S,)}, build)
    for rows, values in ((1, [-1.0, 2.0, 3.0]), (2, [4.0, -1.0, 5.0]), (3, [7.0])):
        x, c = np.arange(rows, dtype=np.float32), np.float32(values)
        found = run_graph(graph, {"x": x, "c": c})
        np.testing.assert_array_equal(next(iter(found.values())), x + c[c > 0])


def picks(xp: Any, c: Any) -> Any:
    return c[c > 0]


def test_weights_cannot_be_written_through_an_output() -> None:
    def build(builder: Builder, x: Value) -> tuple[Value, ...]:
        return builder.constant(np.float32([1, 2])), builder.emit(Map(X + 1), x)

    plan = lowered(graph_of({"x": (2,)}, build))
    (stream,) = opened(plan)
    slot = stream.slots[0]
    slot.stage(())[0][...] = 0
    slot.launch()
    assert not slot.wait()[0].flags.writeable and slot.wait()[1].flags.writeable
    stream.close()


def test_layers_share_kernels() -> None:
    def build(builder: Builder, x: Value) -> Value:
        for scale in range(5):
            x = builder.emit(Map(expr.tanh(X * (0.1 + scale / 100))), x)
            x = builder.emit(Softmax(1), x)
        return x

    plan = lowered(graph_of({"x": (N, 7)}, build))
    assert len({step.kernel.kernel for step in plan.steps}) == 2 and len(plan.steps) == 10
    segment = plan.program.segments[0]
    assert segment.only_native and len(segment.array_steps) == 1
