"""What CUDA says no to, call by call: the right request fails, others succeed, nothing stays behind."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.compiler import open_device
from gpu_engine.errors import DeviceError, DeviceLost, ExecutionError, OutOfMemory
from gpu_engine.gpu.failures import STICKY, CudaErrors, typed, unusable
from gpu_engine.options import parse_device, validated
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.late import load
from gpu_engine.tools.heap import frozen_heap
from gpu_engine.tools.stages import read_named, stages_of
from tests import fake_cupy, recording_faults
from tests.recording_cuda import Gpu
from tests.recording_faults import CUDADriverError, CUDARuntimeError
from tests.test_gpu_cuda import network, recorded

STEADY = ("memcpyAsync", "eventRecord", "streamWaitEvent", "graphLaunch", "eventSynchronize")
"""Calls of a batch whose shape was captured."""
NEW_SHAPE = ("malloc", "hostAlloc", "launchKernel")
CAPTURE = ("streamCreate", "streamBeginCapture", "streamEndCapture", "graphInstantiate")
OPENING = ("streamCreate", "moduleLoadData", "malloc", "set", "streamSynchronize", "eventCreate")
WRONG, FULL, LOST = "cudaErrorInvalidValue", "cudaErrorMemoryAllocation", "cudaErrorIllegalAddress"
TYPES = {WRONG: DeviceError, FULL: OutOfMemory, LOST: DeviceLost}
PLANS: list[Plan] = []


@pytest.fixture(scope="module", autouse=True)
def old_objects() -> Iterator[None]:
    """What was there before is not looked at again each time that `assert_clean` collects."""
    with frozen_heap():
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A recorded GPU of which nothing is left in use at the end."""
    with recorded(monkeypatch) as made:
        yield made
    assert_clean(made)


def assert_clean(gpu: Gpu) -> None:
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-engine")]
    left = gpu.used_nbytes(), gpu.used_nbytes(pinned=True), len(gpu.lanes), len(gpu.events), len(gpu.graphs)
    assert left == (0, 0, 0, 0, 0)


def engine_on(gpu: Gpu, **options: Any) -> Engine:
    """An engine for `network` of batches of 2, whose plan is made once."""
    device = load("gpu_engine.gpu.cuda:CudaDevice")(0, "fp32", fake_cupy.binary_source)
    if not PLANS:
        PLANS.append(stages_of(read_named(network()), device.lower).plan)
    return Engine(PLANS[0], device, validated(**{"streams": 1, "batch": 2, "warmup": False} | options))


def rows(count: int) -> list[Any]:
    return [np.full((1, 6), i / 10, np.float32) for i in range(count)]


def settled(engine: Engine, inputs: Sequence[Any]) -> list[BaseException | None]:
    """The error of each request, or None where the result is right."""
    futures: list[Future[Any]] = [engine.submit([row]) for row in inputs]
    errors = [future.exception(60) for future in futures]
    for row, future, error in zip(inputs, futures, errors, strict=True):
        if error is None:
            expected = np.tanh(row * 2 + np.arange(6, dtype=np.float32) / 10).sum(axis=1)
            np.testing.assert_allclose(future.result()[1], expected, rtol=1e-4, atol=1e-5)
    return errors


def warm(engine: Engine) -> None:
    """Let both slots capture every bucket."""
    for count in (1, 2) * 3:
        x = np.concatenate(rows(count))
        futures = [engine.submit([x]) for _ in range(2)]
        for future in futures:
            future.result(60)


def quickly_closed(engine: Engine) -> None:
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("error", [WRONG, FULL])
@pytest.mark.parametrize("kinds", [STEADY, *[(kind,) for kind in NEW_SHAPE]])
def test_an_error_of_one_call_fails_at_most_the_request_it_met_alone(
    gpu: Gpu, kinds: Sequence[str], error: str
) -> None:
    engine = engine_on(gpu)
    if kinds is STEADY:
        warm(engine)
    for kind in kinds:
        gpu.fail_at(kind, 2, error)
        errors = [each for each in settled(engine, rows(7)) if each is not None]
        assert len(errors) <= 1 and all(type(each) is TYPES[error] for each in errors), errors
        assert all("cuda:0" in str(each) or "GPU" in str(each) or "page-locked" in str(each) for each in errors)
        assert kind == "hostAlloc" or not gpu._faults.waiting[kind], "it never came to that call"
    gpu.heal()
    assert engine.healthy and settled(engine, rows(5)) == [None] * 5
    quickly_closed(engine)


@pytest.mark.parametrize("error", [WRONG, FULL, LOST])
@pytest.mark.parametrize(
    ("kind", "nth"),
    [
        ("memcpyAsync", 1), ("memcpyAsync", 2), ("eventRecord", 1), ("eventRecord", 2), ("eventRecord", 3),
        ("streamWaitEvent", 1), ("streamWaitEvent", 2), ("graphLaunch", 1), ("eventSynchronize", 1),
    ],
)  # fmt: skip
def test_a_request_alone_gets_the_error_of_its_call(gpu: Gpu, kind: str, nth: int, error: str) -> None:
    """The first copy is the upload, the second a download."""
    engine = engine_on(gpu, streams=1, auto_batching=False)
    x = rows(1)
    for _ in range(3):
        engine.run(x)
    gpu.fail_at(kind, nth, error)
    with pytest.raises(TYPES[error], match="cuda:0"):
        engine.run(x)
    assert engine.statistics().failed == 1 and engine.healthy == (error != LOST)
    if engine.healthy:
        assert settled(engine, rows(3)) == [None] * 3
    quickly_closed(engine)


@pytest.mark.parametrize("kind", [*STEADY, *NEW_SHAPE, *CAPTURE])
def test_a_sticky_error_fails_what_waits_and_closes_quickly(gpu: Gpu, kind: str) -> None:
    engine = engine_on(gpu)
    if kind in STEADY:
        warm(engine)
    elif kind in CAPTURE:
        settled(engine, rows(1))
    gpu.fail_at(kind, 1, LOST)
    errors = settled(engine, rows(8))
    if kind in CAPTURE:
        errors += settled(engine, rows(8)) if engine.healthy else []
    failed = [each for each in errors if each is not None]
    assert failed and all(type(each) is DeviceLost for each in failed)
    assert "cuda:0 is lost, because a kernel used an address that is not its own" in str(failed[0])
    assert not engine.healthy and engine.describe().state == "unhealthy"
    calls = len(gpu.calls)
    with pytest.raises(DeviceLost, match="only a new process"):
        engine.run([rows(1)[0]])
    assert len(gpu.calls) == calls, "a lost device is left alone"
    quickly_closed(engine)


@pytest.mark.parametrize("kind", CAPTURE)
def test_a_capture_that_fails_costs_no_request(gpu: Gpu, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_on(gpu)
    settled(engine, rows(1))
    gpu.fail_at(kind, 1, WRONG)
    for _ in range(6):
        assert settled(engine, rows(4)) == [None] * 4
    assert "could not be captured as a CUDA graph" in caplog.text and engine.statistics().failed == 0
    assert gpu.of("graphLaunch"), "it is captured the next time"
    quickly_closed(engine)


@pytest.mark.parametrize("error", [WRONG, FULL, LOST])
@pytest.mark.parametrize("kind", OPENING)
def test_an_engine_that_cannot_be_opened_leaves_nothing(gpu: Gpu, kind: str, error: str) -> None:
    gpu.fail_at(kind, 1, error)
    if (kind, error) == ("malloc", FULL):
        gpu.fail_at(kind, 2, error)  # the first is tried again, once CuPy's pool is empty
    with pytest.raises(TYPES[error]) as failure:
        engine_on(gpu).run([rows(1)[0]])
    assert type(failure.value) is TYPES[error]
    del failure
    gpu.heal()


def test_many_errors_in_a_row_do_not_bring_the_engine_down(gpu: Gpu) -> None:
    engine = engine_on(gpu, streams=2)
    warm(engine)
    for round_ in range(4):
        for kind in STEADY:
            gpu.fail_at(kind, 1 + round_ % 3, WRONG)
        errors = settled(engine, rows(8))
        assert all(each is None or type(each) is DeviceError for each in errors)
    gpu.heal()
    assert settled(engine, rows(9)) == [None] * 9
    quickly_closed(engine)


def test_memory_that_runs_out_is_answered_with_smaller_batches(gpu: Gpu) -> None:
    """When the request was admitted 64 rows fitted; when it runs, arenas of 20 do, because somebody else came."""
    engine = engine_on(gpu, batch=64, memory_fraction=1)
    x = np.concatenate(rows(64))
    engine._admission.admit([x])
    gpu.nbytes = gpu.used_nbytes() + 2 * engine._device.memory(PLANS[0], (20,))[1]
    result = engine.run_many([x])
    expected = np.tanh(x * 2 + np.arange(6, dtype=np.float32) / 10).sum(axis=1)
    np.testing.assert_allclose(result[1], expected, rtol=1e-4, atol=1e-5)
    assert engine.healthy and engine.statistics().failed == 0 and engine.statistics().retried > 0
    quickly_closed(engine)


def test_a_device_that_breaks_during_warm_up_is_said_at_once(gpu: Gpu) -> None:
    gpu.fail_at("eventSynchronize", 1, LOST)
    with pytest.raises(DeviceLost):
        gpu_engine.compile(network(), device="cuda", batch=4)
    gpu.heal()


@pytest.mark.parametrize("status", sorted(STICKY))
def test_sticky_errors_are_known_behind_whatever_they_came_as(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recording_faults._NAMES, status, "cudaErrorAny")
    behind = CUDARuntimeError(status)
    found = typed(behind, "cuda:3")
    assert type(found) is DeviceLost and f"cuda:3 is lost, because {STICKY[status]}: cudaErrorAny" in str(found)
    step = ExecutionError("Add '/add' (opset 20): cupy said no")
    step.__cause__ = behind
    assert type(typed(step, "cuda:3")) is DeviceLost and "Add '/add'" in str(typed(step, "cuda:3"))


def test_other_errors_keep_their_meaning() -> None:
    full, wrong = CUDADriverError(2), CUDADriverError(1)
    assert type(typed(full, "cuda:0")) is OutOfMemory and "cuda:0 is out of memory: CUDA_ERROR" in str(
        typed(full, "cuda:0")
    )
    assert type(typed(MemoryError("pool"), "cuda:0")) is OutOfMemory
    assert type(typed(wrong, "cuda:0")) is DeviceError and str(typed(wrong, "cuda:0")).startswith("cuda:0: CUDA_ERROR")
    for ours in (OutOfMemory("ours"), DeviceLost("ours"), ExecutionError("ours"), ValueError("ours")):
        assert typed(ours, "cuda:0") is ours
    with pytest.raises(KeyboardInterrupt), CudaErrors("cuda:0"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("status", "driver", "message"),
    [
        (35, 0, "no NVIDIA driver is installed"),
        (35, 12040, r"the NVIDIA driver knows CUDA 12\.4, and CuPy is built for CUDA 13\.2: update the driver"),
        (100, 13020, "this process sees no GPU"),
        (1, 13020, "the GPUs do not answer"),
    ],
)
def test_why_no_gpu_can_be_used(
    status: int, driver: int, message: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        raise CUDARuntimeError(status)

    runtime = sys.modules["cupy.cuda.runtime"]
    monkeypatch.setattr(runtime, "getDeviceCount", count)
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: driver)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: 13020)
    with pytest.raises(DeviceError, match=f"no GPU can be used: {message}.*cudaError"):
        open_device(parse_device("cuda:all"))
    device, reason = open_device(parse_device("auto"))
    assert device.name == "cpu" and str(CUDARuntimeError(status)) in reason


def test_a_driver_of_two_versions() -> None:
    assert "restart the machine" in unusable(fake_error(803), 13020, 13020)


def fake_error(status: int) -> Exception:
    error = CUDARuntimeError(1)
    error.status = status
    return error


def test_an_old_gpu_is_refused(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = sys.modules["cupy.cuda.runtime"]
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda _: {"major": 7, "minor": 5, "name": b"T4"})
    with pytest.raises(DeviceError, match="T4 is sm_75, and kernels need sm_80 or newer"):
        open_device(parse_device("cuda"))
    device, reason = open_device(parse_device("cuda"), fallback="cpu")
    assert device.name == "cpu" and "sm_75" in reason


def branching() -> onnx.ModelProto:
    """tanh(x) if a given bool says so, else -tanh(x): which, the host reads from the GPU while the model runs."""

    def body(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["n", 3])
        return helper.make_graph([helper.make_node(op, ["t"], [f"{name}_y"])], name, [], [out])

    nodes = [
        helper.make_node("Tanh", ["x"], ["t"]),
        helper.make_node(
            "If", ["c"], ["y"], then_branch=body("then", "Identity"), else_branch=body("other", "Neg"), name="choice"
        ),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(
        nodes, "branching", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("error", [WRONG, LOST])
@pytest.mark.parametrize("kind", ["get", "launchKernel"])
def test_errors_in_the_middle_of_a_run(gpu: Gpu, kind: str, error: str) -> None:
    inputs = [np.ones((2, 3), np.float32), np.array(False)]
    with gpu_engine.compile(branching(), device="cuda", auto_batching=False) as engine:
        np.testing.assert_allclose(engine.run(inputs)[0], -np.tanh(inputs[0]), rtol=1e-5)
        gpu.fail_at(kind, 1, error)
        with pytest.raises(DeviceLost if error == LOST else (ExecutionError, DeviceError)) as failure:
            engine.run(inputs)
        del failure
        assert engine.healthy == (error != LOST)
        if engine.healthy:
            np.testing.assert_allclose(engine.run(inputs)[0], -np.tanh(inputs[0]), rtol=1e-5)
