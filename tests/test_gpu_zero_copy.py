"""Tensors of other libraries on a recorded GPU: the order of streams, what is copied, and who holds what how long."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.errors import InputError
from gpu_engine.options import validated
from gpu_engine.runtime.device_tensors import DeviceTensor, SeveralIntakes
from gpu_engine.runtime.dlpack import LEGACY_STREAM, PER_THREAD_STREAM, exported
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.late import load
from gpu_engine.tools.stages import read_named, stages_of
from tests import fake_cupy
from tests.cuda_tensors import Described, Library, Tensor, collected, read
from tests.recording_cuda import Gpu
from tests.test_device_tensors import check, expected, model_of, rows
from tests.test_gpu_cuda import network, recorded


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Two recorded GPUs, to which nobody may do what CUDA forbids."""
    with recorded(monkeypatch, devices=2) as made:
        yield made


def compiled(**options: Any) -> Any:
    return gpu_engine.compile(network(), **{"device": "cuda", "auto_batching": False, **options})


def kinds(gpu: Gpu, since: int) -> set[str]:
    """What was called since then: copies by their direction."""
    return {call.name if call.kind == "memcpyAsync" else call.kind for call in gpu.calls[since:]}


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("interface", ["dlpack", "stream", "legacy", "thread", "older"])
def test_slots_wait_for_the_work_of_producers(gpu: Gpu, interface: str, device: int) -> None:
    """The recorded GPU runs what it was given as late as it may: without an event the numbers are garbage."""
    streams = {"legacy": LEGACY_STREAM, "older": LEGACY_STREAM, "thread": PER_THREAD_STREAM}
    theirs = Library(gpu, streams.get(interface), device)
    with compiled(device=f"cuda:{device}") as engine:
        for _ in range(4):
            x = rows(5)
            tensor = theirs.tensor(x)
            given = tensor if interface == "dlpack" else Described(tensor, 2 if interface == "older" else 3)
            check(engine.run([given]), x)


def test_an_interface_without_a_stream_is_complete(gpu: Gpu) -> None:
    theirs, x = Library(gpu), rows(3)
    tensor = theirs.tensor(x)
    gpu.complete_all()
    with compiled() as engine:
        before = len(gpu.of("streamWaitEvent"))
        check(engine.run([Described(tensor, stream=None)]), x)
        check(engine.run([x]), x)
        waits = len(gpu.of("streamWaitEvent")) - before
        check(engine.run([x]), x)
        assert waits == 2 * (len(gpu.of("streamWaitEvent")) - before - waits)


def test_a_tensor_that_comes_again_is_read_where_it_lies_by_a_graph(gpu: Gpu) -> None:
    """Copied inside the GPU at first, then launched plainly, then captured; from then on one call starts it all."""
    theirs = Library(gpu)
    with compiled() as engine:
        tensor = theirs.tensor(rows(5))
        for turn in range(8):
            x, since = rows(5), len(gpu.calls)
            theirs.work(lambda x=x: tensor.write(x))
            outputs = engine.run([tensor], outputs="device")
            seen = kinds(gpu, since)
            check(outputs, x)
            outputs = None
            assert not seen & {"in", "out", "set", "get", "memsetAsync", "streamSynchronize"}
            names = [call.name for call in gpu.calls[since:] if call.kind == "memcpyAsync"]
            assert len(names) - names.count("theirs") == (3 if turn == 0 else 2)
            if turn > 4:
                assert "graphLaunch" in seen and not seen & {"malloc", "eventCreate", "streamBeginCapture", "free"}
                launched = [call.name for call in gpu.calls[since:] if call.kind == "launchKernel"]
                assert launched == ["theirs"]


def test_the_host_waits_once_at_the_end(gpu: Gpu) -> None:
    theirs = Library(gpu)
    with compiled() as engine:
        for _ in range(3):
            tensor, since = theirs.tensor(rows(5)), len(gpu.calls)
            engine.run([tensor], outputs="device")
            waits = [call.kind for call in gpu.calls[since:] if "ynchronize" in call.kind]
            assert waits == ["eventSynchronize"] and gpu.calls[-1].kind in ("eventSynchronize", "eventRecord")


def test_addresses_that_never_come_again_use_the_graph_of_the_slot(gpu: Gpu) -> None:
    theirs = Library(gpu)
    with compiled() as engine:
        tensors = []
        for _ in range(6):
            x = rows(5)
            tensors.append(theirs.tensor(x))
            since = len(gpu.calls)
            check(engine.run([tensors[-1]]), x)
        assert {"graphLaunch", "within", "out"} <= kinds(gpu, since)


def test_graphs_of_addresses_that_are_not_remembered_are_given_up(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_engine.gpu.slot.CACHED_ADDRESSES", 2)
    theirs = Library(gpu)
    with compiled(streams=1) as engine:
        tensors = [theirs.tensor(rows(3)) for _ in range(4)]
        for tensor in tensors:
            for _ in range(4):
                x = rows(3)
                theirs.work(partial(tensor.write, x))
                check(engine.run([tensor]), x)
            assert 1 <= len(gpu.graphs) <= 3


def test_inputs_on_both_sides_and_a_tensor_at_an_odd_address(gpu: Gpu) -> None:
    model = model_of(
        [helper.make_node("Sub", ["a", "b"], ["c"])],
        {name: (TensorProto.FLOAT, ["n", 6]) for name in "ab"},
        {"c": (TensorProto.FLOAT, ["n", 6])},
    )
    theirs = Library(gpu)
    with gpu_engine.compile(model, device="cuda", auto_batching=False) as engine:
        for offset in (0, 0, 4, 4, 16):
            a, b = rows(3), rows(3)
            given = [theirs.tensor(a, offset), b]
            np.testing.assert_array_equal(engine.run(given)[0], a - b)
            np.testing.assert_array_equal(engine.run(given)[0], a - b)
            np.testing.assert_array_equal(engine.run(given[::-1])[0], b - a)


def test_gaps_are_closed_on_the_device(gpu: Gpu) -> None:
    theirs, whole = Library(gpu), rows(8)
    with compiled() as engine:
        tensor = theirs.tensor(whole)
        strided = Described(tensor, shape=(4, 6), strides=(48, 4))
        check(engine.run([strided]), whole[::2])
        turned = Described(tensor, data=(tensor.address + 7 * 24, False), strides=(-24, 4))
        check(engine.run([turned]), whole[::-1])


@pytest.mark.parametrize("outputs", ["host", "device"])
def test_batches_are_gathered_and_split_on_the_device(gpu: Gpu, outputs: str) -> None:
    theirs = [Library(gpu), Library(gpu)]
    with compiled(auto_batching=None, streams=2, batch=4, batch_timeout_ms=20, warmup=False) as engine:
        items = [rows(1) for _ in range(15)]
        tensors = [theirs[i % 2].tensor(x) for i, x in enumerate(items)]
        since = len(gpu.calls)
        futures = [engine.submit([tensor], outputs=outputs) for tensor in tensors]
        found = [future.result() for future in futures]
        seen = kinds(gpu, since)
        for x, each in zip(items, found, strict=True):
            check(each, x)
        assert not seen & {"in", "set", "get"} and ("out" in seen) == (outputs == "host")
        assert engine.statistics().batch_sizes.get(4)
        many = rows(11)
        check(engine.run_many([theirs[0].tensor(many)], outputs=outputs), many)


def test_tensors_are_held_until_their_kernels_have_run(gpu: Gpu) -> None:
    """Memory that its library gets back is overwritten at once."""
    gpu.pace = 5.0
    theirs = Library(gpu)
    with compiled() as engine:
        for _ in range(3):
            x = rows(4)
            tensor = theirs.tensor(x)
            address, future = tensor.address, engine.submit([tensor])
            del tensor
            check(future.result(), x)
            ends = time.monotonic() + 5
            while not collected(theirs, address) and time.monotonic() < ends:
                time.sleep(1e-3)
            assert collected(theirs, address)


def test_a_result_is_used_again_only_behind_its_readers(gpu: Gpu) -> None:
    """Their kernel, which is not even started when they drop the result, still finds it there."""
    theirs, seen, right, addresses = Library(gpu), list[Any](), list[Any](), list[int]()
    with compiled(outputs="device") as engine:
        for _ in range(6):
            x = rows(3)
            total = engine.run([x])[1]
            addresses.append(total.address)
            held = theirs.take(total)
            del total
            theirs.work(lambda held=held: seen.append(read(held)))
            right.append(expected(x)[1])
            assert (held.address, held.shape, held.dtype) == (addresses[-1], (3,), np.float32)
            del held
        gpu.complete_all()
    np.testing.assert_allclose(seen, right, 1e-4, 1e-5)


def test_a_result_that_was_dropped_behind_a_reader_is_lent_again(gpu: Gpu) -> None:
    """What reads it there is given an address, and not what keeps it alive."""
    theirs, seen, right, addresses = Library(gpu), list[Any](), list[Any](), list[int]()
    with compiled(outputs="device") as engine:
        for _ in range(6):
            x = rows(3)
            total = engine.run([x])[1]
            held = theirs.take(total)
            address = held.address
            theirs.work(lambda address=address: seen.append(np.frombuffer(ctypes.string_at(address, 12), np.float32)))
            addresses.append(address)
            right.append(expected(x)[1])
            del held, total
        gpu.complete_all()
    np.testing.assert_allclose(seen, right, 1e-4, 1e-5)
    assert len(set(addresses)) < len(addresses)


@pytest.mark.parametrize("device", [0, 1])
def test_readers_on_the_default_streams_of_a_device(gpu: Gpu, device: int) -> None:
    """The interface of CUDA's arrays does not say who reads; DLPack says None for the legacy default stream."""
    theirs, seen, right = Library(gpu, LEGACY_STREAM, device), list[Any](), list[Any]()
    with compiled(device=f"cuda:{device}", outputs="device") as engine:
        for turn in range(8):
            x = rows(3)
            total = engine.run([x])[1]
            address = total.address
            if turn % 2:
                assert total.__cuda_array_interface__["data"] == (address, False)
            else:
                exported(total)
            theirs.work(lambda address=address: seen.append(np.frombuffer(ctypes.string_at(address, 12), np.float32)))
            right.append(expected(x)[1])
            del total
        gpu.complete_all()
    np.testing.assert_allclose(seen, right, 1e-4, 1e-5)


@pytest.mark.parametrize("kind", ["malloc", "eventCreate", "eventRecord", "streamWaitEvent", "memcpyAsync"])
def test_calls_that_fail(gpu: Gpu, kind: str) -> None:
    """One request fails; the next, with the same tensors and on the same slot, is right, and nothing is held."""
    theirs = Library(gpu)
    with compiled() as engine:
        for nth in range(1, 5):
            x = rows(4)
            tensor = theirs.tensor(x)
            gpu.fail_at(kind, nth, "cudaErrorMemoryAllocation" if kind == "malloc" else "cudaErrorInvalidValue")
            try:
                check(engine.run([tensor], outputs="device"), x)
            except (RuntimeError, gpu_engine.GpuEngineError):
                gpu.heal()
                check(engine.run([tensor], outputs="device"), x)
            gpu.heal()
            address = tensor.address
            tensor = None
            assert collected(theirs, address)


def test_what_comes_back_speaks_both_protocols(gpu: Gpu) -> None:
    x = rows(4)
    with compiled(outputs="device") as engine:
        half, total = engine.run([x])
        assert half.device == "cuda:0" and half.__dlpack_device__() == (2, 0)
        described = half.__cuda_array_interface__
        assert described == {
            "shape": (4, 6), "typestr": "<f2", "data": (half.address, False), "strides": None, "stream": None,
            "version": 3,
        }  # fmt: skip
        for stream in (None, LEGACY_STREAM, PER_THREAD_STREAM, -1):
            half.__dlpack__(stream=stream, max_version=(1, 1))
        with pytest.raises(BufferError, match="ambiguous"):
            half.__dlpack__(stream=0)
        check([half, total], x)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_elements_that_cupy_does_not_know(gpu: Gpu, dtype: Any) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = model_of([helper.make_node("Transpose", ["x"], ["y"])], {"x": (kind, ["n", 6])}, {"y": (kind, [6, "n"])})
    theirs, x = Library(gpu), rows(3).astype(dtype)
    with gpu_engine.compile(model, device="cuda", outputs="device") as engine:
        found = engine.run([theirs.tensor(x)])[0]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.numpy(), x.T)
        with pytest.raises(
            InputError, match=r"'x' is float32 on cuda:0, but the model takes .*float.*: convert it there"
        ):
            engine.run([theirs.tensor(rows(3))])
        with pytest.raises(AttributeError):
            _ = found.__cuda_array_interface__


def test_results_feed_the_next_engine_without_a_copy(gpu: Gpu) -> None:
    model = model_of(
        [helper.make_node("Neg", ["a"], ["b"])],
        {"a": (TensorProto.FLOAT16, ["n", 6])},
        {"b": (TensorProto.FLOAT16, ["n", 6])},
    )
    with compiled(outputs="device") as first, gpu_engine.compile(model, device="cuda", auto_batching=False) as second:
        x = rows(4)
        for _ in range(3):
            half, _ = first.run([x])
            np.testing.assert_array_equal(second.run(half), -half.numpy())
        assert isinstance(half, DeviceTensor)


def test_tensors_on_another_gpu_or_nowhere(gpu: Gpu) -> None:
    with compiled() as engine, gpu_engine.compile(network(), device="cuda:1", auto_batching=False) as other:
        there, x = Library(gpu, device=1), rows(2)
        tensor = there.tensor(x)
        for given in (tensor, Described(tensor)):
            with pytest.raises(InputError, match="on cuda:1, but the engine runs on cuda:0: move it there"):
                engine.run([given])
            check(other.run([given]), x)
        with pytest.raises(InputError, match="on the host, but the engine runs on cuda:0"):
            engine.run([Described(tensor, data=(4096, False))])
        half = other.run([tensor], outputs="device")[0]
        assert half.device == "cuda:1"
        with pytest.raises(InputError, match="on cuda:1"):
            engine.run([half])


class Both:
    """The first of two GPUs, to an engine that takes tensors of both."""

    def __init__(self, first: Any, second: Any) -> None:
        self._first, self.intake = first, SeveralIntakes([first.intake, second.intake])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


def test_tensors_of_another_gpu_of_the_engine_are_copied(gpu: Gpu) -> None:
    first, second = (load("gpu_engine.gpu.cuda:CudaDevice")(i, "fp32", fake_cupy.binary_source) for i in range(2))
    plan = stages_of(read_named(network()), first.lower).plan
    here, there = Library(gpu, device=0), Library(gpu, device=1)
    with (
        Engine(plan, Both(first, second), validated(auto_batching=False)) as engine,
        compiled(device="cuda:1") as other,
    ):
        for _ in range(4):
            for theirs in (here, there):
                tensor = theirs.tensor(x := rows(3))
                for given in (tensor, Described(tensor)):
                    check(engine.run([given]), x)
        tensor, since = there.tensor(x), len(gpu.calls)
        check(engine.run([tensor]), x)
        assert "within" in kinds(gpu, since)
        half = other.run([x], outputs="device")[0]
        with pytest.raises(InputError, match="'x' is float16 on cuda:1, but the model takes float32"):
            engine.run([half])
        with pytest.raises(InputError, match=r"gaps, float32 on cuda:1, .* make it contiguous"):
            engine.run([Described(tensor, shape=(2, 6), strides=(48, 4))])
        check(engine.run([tensor]), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": object()}, "masked elements"),
        ({"typestr": "<V2"}, "DLPack says more"),
        ({"strides": (24, 2)}, "multiples of the elements' size"),
        ({"stream": 0}, "stream 0"),
    ],
)
def test_interfaces_that_cannot_be_read(gpu: Gpu, changes: dict[str, Any], message: str) -> None:
    tensor = Library(gpu).tensor(rows(2))
    with compiled() as engine, pytest.raises(InputError, match=f"'x' is a tests.Described .*in place: .*{message}"):
        engine.run([Described(tensor, **changes)])


def test_what_a_library_refuses_is_said(gpu: Gpu) -> None:
    class Refusing(Tensor):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("tensors that require gradients are not exported")

    tensor = Refusing(Library(gpu), (2, 6), np.dtype(np.float32))
    with compiled() as engine, pytest.raises(InputError, match="require gradients"):
        engine.run([tensor])
