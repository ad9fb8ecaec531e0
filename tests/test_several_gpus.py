"""Several GPUs as one device: one queue, streams on each, weights and kernels once on each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.compiler import open_device
from gpu_engine.errors import DeviceError, DeviceLost, OutOfMemory
from gpu_engine.gpu.several import SeveralDevices
from gpu_engine.options import parse_device, validated
from gpu_engine.runtime.engine import Engine
from tests import fake_cupy
from tests.recording_cuda import Gpu
from tests.recording_device import RecordingDevice, double, plain, rows, until
from tests.test_gpu_cuda import network, recorded


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Two recorded GPUs."""
    with recorded(monkeypatch, devices=2) as made:
        yield made


def recorders(count: int, **facts: Any) -> list[RecordingDevice]:
    return [RecordingDevice(double, name=f"cuda:{i}", **facts) for i in range(count)]


def several(members: list[RecordingDevice], **options: Any) -> Engine:
    return Engine(plain(), SeveralDevices(members), validated(**{"warmup": False, **options}))


def expected(row: Any) -> Any:
    return np.tanh(row * 2 + np.arange(6, dtype=np.float32) / 10)


def check(engine: Any, count: int) -> None:
    """Send rows and compare what comes back."""
    rng = np.random.default_rng()
    inputs = [rng.standard_normal((1, 6), np.float32) for _ in range(count)]
    futures = [engine.submit([row]) for row in inputs]
    for row, future in zip(inputs, futures, strict=True):
        np.testing.assert_allclose(future.result(60)[1], expected(row).sum(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "name"), [("cuda:all", "cuda:0,1"), ("cuda:1,0", "cuda:1,0")])
def test_every_gpu_has_streams_and_its_own_weights(two: Gpu, device: str, name: str) -> None:
    with gpu_engine.compile(network(), device=device, streams=2, requests=32, warmup=False) as engine:
        assert engine.streams == 4 and engine.batch == 32 // (4 * 2)
        assert sorted(block.device for block in two.blocks.values() if block.nbytes == 24) == [0, 1]
        loaded = two.kinds().count("moduleLoadData")
        check(engine, 64)
        assert two.kinds().count("moduleLoadData") == loaded, "kernels are loaded once on each"
        started = [call for call in two.of("launchKernel", "graphLaunch") if not call.captured]
        assert {two.lanes[call.stream].device for call in started} == {0, 1}
        assert engine.device.startswith(name) and engine.device.count("sm_90") == 2
        assert set(engine.get_property("EXECUTION_DEVICES")) == {"cuda:0", "cuda:1"}
        plan = engine.memory_plan()
        assert (plan.devices, plan.slots) == (2, 8)
        assert plan.total == 2 * plan.weights + plan.activations + plan.graphs and plan.graphs > 0
    assert not two.used_nbytes() and not two.used_nbytes(pinned=True) and not two.lanes and not two.events


def test_outputs_lie_where_a_request_ran(two: Gpu) -> None:
    """And are inputs of the same engine, whichever device takes them."""
    with gpu_engine.compile(
        network(), device="cuda:all", streams=1, requests=8, outputs="device", warmup=False
    ) as engine:
        rng = np.random.default_rng()
        rows = [rng.standard_normal((1, 6), np.float32) for _ in range(64)]
        futures = [engine.submit([row]) for row in rows]
        found = [future.result(30)[1] for future in futures]
        assert {tensor.device for tensor in found} == {"cuda:0", "cuda:1"}
        for row, tensor in zip(rows, found, strict=True):
            np.testing.assert_allclose(tensor.numpy(), expected(row).sum(axis=1), rtol=1e-4, atol=1e-5)


def test_a_bundle_runs_on_all_of_them(two: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are looked up for each; this one has them all."""
    asked: list[int] = []

    def binary(kernel: Any, arch: int) -> Any:
        asked.append(arch)
        return fake_cupy.binary_source(kernel, arch)

    made = SimpleNamespace(precision="fp32", path="x.bundle", model=network().SerializeToString, binary=binary)
    monkeypatch.setattr("gpu_engine.compiler.read_bundle", lambda path: made)
    with gpu_engine.compile("x.bundle", device="cuda:all", streams=1, requests=8, warmup=False) as engine:
        check(engine, 16)
        assert engine.get_property("LOADED_FROM_CACHE") is True
    assert asked == [90] * len(asked) and len(asked) == two.kinds().count("moduleLoadData") > 0


def test_one_of_several_may_be_all_there_is(two: Gpu) -> None:
    two.devices = 1
    with gpu_engine.compile(network(), device="cuda:all", warmup=False) as engine:
        assert engine.device.startswith("cuda:0 (Fake H200")
    with pytest.raises(DeviceError, match="cuda:1 does not exist: 1 GPU"):
        gpu_engine.compile(network(), device="cuda:0,1")


def test_gpus_of_different_architectures_are_refused(two: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    minors = {0: 0, 1: 9}
    properties = {"name": b"Fake", "major": 8}
    runtime = sys.modules["cupy.cuda.runtime"]
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda ordinal: {**properties, "minor": minors[ordinal]})
    with pytest.raises(DeviceError, match=r"must have one architecture, .*\(cuda:0: sm_80; cuda:1: sm_89\)"):
        gpu_engine.compile(network(), device="cuda:all")
    device, reason = open_device(parse_device("cuda:all"), fallback="cpu")
    assert device.name == "cpu" and "sm_89" in reason


def test_a_gpu_that_breaks_breaks_the_engine(two: Gpu) -> None:
    with gpu_engine.compile(network(), device="cuda:all", streams=2, requests=32, warmup=False) as engine:
        check(engine, 16)
        two.fail_at("launchKernel", 3, "cudaErrorIllegalAddress")
        x = np.zeros((1, 6), np.float32)
        with pytest.raises(
            DeviceLost, match=r"cuda:[01] is lost, because a kernel used an address that is not its own"
        ):
            for _ in range(100):
                engine.submit([x]).result(60)
        assert not engine.healthy


def test_streams_are_counted_on_each_device() -> None:
    members = recorders(3, asynchronous=True)
    engine = several(members, streams=2, requests=48)
    assert [member.opened for member in members] == [(2, 2, None)] * 3
    assert (engine.streams, engine.batch, engine.optimal_requests) == (6, 4, 48)
    for member in members:
        member.hold()
    futures = [engine.submit(rows(value)) for value in range(48)]
    until(lambda: engine.statistics().waiting == 0)
    for member in members:
        member.release()
    for value, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(30), rows(value) * 2 + 1)
    assert all(len(member.launches) >= 4 for member in members), "one queue serves all of them"
    engine.close()


def test_a_single_stream_is_one_in_all() -> None:
    members = recorders(2)
    engine = several(members, scheduler="single_stream", hint="latency")
    assert engine.streams == 1 and [member.opened for member in members] == [(1, 1, None), None]
    engine.close()


def test_memory_is_that_of_the_fullest_device() -> None:
    members = recorders(2, row_nbytes=1000, free_nbytes=1 << 30)
    members[1].free_nbytes = 13_000
    engine = several(members, streams=2, batch=100, memory_fraction=1)
    plan = engine.memory_plan()
    assert engine.batch == (13_000 - 1000) // (2 * 1000) == 6
    assert (plan.weights, plan.slots, plan.total) == (1000, 4, 2 * 13_000)
    engine.close()


def test_streams_that_were_opened_close_when_a_device_has_no_room() -> None:
    def full(*_: Any) -> Any:
        raise OutOfMemory("no room for weights")

    members = recorders(2)
    members[1].open = full  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory):
        several(members, streams=2)
    assert sorted(members[0].closed) == [0, 1]
