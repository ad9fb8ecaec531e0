"""compile(): devices by name, options, and small models end to end on the CPU."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gpu_engine
from gpu_engine import DeviceError, EngineClosed, InputError, InvalidModel
from gpu_engine.compiler import open_device
from gpu_engine.options import parse_device
from gpu_engine.runtime import late

F32 = np.float32
WEIGHTS = np.random.default_rng(0).standard_normal((8, 5), F32)


def model(batch: int | str = "N") -> bytes:
    """y = Relu(x @ WEIGHTS) for x [batch, 8]."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Relu", ["product"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(WEIGHTS, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(proto.SerializeToString())


def scaled() -> onnx.ModelProto:
    """y = Sigmoid(x) * x for x [N, 2*h, w]: every extent is symbolic."""
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["s", "x"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "2*h", "w"]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def expected(x: Any) -> Any:
    return np.maximum(x @ WEIGHTS, 0)


def inputs(rows: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, 8), F32)


def test_a_model_runs_at_any_batch() -> None:
    with gpu_engine.compile(model(), device="cpu", streams=1, requests=16) as engine:
        for rows in (0, 1, 3, 8, 30):
            np.testing.assert_allclose(engine.run(inputs(rows)), expected(inputs(rows)), rtol=1e-5, atol=1e-5)
        assert engine.batch == 8 and engine.explain_batching().limiting_factor == "requests"
        assert engine.memory_plan().weights >= WEIGHTS.nbytes


def test_weights_are_there_once_and_activations_per_slot() -> None:
    plans = []
    for streams in (1, 2):
        with gpu_engine.compile(model(), device="cpu", scheduler="multi_stream", streams=streams, batch=4) as engine:
            plans.append(engine.memory_plan())
            assert plans[-1].slots == engine.streams
    assert plans[0].weights == plans[1].weights
    assert plans[0].activations * plans[1].slots == plans[1].activations * plans[0].slots


@pytest.mark.parametrize("text", ["cpu", "CPU", "cpu:0", "BATCH:CPU(4)", "CPU(4)"])
def test_spellings_of_the_cpu(text: str) -> None:
    with gpu_engine.compile(model(), device=text) as engine:
        assert engine.device.startswith("cpu (")
        assert engine.batch == (4 if "4" in text else 1)


def test_batch_in_the_device_string_batches() -> None:
    with gpu_engine.compile(model(), device="BATCH:CPU") as engine:
        assert engine.batch == 8
    with pytest.raises(ValueError, match="give one of them"):
        gpu_engine.compile(model(), device="CPU(4)", batch=3)


def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(late.DEVICES, "cuda", "gpu_engine.no_such_room:CudaDevice")


def test_auto_says_why_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    no_cuda(monkeypatch)
    with caplog.at_level("INFO"):
        device, reason = open_device(parse_device("auto"))
    assert device.name == "cpu" and "cuda is not usable" in reason and "no_such_room" in reason
    assert "running on cpu" in caplog.text


def test_cuda_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    no_cuda(monkeypatch)
    with pytest.raises(DeviceError, match=r"cuda is not usable: No module named 'gpu_engine\.no_such_room'"):
        gpu_engine.compile(model(), device="cuda")
    with gpu_engine.compile(model(), device="cuda", fallback="cpu") as engine:
        assert engine.device.startswith("cpu (") and "cuda is not usable" in engine.device
    with pytest.raises(ValueError, match="fallback"):
        gpu_engine.compile(model(), device="cuda", fallback="tpu")


def test_there_is_one_cpu() -> None:
    with pytest.raises(DeviceError, match="cpu:1"):
        gpu_engine.compile(model(), device="cpu:1")


def test_options_are_checked_before_the_model_is_read() -> None:
    with pytest.raises(TypeError, match="streams"):
        gpu_engine.compile(b"no model", device="cpu", streams=True)
    with pytest.raises(InvalidModel):
        gpu_engine.compile(b"no model", device="cpu")
    with pytest.raises(TypeError, match="num_stream"):
        gpu_engine.compile(model(), num_stream=3)  # type: ignore[call-arg]


def test_extents_with_arithmetic() -> None:
    with gpu_engine.compile(scaled(), device="cpu", streams=2, batch=4) as engine:
        for shape in ((1, 2, 3), (5, 4, 1), (2, 6, 7), (9, 2, 3)):
            x = np.random.default_rng(0).standard_normal(shape, F32)
            np.testing.assert_allclose(engine.run(x), x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match=r"axis 1: the extent is 3, but the model takes 2\*h"):
            engine.run(np.zeros((1, 3, 3), F32))


@pytest.mark.parametrize("streams", [1, 2])
def test_threads_get_their_own_results_on_the_cpu(streams: int) -> None:
    """Every result is that of the request alone, bit for bit: a pointwise model leaves no room for rounding."""
    wrong: list[tuple[int, ...]] = []
    with gpu_engine.compile(scaled(), device="cpu", scheduler="multi_stream", streams=streams, batch=8) as engine:
        shapes = [(1, 2, 3), (1, 4, 3), (2, 2, 3), (3, 2, 5), (1, 2, 40), (11, 2, 3)]
        arrays = [np.random.default_rng(i).standard_normal(shape, F32) for i, shape in enumerate(shapes)]
        alone = [engine.run(array) for array in arrays]

        def client(number: int) -> None:
            chosen = np.random.default_rng(number).integers(0, len(shapes), 200)
            pending = [(i, engine.submit(arrays[i]) if k % 4 else engine.run(arrays[i])) for k, i in enumerate(chosen)]
            for i, result in pending:
                found = result if isinstance(result, np.ndarray) else result.result(60)
                if not np.array_equal(found, alone[i]):
                    wrong.append(shapes[i])

        threads = [threading.Thread(target=client, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not wrong


def test_a_fixed_batch_runs_as_given() -> None:
    with gpu_engine.compile(model(batch=3), device="cpu", streams=1, requests=16) as engine:
        np.testing.assert_allclose(engine.run(inputs(3)), expected(inputs(3)), rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="axis 0: the extent is 2, but the model takes 3"):
            engine.run(inputs(2))
        assert engine.explain_batching().limiting_factor == "graph"


def test_after_close() -> None:
    engine = gpu_engine.compile(model(), device="cpu")
    engine.close()
    with pytest.raises(EngineClosed):
        engine.run(inputs(1))
    assert engine.statistics().inference_count == 0
