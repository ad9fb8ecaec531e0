"""The CUDA device over a CuPy that needs no GPU: packing, memory, streams and refusals."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.errors import DeviceError, OutOfMemory
from gpu_engine.gpu import gemm, persistent_gemm
from gpu_engine.gpu.shim_runner import has_compiler
from gpu_engine.gpu.tiles import Choice, GemmTile
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.late import KERNEL_COMPILER, load
from gpu_engine.runtime.observation import Execution
from gpu_engine.tools.stages import read_named, stages_of
from tests import fake_cupy
from tests.recording_cuda import Gpu


def replace_modules(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    for name, module in fake_cupy.fake_cupy(gpu).items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("gpu_engine.gpu.cuda", "gpu_engine.gpu.cuda_tensors"):
        # What imports them here is taken out again, and nothing comes back that an earlier call left.
        sys.modules.pop(name, None)
        monkeypatch.setitem(sys.modules, name, None)
        sys.modules.pop(name)

    def loaded(place: str) -> Any:
        return fake_cupy.binary_source if place == KERNEL_COMPILER else load(place)

    monkeypatch.setattr("gpu_engine.compiler.load", loaded)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, devices: int = 1) -> Iterator[Gpu]:
    """Recorded GPUs, to which nobody may do what CUDA forbids."""
    made = Gpu(devices=devices)
    replace_modules(monkeypatch, made)
    yield made
    sys.modules.pop("gpu_engine.gpu.cuda", None)
    assert not made.violations


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with recorded(monkeypatch) as made:
        yield made


def network() -> onnx.ModelProto:
    """[n, 6] -> tanh(x * 2 + b) -> float16 and a sum of rows."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["d"]),
        helper.make_node("Add", ["d", "b"], ["s"]),
        helper.make_node("Tanh", ["s"], ["t"]),
        helper.make_node("Cast", ["t"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("ReduceSum", ["t", "axis"], ["sum"], keepdims=0),
    ]
    constants = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("b", TensorProto.FLOAT, [6], np.arange(6) / 10),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [
            helper.make_tensor_value_info("half", TensorProto.FLOAT16, ["n", 6]),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n"]),
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_results_are_those_of_the_cpu(gpu: Gpu) -> None:
    rng = np.random.default_rng()
    with gpu_engine.compile(network(), device="cuda") as ours, gpu_engine.compile(network(), device="cpu") as cpu:
        for rows in (1, 7, 64, 7):
            x = rng.standard_normal((rows, 6), np.float32)
            for found, expected in zip(ours.run([x]), cpu.run([x]), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert gpu.of("launchKernel", "graphLaunch")


@pytest.mark.skipif(not has_compiler(), reason="g++ compiles CUDA C for the host")
def test_kernels_in_cuda_c_are_launched_alike(gpu: Gpu) -> None:
    top = helper.make_node("TopK", ["x", "k"], ["values", "places"], axis=0)
    kinds = [helper.make_tensor_value_info(name, kind, None) for name, kind in (("values", 1), ("places", 7))]
    graph = helper.make_graph(
        [top], "top", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])], kinds,
        [helper.make_tensor("k", TensorProto.INT64, [1], [2])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    x = np.random.default_rng().standard_normal((5, 3), np.float32)
    with gpu_engine.compile(model, device="cuda") as ours, gpu_engine.compile(model, device="cpu") as cpu:
        for found, expected in zip(ours.run([x]), cpu.run([x]), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert [(call.name, call.grid) for call in gpu.of("launchKernel")] == [("top_k", (3, 1, 1))]


def products() -> onnx.ModelProto:
    """[n, 32] float16 times [32, 48], relu, times [48, 16]."""
    rng = np.random.default_rng()
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT16, shape, rng.standard_normal(shape).astype(np.float16))
        for name, shape in (("w", (32, 48)), ("v", (48, 16)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", k]) for name, k in (("x", 32), ("y", 16))]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_descriptors_have_scratch_of_their_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """All launches of a stream share it until one wants more; those that were packed before keep theirs."""
    choice = Choice(1, None, GemmTile(16, 32, 16, 4, 2), 1, persistent=True)
    monkeypatch.setattr(gemm, "choose", lambda *args, **options: (choice,))
    monkeypatch.setattr(persistent_gemm, "processors", lambda arch: 5)
    monkeypatch.setattr(importlib.import_module("gpu_engine.gpu.cuda"), "LEAST_SCRATCH", 1)
    rng, model = np.random.default_rng(), products()
    with gpu_engine.compile(model, device="cuda") as ours, gpu_engine.compile(model, device="cpu") as cpu:
        for rows in (1, 40, 17, 90, 1):
            x = rng.standard_normal((rows, 32)).astype(np.float16)
            for found, expected in zip(ours.run([x]), cpu.run([x]), strict=True):
                np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-2, atol=1e-1)
    launches = [(call.name, call.grid) for call in gpu.of("launchKernel")]
    assert {name for name, _ in launches} == {"persistent_gemm_float16"}
    assert max(grid for _, grid in launches) == (5, 1, 1)
    nbytes = 3 * fake_cupy.DESCRIPTOR_NBYTES
    reserved = [call.nbytes for call in gpu.of("malloc") if call.nbytes in (2 * nbytes, 5 * nbytes)]
    assert reserved == [2 * nbytes, 5 * nbytes]


def test_requests_on_two_streams_share_one_copy_of_the_weights(gpu: Gpu) -> None:
    rng = np.random.default_rng()
    with gpu_engine.compile(network(), device="cuda", streams=2, requests=16) as engine:
        weights = [call for call in gpu.of("malloc") if call.nbytes == 24]
        rows = [rng.standard_normal((1, 6), np.float32) for _ in range(64)]
        futures = [engine.submit([row]) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            expected = np.tanh(row * 2 + np.arange(6, dtype=np.float32) / 10)
            np.testing.assert_allclose(future.result()[1], expected.sum(axis=1), rtol=1e-4, atol=1e-5)
    assert len(weights) <= 1
    assert len({call.stream for call in gpu.of("launchKernel", "graphLaunch") if not call.captured}) == 2


def test_a_known_shape_allocates_nothing(gpu: Gpu) -> None:
    with gpu_engine.compile(network(), device="cuda") as engine:
        x = np.zeros((5, 6), np.float32)
        for _ in range(3):
            engine.run([x])
        gpu.calls.clear()
        engine.run([x])
        assert not gpu.of("malloc", "hostAlloc")


def test_a_timed_gpu_tells_what_each_step_took(gpu: Gpu) -> None:
    device = load("gpu_engine.gpu.cuda:CudaDevice")(0, "fp32", fake_cupy.binary_source)
    stages = stages_of(read_named(network()), device.lower)
    seen: list[Execution] = []
    with Engine(stages.plan, device.timed(), validated()) as engine:
        engine.observe(seen.append)
        engine.run([np.zeros((5, 6), np.float32)])
    times, moments = seen[0].steps, seen[0].moments
    assert times is not None and times.runs.tolist() == [1] * len(stages.plan.steps)
    np.testing.assert_allclose(np.diff(times.bounds_s).sum(), times.seconds.sum())
    assert times.seconds.min() > 0 and times.bounds_s[-1] <= moments.computed_s
    assert moments.staged_s < times.bounds_s[0]


def test_no_driver_is_said_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_modules(monkeypatch, Gpu(devices=0))
    with pytest.raises(DeviceError, match="cudaErrorInsufficientDriver"):
        gpu_engine.compile(network(), device="cuda")
    with gpu_engine.compile(network()) as engine:
        assert engine.device.startswith("cpu") and "cudaErrorInsufficientDriver" in engine.device
    sys.modules.pop("gpu_engine.gpu.cuda", None)


def test_a_gpu_that_is_not_there(gpu: Gpu) -> None:
    with pytest.raises(DeviceError, match="cuda:3 does not exist"):
        gpu_engine.compile(network(), device="cuda:3")


def test_memory_that_is_not_there(gpu: Gpu) -> None:
    with gpu_engine.compile(network(), device="cuda", auto_batching=False) as engine, pytest.raises(OutOfMemory):
        engine.run([np.zeros((1 << 26, 6), np.float32)])


def test_without_triton_the_reason_is_said(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(place: str) -> Any:
        if place == KERNEL_COMPILER:
            raise ImportError("No module named 'triton'")
        return load(place)

    monkeypatch.setattr("gpu_engine.compiler.load", loaded)
    with pytest.raises(DeviceError, match="Triton is not installed"):
        gpu_engine.compile(network(), device="cuda")


def test_a_product_in_parts_is_one_launch(gpu: Gpu) -> None:
    """[n, 1024] times [1024, 24]: few tiles share what is summed over, and count in memory that starts as zeros."""
    rng = np.random.default_rng()
    weights = rng.standard_normal((1024, 24), np.float32) / np.float32(32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 24])], [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with gpu_engine.compile(model, device="cuda", auto_batching=False) as engine:
        for rows in (1, 20):
            gpu.calls.clear()
            x = rng.standard_normal((rows, 1024), np.float32)
            np.testing.assert_allclose(engine.run([x])[0], x @ weights, 1e-3, 1e-4)
            (grid,) = [call.grid for call in gpu.of("launchKernel")]
            assert grid[1] > 1
