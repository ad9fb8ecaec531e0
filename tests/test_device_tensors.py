"""Tensors in the interpreter's memory in and out, by every way to run; and tensors of other libraries on the host."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import gpu_engine
from gpu_engine.errors import InputError
from gpu_engine.gpu.device_arrays import DeviceArray, DeviceModule
from gpu_engine.plan.plan import Port
from gpu_engine.runtime.arrays import as_array
from gpu_engine.runtime.device_tensors import DeviceTensor
from gpu_engine.runtime.dlpack import DTYPES, exported, on_host
from gpu_engine.runtime.engine import Engine
from tests.test_gpu_cuda import network

pytest.importorskip("triton")
F32 = np.dtype(np.float32)


def on_device(array: Any) -> DeviceArray:
    found: DeviceArray = DeviceModule().on_device(np.asarray(array))
    return found


def expected(x: Any) -> list[Any]:
    t = np.tanh(x * 2 + np.arange(6, dtype=np.float32) / 10)
    return [t.astype(np.float16), t.sum(axis=1)]


def check(found: Any, x: Any) -> None:
    for output, right in zip(found, expected(x), strict=True):
        array = output.numpy() if isinstance(output, DeviceTensor) else output
        assert array.shape == right.shape and array.dtype == right.dtype
        np.testing.assert_allclose(array, right, 1e-3, 1e-4)


def rows(count: int) -> Any:
    return np.random.default_rng().standard_normal((count, 6), np.float32)


def compiled(model: onnx.ModelProto, **options: Any) -> Engine:
    engine = gpu_engine.compile(model, device="interpret", **options)
    assert isinstance(engine, Engine)
    return engine


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every copy inside the device."""
    from gpu_engine.gpu.interpret import Interpreter

    found: list[int] = []
    move = Interpreter.move

    def noted(self: Interpreter, target: int, source: int, nbytes: int) -> None:
        found.append(nbytes)
        move(self, target, source, nbytes)

    monkeypatch.setattr(Interpreter, "move", noted)
    return found


def test_a_lone_tensor_is_read_where_it_lies(moves: list[int]) -> None:
    with compiled(network()) as engine:
        x = on_device(rows(3))
        for _ in range(3):
            check(engine.run([x]), x._host)
            x._host[...] = rows(3)
        assert moves == []
        check(engine.run([rows_ := rows(3)]), rows_)


def test_addresses_that_come_and_go(moves: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are remembered, between arrays of the host."""
    monkeypatch.setattr("gpu_engine.gpu.slot.CACHED_ADDRESSES", 2)
    with compiled(network()) as engine:
        tensors = [on_device(rows(2)) for _ in range(4)]
        for x in [*tensors, *tensors[::-1]]:
            check(engine.run([x]), x._host)
            check(engine.run([host := rows(2)]), host)
        assert moves == []


@pytest.mark.parametrize("cut", [np.s_[:, ::2], np.s_[::2, :6], np.s_[::-1, 5::-1]])
def test_tensors_with_gaps_are_copied_on_the_device(cut: Any, moves: list[int]) -> None:
    whole = np.random.default_rng().standard_normal((4, 12), np.float32)
    x = on_device(whole)[cut]
    with compiled(network()) as engine:
        check(engine.run([x]), whole[cut])
    assert moves == [whole[cut].nbytes]


def test_a_tensor_at_an_odd_address_is_copied(moves: list[int]) -> None:
    x = on_device(np.zeros(19, np.float32))[1:].reshape(3, 6)
    x._host[...] = rows(3)
    assert x._host.ctypes.data % 16
    with compiled(network()) as engine:
        check(engine.run([x]), x._host)
    assert moves == [72]


def test_outputs_stay_on_the_device() -> None:
    with compiled(network()) as engine:
        x = rows(3)
        first = engine.run([on_device(x)], outputs="device")
        second = engine.run([rows(3)], outputs="device")
        assert all(isinstance(output, DeviceTensor) for output in first + second)
        check(first, x)
        named = engine.run({"x": on_device(x)}, outputs="device")
        check([named["half"], named["sum"]], x)
        assert isinstance(engine.run([on_device(x)])[0], np.ndarray)
        half = first[0]
        assert (half.shape, half.dtype, half.device, len(half)) == ((3, 6), np.float16, "interpret", 3)
        assert (half.ndim, half.size, half.nbytes) == (2, 18, 36) and "float16[3, 6] on interpret" in repr(half)


def test_the_option_says_where_outputs_lie_and_a_call_may_differ() -> None:
    with compiled(network(), outputs="device") as engine:
        x = rows(2)
        check(engine.run([x]), x)
        assert isinstance(engine.run([x])[0], DeviceTensor)
        assert isinstance(engine.run([x], outputs="host")[0], np.ndarray)
        with pytest.raises(ValueError, match="outputs must be one of host, device, given 'gpu'"):
            engine.run([x], outputs="gpu")
    with pytest.raises(ValueError, match="outputs must be one of"):
        compiled(network(), outputs="gpu")


def test_an_output_is_an_input_of_the_next_engine(moves: list[int]) -> None:
    node = helper.make_node("Neg", ["a"], ["b"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 6]) for name in "ab"]
    model = helper.make_model(
        helper.make_graph([node], "neg", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 20)]
    )
    with compiled(network(), outputs="device") as first, compiled(model) as second:
        x = rows(4)
        half, _ = first.run([x])
        copied = len(moves)
        np.testing.assert_array_equal(second.run(half), -half.numpy())
        assert len(moves) == copied


@pytest.mark.parametrize("outputs", ["host", "device"])
def test_requests_share_executions(outputs: str) -> None:
    """As many as are submitted before the slot is free."""
    with compiled(network(), streams=1, batch=4, batch_timeout_ms=200) as engine:
        items = [on_device(rows(1)) for _ in range(8)]
        futures = [engine.submit([x], outputs=outputs) for x in items]
        for x, future in zip(items, futures, strict=True):
            check(future.result(), x._host)
        assert engine.statistics().batch_sizes == {4: 2}


def test_neighbours_in_memory_are_one_tensor(moves: list[int]) -> None:
    with compiled(network(), streams=1, batch=2, batch_timeout_ms=500) as engine:
        whole = on_device(rows(2))
        futures = [engine.submit([whole[i : i + 1]]) for i in range(2)]
        for i, future in enumerate(futures):
            check(future.result(), whole._host[i : i + 1])
        assert engine.statistics().batch_sizes == {2: 1} and moves == []


def test_what_lies_apart_shares_no_execution() -> None:
    with compiled(network(), streams=1, batch=2, batch_timeout_ms=50) as engine:
        items = [rows(1) for _ in range(4)]
        given = [x if i % 2 else on_device(x) for i, x in enumerate(items)]
        futures = [engine.submit([x]) for x in given]
        for x, future in zip(items, futures, strict=True):
            check(future.result(), x)
        assert engine.statistics().batch_sizes == {2: 2}


@pytest.mark.parametrize("outputs", ["host", "device"])
def test_a_batch_is_filled_up_to_its_bucket(outputs: str) -> None:
    with compiled(network(), streams=1, batch=4, deterministic=True) as engine:
        for count in (3, 1, 4):
            x = on_device(rows(count))
            check(engine.run([x], outputs=outputs), x._host)
        assert engine.statistics().padded_rows == 4


@pytest.mark.parametrize("outputs", ["host", "device"])
def test_many_rows_are_cut_and_joined_on_the_device(outputs: str) -> None:
    with compiled(network(), streams=2, batch=4) as engine:
        x = on_device(rows(11))
        check(engine.run_many([x], outputs=outputs), x._host)
        check(engine.run([x], outputs=outputs), x._host)


def test_every_way_to_run_takes_and_gives_tensors() -> None:
    async def asynchronously(engine: Engine, items: list[Any]) -> list[Any]:
        found = [await engine.run_async([items[0]], outputs="device")]
        return found + [each async for each in engine.stream([[x] for x in items], outputs="device")]

    with compiled(network()) as engine:
        items = [on_device(rows(2)) for _ in range(3)]
        found = list(engine.map([[x] for x in items], outputs="device"))
        found += asyncio.run(asynchronously(engine, items))
        request = engine.request(outputs="device")
        found.append(request.run([items[0]]))
        found.append(list(request.run().values()))
        assert request.get_tensor("x") is items[0]
        for x, outputs in zip([*items, items[0], *items, items[0], items[0]], found, strict=True):
            assert isinstance(outputs[0], DeviceTensor)
            check(outputs, x._host)


def test_no_rows() -> None:
    with compiled(network()) as engine:
        half, total = engine.run([on_device(rows(0))], outputs="device")
        assert half.numpy().shape == (0, 6) and total.numpy().shape == (0,)
        assert engine.run([on_device(rows(0))])[0].shape == (0, 6)


def model_of(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: Any = ()) -> Any:
    """Ports are {name: (element type, shape)}."""
    ends = [[helper.make_tensor_value_info(n, *port) for n, port in ports.items()] for ports in (inputs, outputs)]
    graph = helper.make_graph(nodes, "model", *ends, list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("outputs", ["host", "device"])
def test_shapes_that_depend_on_values_and_outputs_that_are_inputs_or_constants(outputs: str) -> None:
    model = model_of(
        [
            helper.make_node("NonZero", ["x"], ["places"]),
            helper.make_node("Identity", ["x"], ["same"]),
            helper.make_node("Identity", ["c"], ["known"]),
            helper.make_node("Add", ["x", "c"], ["more"]),
        ],
        {"x": (TensorProto.FLOAT, ["n"])},
        {"places": (TensorProto.INT64, [1, "k"])} | dict.fromkeys(("same", "more"), (TensorProto.FLOAT, None))
        | {"known": (TensorProto.FLOAT, [1])},
        [helper.make_tensor("c", TensorProto.FLOAT, [1], [5.0])],
    )  # fmt: skip
    with compiled(model) as engine:
        for x in (np.array([0, 1, 0, 2, 3], np.float32), np.array([0, 0, 4, 0, 0, 0], np.float32)):
            given = on_device(x.copy())
            found = engine.run([given], outputs=outputs)
            arrays = [each.numpy() if outputs == "device" else each for each in found]
            for array, right in zip(arrays, [np.flatnonzero(x)[None], x, x + 5, [5.0]], strict=True):
                np.testing.assert_array_equal(array, right)
            given._host[...] = 9
            if outputs == "device":
                np.testing.assert_array_equal(found[1].numpy(), x)


def test_outputs_that_are_inputs_come_from_where_these_lie() -> None:
    model = model_of(
        [helper.make_node("Identity", [name], [name + "_again"]) for name in "abc"],
        {name: (TensorProto.FLOAT, ["n"]) for name in "abc"},
        {name + "_again": (TensorProto.FLOAT, ["n"]) for name in "abc"},
    )
    with compiled(model) as engine:
        arrays = [np.random.default_rng().standard_normal(5, np.float32) for _ in range(3)]
        found = engine.run([on_device(arrays[0]), arrays[1], on_device(arrays[2])])
        np.testing.assert_array_equal(found, arrays)


def test_a_shared_input_and_one_with_rows() -> None:
    model = model_of(
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 6]), "scale": (TensorProto.FLOAT, [6])},
        {"y": (TensorProto.FLOAT, ["n", 6])},
    )
    with compiled(model, streams=1, batch=2, batch_timeout_ms=50) as engine:
        items, scale = [rows(1) for _ in range(4)], rows(1)[0]
        for shared in (scale, on_device(scale)):
            futures = [engine.submit([on_device(x), shared], outputs="device") for x in items]
            for x, future in zip(items, futures, strict=True):
                np.testing.assert_array_equal(future.result()[0].numpy(), x * scale)


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.BOOL])
def test_elements_that_numpy_does_not_know(kind: int) -> None:
    torch = pytest.importorskip("torch")
    node = helper.make_node("Transpose", ["x"], ["y"])
    model = model_of([node], {"x": (kind, [2, 3])}, {"y": (kind, [3, 2])})
    x = np.array([[0, 1, 2], [3, 4, 5]]).astype(helper.tensor_dtype_to_np_dtype(kind))
    with compiled(model, outputs="device") as engine:
        found = engine.run([on_device(x)])[0]
        np.testing.assert_array_equal(found.numpy().astype(float), x.T.astype(float))
        theirs = torch.from_dlpack(found)
        assert theirs.shape == (3, 2) and str(theirs.dtype).removeprefix("torch.") == x.dtype.name
        np.testing.assert_array_equal(theirs.to(torch.float32).numpy(), x.T.astype(np.float32))


def test_memory_is_lent_until_nobody_holds_it() -> None:
    torch = pytest.importorskip("torch")
    with compiled(network(), outputs="device") as engine:
        x = rows(3)
        first = engine.run([x])
        held = torch.from_dlpack(first[1])
        address = first[1].address
        del first
        assert all(each[1].address != address for each in [engine.run([rows(3)]) for _ in range(4)])
        np.testing.assert_allclose(held.numpy(), expected(x)[1], 1e-4, 1e-5)
        del held
        addresses = set()
        for _ in range(8):
            found = engine.run([rows(3)])
            addresses |= {output.address for output in found}
        assert address in addresses and len(addresses) <= 10


def test_nobody_but_the_caller_holds_a_result() -> None:
    with compiled(network(), outputs="device", streams=2, batch=4) as engine:
        for make in (
            lambda: engine.run([rows(2)]),
            lambda: engine.run_many([rows(11)]),
            lambda: engine.submit([rows(1)]).result(),
        ):
            found = make()
            alive = [weakref.ref(output) for output in found]
            del found
            ends = time.monotonic() + 5
            while any(each() is not None for each in alive) and time.monotonic() < ends:
                time.sleep(1e-3)
            assert [each() for each in alive] == [None, None]


def test_results_outlive_their_engine() -> None:
    engine = compiled(network(), outputs="device")
    x = rows(3)
    found = engine.run([x])
    engine.close()
    del engine
    gc.collect()
    check(found, x)


def test_tensors_are_held_until_they_were_read() -> None:
    with compiled(network(), streams=1, batch=4, batch_timeout_ms=100) as engine:
        x = on_device(rows(1))
        right, alive = x._host.copy(), weakref.ref(x._host)
        future = engine.submit([x])
        del x
        assert alive() is not None
        check(future.result(), right)
        engine.run([rows(1)])
        gc.collect()
        assert alive() is None


class Elsewhere:
    """A tensor on a device that is not there."""

    dtype, shape = F32, (2, 6)

    def __init__(self, kind: int = 2, ordinal: int = 1) -> None:
        self.device = kind, ordinal

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("nobody may ask")


class Described:
    """A tensor that only has the interface of CUDA's arrays."""

    def __init__(self) -> None:
        self.__cuda_array_interface__ = {"shape": (2, 6), "typestr": "<f4", "data": (4096, False), "version": 3}


@pytest.mark.parametrize("device", ["cpu", "interpret"])
def test_tensors_that_lie_elsewhere_are_refused(device: str) -> None:
    with gpu_engine.compile(network(), device=device) as engine:
        for tensor, place in (
            (Elsewhere(), "cuda:1"),
            (Elsewhere(10, 0), "rocm:0"),
            (Elsewhere(13, 0), "managed memory of CUDA"),
            (Described(), "a GPU"),
        ):
            with pytest.raises(
                InputError, match=f"input 'x' is a .* on {place}, but the engine runs on {device}: move"
            ):
                engine.run([tensor])
            with pytest.raises(InputError, match="move it there"):
                engine.submit([tensor])


def test_the_cpu_takes_no_tensor_of_the_interpreter_but_its_results() -> None:
    with gpu_engine.compile(network(), device="cpu") as cpu, compiled(network(), outputs="device") as ours:
        with pytest.raises(InputError, match="implicit conversion"):
            cpu.run([on_device(rows(2))])
        assert isinstance(cpu.run([rows(2)], outputs="device")[0], np.ndarray)
        del ours


def test_what_does_not_fit_is_refused() -> None:
    with compiled(network()) as engine:
        with pytest.raises(
            InputError, match="'x' is float64 on interpret, but the model takes float32: convert it there"
        ):
            engine.run([on_device(np.zeros((2, 6)))])
        with pytest.raises(InputError, match="x"):
            engine.run([on_device(np.zeros((2, 5), np.float32))])
    with compiled(network(), batch=4) as engine, pytest.raises(InputError, match="warm-up takes arrays of the host"):
        engine.warmup([on_device(rows(2))])


def test_strings_come_to_the_host() -> None:
    nodes = [helper.make_node("StringConcat", ["x", "x"], ["y"])]
    model = model_of(nodes, {"x": (TensorProto.STRING, [2])}, {"y": (TensorProto.STRING, [2])})
    with compiled(model) as engine, pytest.raises(ValueError, match="outputs cannot lie on the device: y"):
        engine.run([np.array(["a", "b"], object)], outputs="device")


@pytest.mark.parametrize("dtype", sorted({str(d) for d in DTYPES.values()}))
def test_dlpack_there_and_back(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, dtype):
        pytest.skip("torch has no such elements")
    theirs = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(getattr(torch, dtype))
    for given in (theirs, theirs.T, theirs[:, 1:]):
        found = on_host(exported(given))
        assert found.dtype.name == dtype and found.shape == tuple(given.shape)
        right = given.to(torch.complex64).numpy()
        np.testing.assert_array_equal(found.astype(np.complex64), right)
    kept = on_host(exported(theirs))
    alive = weakref.ref(theirs.untyped_storage())
    assert kept.ctypes.data == theirs.data_ptr() and alive is not None


def test_a_tensor_of_torch_on_the_host_is_used_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    for theirs, dtype in ((torch.ones(2, 6), F32), (torch.ones(2, dtype=torch.bfloat16), ml_dtypes.bfloat16)):
        found = as_array(theirs, Port("x", np.dtype(dtype), theirs.shape))
        assert found.ctypes.data == theirs.data_ptr() and found.dtype == dtype
        theirs[0] = 5
        assert (np.asarray(found[0], np.float32) == 5).all()
    with gpu_engine.compile(network(), device="cpu") as engine:
        x = torch.randn(3, 6)
        check(engine.run([x]), x.numpy())
    with pytest.raises(InputError, match="gradient"):
        as_array(torch.ones(2, requires_grad=True), Port("x", F32, (2,)))


def test_exports_that_cannot_be_served() -> None:
    with compiled(network(), outputs="device") as engine:
        found = engine.run([rows(2)])[0]
    for options in ({"copy": True}, {"dl_device": (2, 0)}, {"stream": 0}):
        with pytest.raises(BufferError):
            found.__dlpack__(**options)
    assert not hasattr(found, "__cuda_array_interface__")
    with pytest.raises(TypeError, match="silently: use"):
        np.asarray(found)
