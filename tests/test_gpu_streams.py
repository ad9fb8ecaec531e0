"""Two batches in flight on every stream of the CUDA device: what overlaps, what waits, what the steady path calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from onnx import helper

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.gpu.footprint import slot_memory
from gpu_engine.gpu.graphs import NODE_NBYTES
from gpu_engine.runtime.buckets import BucketStream, bucket, powers
from gpu_engine.runtime.late import load
from gpu_engine.tools.stages import read_named, stages_of
from tests import fake_cupy
from tests.recording_cuda import Call, Costs, Gpu
from tests.test_gpu_cuda import network, products, replace_modules

STEADY = {"memcpyAsync", "eventRecord", "streamWaitEvent", "graphLaunch", "eventSynchronize"}
LONG = Costs(copy_s=1e-3, kernel_s=10e-3)
MakeGpu = Callable[..., Gpu]


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeGpu]:
    """A recorded GPU, which nobody may do to what CUDA forbids."""
    made: list[Gpu] = []

    def make(**options: Any) -> Gpu:
        made.append(Gpu(**options))
        replace_modules(monkeypatch, made[-1])
        return made[-1]

    yield make
    sys.modules.pop("gpu_engine.gpu.cuda", None)
    assert [gpu.violations for gpu in made] == [[] for _ in made]


def opened(model: Any, streams: int = 1) -> list[Any]:
    """The device's own streams, with two slots each."""
    device = load("gpu_engine.gpu.cuda:CudaDevice")(0, "fp32", fake_cupy.binary_source)
    plan = stages_of(read_named(model), device.lower).plan
    return list(device.open(plan, streams, 2, None))


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The second output of `network`."""
    return np.tanh(x * 2 + np.arange(6, dtype=np.float32) / 10).sum(axis=1)


class Drive:
    """Batches on the slots of a stream in turn, as the threads of a pool run them under load."""

    def __init__(self, stream: Any, rows: int = 4) -> None:
        self.slots, self.rows = stream.slots, rows
        self.flying: list[tuple[Any, np.ndarray[Any, Any]]] = []
        self.random = np.random.default_rng(0)

    def run(self, batches: int) -> None:
        for i in range(batches):
            slot = self.slots[i % 2]
            if len(self.flying) == 2:
                self.land()
            x = self.random.standard_normal((self.rows, 6), np.float32)
            (staged,) = slot.stage((self.rows,))
            staged[...] = x
            slot.launch()
            self.flying.append((slot, x))
        while self.flying:
            self.land()

    def land(self) -> None:
        slot, x = self.flying.pop(0)
        half, sums = slot.wait()
        np.testing.assert_allclose(sums, expected(x), rtol=1e-4, atol=1e-5)
        assert half.dtype == np.float16


def of_name(calls: list[Call], name: str) -> list[Call]:
    return [call for call in calls if call.name == name]


@pytest.mark.parametrize("late", [True, False])
def test_copies_overlap_what_the_other_slot_computes(make_gpu: MakeGpu, late: bool) -> None:
    gpu = make_gpu(costs=LONG, late=late)
    (stream,) = opened(network())
    drive = Drive(stream)
    drive.run(4)
    gpu.calls.clear()
    drive.run(5)
    uploads, batches = of_name(gpu.calls, "in"), gpu.of("graphLaunch")
    downloads = of_name(gpu.calls, "out")[::2]
    assert len(uploads) == len(batches) == len(downloads) == 5
    for upload, batch in zip(uploads, batches, strict=True):
        assert upload.ended_s <= batch.begun_s
    for upload, before in zip(uploads[1:], batches, strict=False):
        assert upload.begun_s < before.ended_s, "the next upload waits for the batch that computes"
    for download, batch in zip(downloads, batches, strict=True):
        assert download.begun_s >= batch.ended_s
    gaps = [after.begun_s - before.ended_s for before, after in pairwise(batches)]
    assert max(gaps[1:]) < 1e-9, "the stream idles, or waits for a download, between batches"
    assert len({upload.stream for upload in (*uploads, *downloads, *batches)}) == 3


def test_the_steady_path_launches_one_graph_and_waits_for_its_own_event(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    drive = Drive(stream)
    drive.run(4)
    gpu.calls.clear()
    drive.run(4)
    assert set(gpu.kinds()) == STEADY
    assert len(gpu.of("graphLaunch")) == len(gpu.of("eventSynchronize")) == 4
    assert len(gpu.calls) == 4 * 10


def test_slots_stage_into_memory_of_their_own(make_gpu: MakeGpu) -> None:
    make_gpu()
    (stream,) = opened(network())
    first, second = [slot.stage((3,))[0] for slot in stream.slots]
    first[...], second[...] = 1, 2
    for slot in stream.slots:
        slot.launch()
    for slot, value in zip(stream.slots, (1, 2), strict=True):
        np.testing.assert_allclose(slot.wait()[1], expected(np.full((3, 6), value, np.float32)), rtol=1e-4)


def test_a_launch_that_nobody_waited_for_is_ended_before_its_memory_is_used_again(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    gpu.calls.clear()
    slot.stage((3,))[0][...] = 1
    slot.launch()
    assert not gpu.of("streamSynchronize")
    slot.stage((3,))[0][...] = 2
    assert len(gpu.of("streamSynchronize")) == 3
    slot.launch()
    np.testing.assert_allclose(slot.wait()[1], expected(np.full((3, 6), 2, np.float32)), rtol=1e-4)


def in_flight(gpu: Gpu) -> dict[int, int]:
    """{stream: the most batches that were launched there and not yet waited for}."""
    last, batches, most = {}, {}, dict[int, int]()
    outward = {call.stream for call in gpu.of("memcpyAsync") if call.name == "out"}
    for call in gpu.calls:
        if call.kind == "eventRecord" and call.stream in outward:
            last[call.address] = call.stream
            batches.setdefault(call.stream, set()).add(call.address)
        elif call.kind == "eventSynchronize":
            batches[last[call.address]].discard(call.address)
        for stream, found in batches.items():
            most[stream] = max(most.get(stream, 0), len(found))
    return most


@pytest.mark.parametrize("streams", [1, 2])
def test_two_batches_are_in_flight_on_every_stream_under_load(make_gpu: MakeGpu, streams: int) -> None:
    gpu = make_gpu(costs=Costs(kernel_s=4e-3), pace=1.0)
    rows = np.random.default_rng(0).standard_normal((32, 6), np.float32)
    with gpu_engine.compile(network(), device="cuda", streams=streams, batch=2, warmup=False) as engine:
        found = list(engine.map([row[None] for row in rows]))
        assert engine.statistics().max_in_flight == (2,) * streams
    np.testing.assert_allclose([sums[0] for _, sums in found], expected(rows), rtol=1e-4, atol=1e-5)
    assert list(in_flight(gpu).values()) == [2] * streams


def test_sixteen_requests_on_two_streams_are_batches_of_four(make_gpu: MakeGpu) -> None:
    gpu = make_gpu(costs=Costs(kernel_s=10e-3), pace=1.0)
    rows = np.random.default_rng(0).standard_normal((16, 6), np.float32)
    with gpu_engine.compile(network(), device="cuda", streams=2, requests=16, warmup=False) as engine:
        assert engine.batch == 4
        found = list(engine.map([row[None] for row in rows]))
        assert engine.statistics().batch_sizes == {4: 4}
    np.testing.assert_allclose([sums[0] for _, sums in found], expected(rows), rtol=1e-4, atol=1e-5)
    uploads = of_name(gpu.calls, "in")
    assert [call.nbytes for call in uploads] == [4 * 24] * 4 and len({call.stream for call in uploads}) == 2


def test_requests_of_any_size_run_on_their_smallest_bucket_without_compiling(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    rng = np.random.default_rng(0)
    with gpu_engine.compile(network(), device="cuda", streams=1, batch=64, warmup=False) as engine:
        loads = len(gpu.of("moduleLoadData"))
        assert loads == len(engine.plan.program.kernels)
        for rows in (64, 1, 33, 5):
            gpu.calls.clear()
            x = rng.standard_normal((rows, 6), np.float32)
            np.testing.assert_allclose(engine.run([x])[1], expected(x), rtol=1e-4, atol=1e-5)
            assert [call.nbytes for call in of_name(gpu.calls, "in")] == [24 * bucket(rows, powers(64))]
            assert not gpu.of("moduleLoadData")


def test_after_preparing_every_size_is_one_graph_launch(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    device = load("gpu_engine.gpu.cuda:CudaDevice")(0, "fp32", fake_cupy.binary_source)
    plan = stages_of(read_named(network()), device.lower).plan
    streams = [BucketStream(stream, plan, lambda extents: powers(4)) for stream in device.open(plan, 1, 2, None)]
    for stream in streams:
        stream.prepare((1,), [np.ones((1, 6), np.float32)])
    assert len(gpu.graphs) == 2 * 3
    gpu.calls.clear()
    for slot in (slot for stream in streams for slot in stream.slots):
        for rows in (3, 1, 4, 2):
            x = np.random.default_rng(rows).standard_normal((rows, 6), np.float32)
            slot.stage((rows,))[0][...] = x
            slot.launch()
            np.testing.assert_allclose(slot.wait()[1], expected(x), rtol=1e-4, atol=1e-5)
    assert set(gpu.kinds()) == STEADY and len(gpu.of("graphLaunch")) == 8


def test_threads_that_serve_a_stream_stay_on_its_device(make_gpu: MakeGpu) -> None:
    make_gpu(devices=2)
    device = load("gpu_engine.gpu.cuda:CudaDevice")(1, "fp32", fake_cupy.binary_source)
    plan = stages_of(read_named(network()), device.lower).plan
    (stream,) = device.open(plan, 1, 2, None)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fake_cupy.current_device).result() == 0
        pool.submit(stream.enter).result()
        pool.submit(Drive(stream).run, 3).result()
        assert pool.submit(fake_cupy.current_device).result() == 1
    Drive(stream).run(2)
    assert fake_cupy.current_device() == 0


def test_an_output_that_is_an_input(make_gpu: MakeGpu) -> None:
    make_gpu()
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])], "same",
        *([helper.make_tensor_value_info(name, 1, ["n", 2]) for name in names] for names in ("x", "yz")),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with gpu_engine.compile(model, device="cuda") as engine:
        for x in (np.ones((3, 2), np.float32), np.zeros((2, 2), np.float32)):
            for found, sign in zip(engine.run([x]), (1, -1), strict=True):
                np.testing.assert_array_equal(found, sign * x)


def test_what_a_slot_takes_is_known_before(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    used = gpu.used_nbytes()
    slot.stage((5,))
    found = slot_memory(slot._plan, (5,))
    assert gpu.used_nbytes() - used == found.activations_nbytes
    assert gpu.used_nbytes(pinned=True) == found.staging_nbytes
    assert found.graphs_nbytes == NODE_NBYTES * len(slot._plan.steps)


def test_weights_are_there_once_whatever_the_number_of_streams(make_gpu: MakeGpu) -> None:
    used, weights = [], 2 * (32 * 48 + 48 * 16)
    for streams in (1, 4):
        gpu = make_gpu()
        kept = opened(products(), streams)
        assert [call.nbytes for call in gpu.of("set")] == [2 * 32 * 48, 2 * 48 * 16]
        used.append(gpu.used_nbytes())
        assert len({call.stream for call in gpu.of("set")}) == 1
        del kept
    assert used == [weights, weights], "slots take memory only once they are staged"


def test_closing_gives_everything_back(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    engine = gpu_engine.compile(network(), device="cuda", streams=2, batch=4)
    list(engine.map([np.zeros((1, 6), np.float32)] * 24))
    assert gpu.used_nbytes() and gpu.used_nbytes(pinned=True) and gpu.graphs and gpu.events and gpu.lanes
    engine.close()
    assert not gpu.used_nbytes() and not gpu.used_nbytes(pinned=True)
    assert not gpu.graphs and not gpu.events and not gpu.lanes


def test_compiling_captures_every_bucket_on_every_slot(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    with gpu_engine.compile(network(), device="cuda", streams=2, requests=16) as engine:
        captured = len(gpu.of("graphInstantiate"))
        assert captured >= 2 * 2 * len(powers(engine.batch))
        row = np.ones((1, 6), np.float32)
        futures = [engine.submit([row]) for _ in range(64)]
        [future.result(30) for future in futures]
        assert len(gpu.of("graphInstantiate")) == captured
