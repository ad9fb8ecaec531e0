"""Models without their weights: what is left, what comes back, and the same model in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import gpu_engine
from benchmarks.skeletons import converted, filled, stripped


def model_of() -> ModelProto:
    """x [n, 64] through a product and a bias, plus a number that ids [n] choose from a table."""
    random = np.random.default_rng(5)
    weights = (random.standard_normal((64, 64)) * 0.25 + 0.1).astype(np.float32)
    table = random.integers(-3, 60, (600,))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "bias"], ["s"]),
        helper.make_node("Gather", ["table", "ids"], ["t"]),
        helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["f", "axes"], ["column"]),
        helper.make_node("Add", ["s", "column"], ["y"]),
    ]
    weight_list = [
        numpy_helper.from_array(array, name)
        for name, array in (
            ("w", weights), ("bias", weights[0]), ("table", table), ("axes", np.array([1]))
        )
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])
    graph = helper.make_graph(nodes, "g", [x, ids], [y], weight_list)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def weights_of(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_a_skeleton_is_small_and_keeps_the_distribution() -> None:
    model = model_of()
    skeleton = stripped(model)
    assert len(skeleton.SerializeToString()) < 1500 < len(model.SerializeToString())
    found, given = weights_of(filled(skeleton)), weights_of(model)
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        name: (array.dtype, array.shape) for name, array in given.items()
    }
    assert np.array_equal(found["bias"], given["bias"])
    assert not np.array_equal(found["w"], given["w"])
    assert abs(found["w"].mean() - given["w"].mean()) < 0.02
    assert abs(found["w"].std() / given["w"].std() - 1) < 0.05
    assert found["table"].min() >= given["table"].min() and found["table"].max() <= given["table"].max()


def test_filling_gives_the_same_weights_every_time() -> None:
    skeleton = stripped(model_of())
    once, twice = (weights_of(filled(skeleton)) for _ in range(2))
    assert all(np.array_equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_converted_model_gives_nearly_the_same(kind: int) -> None:
    model = filled(stripped(model_of()))
    narrow = filled(converted(stripped(model_of()), kind))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    onnx.checker.check_model(narrow)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    ids = np.array([0, 7, 599])
    with gpu_engine.compile(model, device="cpu") as engine, gpu_engine.compile(narrow, device="cpu") as half:
        expected, found = engine.run([x, ids])[0], half.run([x.astype(dtype), ids])[0]
    assert found.dtype == dtype
    step = float(np.finfo(np.float16).eps) if kind == TensorProto.FLOAT16 else 2.0**-7
    assert np.abs(found.astype(np.float64) - expected).max() < 4 * step * np.abs(expected).max()


def test_scales_of_a_resize_stay_float32() -> None:
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, "h", "w"]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [scales])
    model = converted(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), TensorProto.FLOAT16
    )  # fmt: skip
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
