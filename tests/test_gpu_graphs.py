"""CUDA graphs of the slots' shapes: when they are captured and given up, what has none, and what failures leave."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.errors import DeviceError
from gpu_engine.gpu import graphs
from tests.recording_cuda import Gpu
from tests.test_gpu_cuda import network
from tests.test_gpu_streams import MakeGpu, expected, make_gpu, opened

__all__ = ["make_gpu"]
RNG = np.random.default_rng(0)


def launch(slot: Any, rows: int) -> None:
    """One batch on a slot of `network`, whose results must be right."""
    x = RNG.standard_normal((rows, 6), np.float32)
    slot.stage((rows,))[0][...] = x
    slot.launch()
    np.testing.assert_allclose(slot.wait()[1], expected(x), rtol=1e-4, atol=1e-5)


def kinds(gpu: Gpu, run: Callable[[], None]) -> list[str]:
    """Launches and captures that `run` makes."""
    gpu.calls.clear()
    run()
    return [call.kind for call in gpu.of("launchKernel", "graphLaunch") if not call.captured] + (
        ["capture"] * len(gpu.of("streamBeginCapture"))
    )


def test_a_shape_is_launched_plainly_then_captured_then_replayed(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    plain = kinds(gpu, lambda: launch(slot, 3))
    assert set(plain) == {"launchKernel"} and len(plain) > 1
    assert kinds(gpu, lambda: launch(slot, 3)) == ["graphLaunch", "capture"]
    assert kinds(gpu, lambda: launch(slot, 3)) == ["graphLaunch"]
    assert kinds(gpu, lambda: launch(slot, 2)) == plain
    assert kinds(gpu, lambda: launch(slot, 3)) == ["graphLaunch"]


def test_memory_that_moves_takes_the_graphs_with_it(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    for rows in (2, 2, 2):
        launch(slot, rows)
    assert len(gpu.graphs) == 1
    used = gpu.used_nbytes()
    launch(slot, 200)
    assert not gpu.graphs and gpu.used_nbytes() > used
    assert set(kinds(gpu, lambda: launch(slot, 2))) == {"launchKernel"}
    assert kinds(gpu, lambda: launch(slot, 2)) == ["graphLaunch", "capture"]
    used = gpu.used_nbytes()
    launch(slot, 200)
    assert gpu.used_nbytes() == used, "what an area left is kept"


def test_the_shape_launched_longest_ago_is_given_up(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURED_SHAPES", 2)
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    launch(slot, 4)
    for rows in (4, 3, 3, 4):
        launch(slot, rows)
    assert len(gpu.graphs) == 2
    for rows in (2, 2):
        launch(slot, rows)
    assert len(gpu.graphs) == 2
    assert kinds(gpu, lambda: launch(slot, 4)) == ["graphLaunch"]
    for _ in range(2):
        assert set(kinds(gpu, lambda: launch(slot, 3))) == {"launchKernel"}
    assert kinds(gpu, lambda: launch(slot, 3)) == ["graphLaunch", "capture"]


def test_a_binding_that_is_forgotten_takes_its_graph_along(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_engine.gpu.slot.CACHED_BINDINGS", 1)
    gpu = make_gpu()
    (stream,) = opened(network())
    for rows in (3, 3, 2, 2):
        launch(stream.slots[0], rows)
        assert len(gpu.graphs) <= 1


@pytest.mark.parametrize("kind", ["streamEndCapture", "streamBeginCapture", "launchKernel"])
def test_a_capture_that_fails_is_tried_once_more(
    make_gpu: MakeGpu, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    launch(slot, 3)
    gpu.fail_at(kind, 1, "cudaErrorStreamCaptureInvalidated")
    assert "graphLaunch" not in kinds(gpu, lambda: launch(slot, 3))
    assert (
        "could not be captured" in caplog.text
        and "tried once more" in caplog.text
        and "INVALIDATED" in caplog.text.upper()
    )
    assert kinds(gpu, lambda: launch(slot, 3)) == ["graphLaunch", "capture"]
    assert gpu.captures == 0


def test_what_cannot_be_captured_is_launched_plainly_from_then_on(
    make_gpu: MakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    launch(slot, 3)
    for _ in range(graphs.TRIES):
        gpu.fail_at("streamEndCapture", 1, "cudaErrorStreamCaptureUnsupported")
        launch(slot, 3)
    assert "one by one" in caplog.text
    assert set(kinds(gpu, lambda: launch(slot, 3))) == {"launchKernel"}


def test_a_launch_that_failed_prepares_no_capture(make_gpu: MakeGpu) -> None:
    """Not all of its kernels were launched, and a capture cannot load their machine code."""
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    gpu.fail_at("launchKernel", 2, "cudaErrorLaunchOutOfResources")
    slot.stage((3,))[0][...] = 1
    slot.launch()
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        slot.wait()
    assert set(kinds(gpu, lambda: launch(slot, 3))) == {"launchKernel"}
    assert kinds(gpu, lambda: launch(slot, 3)) == ["graphLaunch", "capture"]


@pytest.mark.parametrize(
    "kind", ["memcpyAsync", "eventRecord", "streamWaitEvent", "graphLaunch", "launchKernel", "eventSynchronize"]
)
def test_a_slot_works_after_a_failed_launch(make_gpu: MakeGpu, kind: str) -> None:
    gpu = make_gpu()
    (stream,) = opened(network())
    slot = stream.slots[0]
    if kind == "graphLaunch":
        launch(slot, 3)
        launch(slot, 3)
    for nth in (1, 2) if kind in ("memcpyAsync", "eventRecord") else (1,):
        gpu.fail_at(kind, nth, "cudaErrorLaunchOutOfResources")
        slot.stage((3,))[0][...] = 1
        slot.launch()
        with pytest.raises(DeviceError, match=r"OUT_OF_RESOURCES|OutOfRes"):
            slot.wait()
        launch(slot, 3)
        launch(slot, 3)


def test_counters_that_a_failed_launch_left_are_cleared(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    weights = RNG.standard_normal((1024, 24), np.float32) / np.float32(32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"]),
         helper.make_node("ReduceSum", ["y", "axis"], ["s"], keepdims=0)], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([1]), "axis")],
    )  # fmt: skip
    (stream,) = opened(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    slot = stream.slots[0]
    for failing in (False, True, False, False):
        x = RNG.standard_normal((1, 1024), np.float32)
        slot.stage((1,))[0][...] = x
        if failing:
            gpu.fail_at("eventSynchronize", 1, "cudaErrorInvalidValue")
        slot.launch()
        if failing:
            with pytest.raises(DeviceError, match="cuda:0: cudaErrorInvalidValue"):
                slot.wait()
            counters = slot._areas[0][2].memory
            ctypes.memset(counters.address, 1, counters.nbytes)
        else:
            np.testing.assert_allclose(slot.wait()[0], np.maximum(x @ weights, 0).sum(axis=1), 1e-3, 1e-3)


def test_captures_are_made_one_at_a_time(make_gpu: MakeGpu) -> None:
    gpu = make_gpu(pace=1.0)
    slots = [slot for stream in opened(network(), streams=3) for slot in stream.slots[:1]]
    for slot in slots:
        launch(slot, 2)
    together = threading.Barrier(len(slots))

    def serve(slot: Any) -> None:
        slot.stage((2,))[0][...] = 1
        together.wait(30)
        slot.launch()
        slot.wait()

    threads = [threading.Thread(target=serve, args=(slot,)) for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(gpu.graphs) == len(slots)


def test_a_capture_takes_nothing_of_other_threads(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one slot captures, the other one of the stream allocates, launches and waits."""
    gpu = make_gpu()
    (stream,) = opened(network())
    first, second = stream.slots
    launch(first, 3)
    begin, failed = gpu.begin_capture, list[BaseException]()

    def disturbed(ptr: int, mode: int, wanted: int) -> None:
        begin(ptr, mode, wanted)
        monkeypatch.setattr(gpu, "begin_capture", begin)
        thread = threading.Thread(target=lambda: collected(failed, lambda: launch(second, 5)))
        thread.start()
        thread.join(60)

    monkeypatch.setattr(gpu, "begin_capture", disturbed)
    assert kinds(gpu, lambda: launch(first, 3)).count("launchKernel") == len(stream.slots[0]._plan.steps)
    assert not failed
    assert kinds(gpu, lambda: launch(first, 3)) == ["graphLaunch"]


def collected(failed: list[BaseException], run: Callable[[], None]) -> None:
    """Run what another thread must not fail in silently."""
    try:
        run()
    except BaseException as error:
        failed.append(error)


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')


def test_what_python_runs_stays_between_graphs(make_gpu: MakeGpu) -> None:
    """Launches, an array function, launches: two graphs."""
    gpu = make_gpu()
    model = model_of("""
g (float[n, 6] x, int64[n] l) => (float[n, 6] y) <int64[1] axis = {1}> {
  s = ReduceSum<keepdims = 1>(x, axis)
  a = Sub(x, s)
  b = Softmax<axis = 1>(a)
  c = ReverseSequence<batch_axis = 0, time_axis = 1>(b, l)
  r = ReduceMax<keepdims = 1>(c, axis)
  d = Sub(c, r)
  y = Softmax<axis = 1>(d)
}
""")
    lengths = np.array([2, 6, 1])
    with gpu_engine.compile(model, device="cuda", auto_batching=False) as ours:
        for _ in range(4):
            x = RNG.standard_normal((3, 6), np.float32)
            gpu.calls.clear()
            (y,) = ours.run([x, lengths])
            first = np.exp(x - x.sum(1, keepdims=True))
            turned = first / first.sum(1, keepdims=True)
            for row, length in zip(turned, lengths, strict=True):
                row[:length] = row[:length][::-1].copy()
            second = np.exp(turned)
            np.testing.assert_allclose(y, second / second.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)
        assert len(gpu.of("graphLaunch")) == 2 and not gpu.of("launchKernel", "streamBeginCapture")


def test_a_model_of_several_segments_runs_plainly(make_gpu: MakeGpu) -> None:
    """[n] -> twice the elements that are not zero, as many as there are."""
    gpu = make_gpu()
    model = model_of("""
g (float[n] x) => (float[m] y, float[n] z) {
  z = Tanh(x)
  b = Cast<to = 9>(x)
  t = Compress<axis = 0>(x, b)
  u = Add(t, t)
  y = Tanh(u)
}
""")
    with gpu_engine.compile(model, device="cuda", auto_batching=False) as ours:
        for count in (4, 4, 9, 4):
            x = RNG.standard_normal(count, np.float32) * (np.arange(count, dtype=np.float32) % 2)
            y, z = ours.run([x])
            np.testing.assert_allclose(y, np.tanh(2 * x[x != 0]), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(z, np.tanh(x), rtol=1e-4, atol=1e-5)
    assert gpu.of("memcpyAsync")


def test_bodies_run_on_the_stream_of_their_slot(make_gpu: MakeGpu) -> None:
    gpu = make_gpu()
    model = model_of("""
g (int64 n, float[k] x) => (float[k] y) <bool go = {1}> {
  y = Loop(n, go, x) <body = b (int64 i, bool c, float[k] v) => (bool d, float[k] w) {
    d = Identity(c)
    s = Tanh(v)
    r = ReduceSum<keepdims = 1>(s)
    w = Add(s, r)
  }>
}
""")
    x = RNG.standard_normal(5).astype(np.float32)
    wanted = x
    for _ in range(4):
        wanted = np.tanh(wanted) + np.tanh(wanted).sum()
    _, stream = opened(model, streams=2)
    gpu.calls.clear()
    slot = stream.slots[0]
    for _ in range(3):
        for staged, given in zip(slot.stage((5,)), (np.int64(4), x), strict=True):
            staged[...] = given
        slot.launch()
        np.testing.assert_allclose(slot.wait()[0], wanted, rtol=1e-4, atol=1e-5)
    launches = [call for call in gpu.of("launchKernel", "graphLaunch") if not call.captured]
    assert len({call.stream for call in launches}) == 1 and "graphLaunch" in {call.kind for call in launches}
