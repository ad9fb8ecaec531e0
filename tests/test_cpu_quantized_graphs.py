"""Quantised graphs (QDQ) on the CPU device: products of integers, and what ONNX's reference makes of the same graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import gpu_engine
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.ir.dtypes import FLOAT32, INT16, INT32
from gpu_engine.ir.graph import Graph
from gpu_engine.ir.ops import Conv, Map, MatMul, Pool, Reshape, Transpose
from gpu_engine.passes.pipeline import optimize

Array = NDArray[Any]


class Model:
    """A QDQ graph under construction: every method adds nodes and gives the name of their result."""

    def __init__(self, shape: Sequence[Any], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.shape, self.nodes, self.constants = shape, [], []

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def grid(self, x: str, scale: float, zero: Any) -> str:
        """QuantizeLinear and DequantizeLinear."""
        pair = self.constant(np.float32(scale)), self.constant(zero)
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, *pair), *pair)

    def weights(self, *shape: int, axis: int | None = 0, dtype: Any = np.int8, zero: int = 0) -> str:
        """Bytes, dequantised per tensor or along an axis."""
        info = np.iinfo(dtype)
        held = self.random.integers(info.min, info.max + 1, shape).astype(dtype)
        count = () if axis is None else (shape[axis],)
        scale = self.random.uniform(0.001, 0.01, count).astype(np.float32)
        zeros = np.full(count, zero, dtype)
        operands = map(self.constant, (held, scale, zeros))
        return self.add("DequantizeLinear", *operands, **({} if axis is None else {"axis": axis}))

    def bytes(self, result: str) -> bytes:
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_empty_tensor_value_info(result)], self.constants,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model).SerializeToString()


def optimized(model: bytes) -> Graph:
    return optimize(import_model(read(model), SpecificationFunctions(), None))


def products(graph: Graph) -> list[Any]:
    return [node for node in graph.nodes if isinstance(node.op, Conv | MatMul)]


def check(model: Model, result: str, x: Array, step: float = 0.0) -> Graph:
    """The engine gives what ONNX's reference gives: but for sums between two levels, which may round either way."""
    serialized = model.bytes(result)
    (expected,) = ReferenceEvaluator(onnx.load_from_string(serialized)).run(None, {"x": x})
    with gpu_engine.compile(serialized, device="cpu", streams=1, threads=1) as engine:
        (found,) = engine.run({"x": x}).values()
    distance = np.abs(found.astype(np.float64) - expected)
    limit = 1e-5 + 1e-5 * np.abs(expected)
    assert (distance <= limit + step).all()
    assert (distance > limit).mean() <= 0.02
    graph = optimized(serialized)
    assert all(node.op.accumulate == INT32 and node.inputs[0].dtype == INT16 for node in products(graph))
    return graph


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(128), np.uint8(255), np.int8(0), np.int8(-128), np.int8(5)])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 16])
def test_convolutions_of_every_zero_point(channels: int, zero: Any) -> None:
    model = Model(("N", channels, 9, 8))
    w = model.weights(21, channels, 3, 3)
    bias = model.constant(model.random.standard_normal(21).astype(np.float32))
    found = model.add("Conv", model.grid("x", 0.03, zero), w, bias, pads=[1, 0, 2, 1], strides=[1, 2])
    x = model.random.standard_normal((2, channels, 9, 8)).astype(np.float32) * 3
    check(model, model.grid(model.add("Relu", found), 0.05, np.uint8(3)), x, 0.0501)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("dtype", "weight_zero"), [(np.int8, 0), (np.int8, -7), (np.uint8, 131)])
def test_weights_of_every_kind(dtype: Any, weight_zero: int, axis: int | None) -> None:
    model = Model(("N", 6, 12, 12))
    w = model.weights(33, 6, 3, 3, axis=axis, dtype=dtype, zero=weight_zero)
    found = model.add("Conv", model.grid("x", 0.02, np.uint8(120)), w, pads=[1] * 4, dilations=[2, 1])
    x = model.random.standard_normal((1, 6, 12, 12)).astype(np.float32)
    check(model, found, x)


def test_a_residual_block_stays_in_integers() -> None:
    """Between convolutions there are int16 tensors alone: no float32 image is stored."""
    model = Model((1, 3, 20, 20))
    x = model.grid("x", 0.03, np.uint8(126))
    stem = model.add("Conv", x, model.weights(32, 3, 3, 3), pads=[1] * 4)
    body = first = model.grid(model.add("Relu", stem), 0.04, np.uint8(0))
    for _ in range(2):
        spread = model.grid(model.add("Conv", body, model.weights(32, 32, 3, 3), pads=[1] * 4), 0.3, np.uint8(117))
        body = model.grid(model.add("Clip", spread, model.constant(np.float32(0)), ""), 0.15, np.uint8(0))
        deep = model.add("Conv", body, model.weights(32, 1, 3, 3), pads=[1] * 4, group=32)
        body = model.grid(deep, 0.08, np.uint8(100))
    total = model.add("Add", model.grid(model.add("Conv", body, model.weights(32, 32, 1, 1)), 0.2, np.uint8(90)), first)
    image = model.random.standard_normal((1, 3, 20, 20)).astype(np.float32)
    graph = check(model, model.grid(total, 0.2, np.uint8(60)), image, 3.0)
    inner = [node.outputs[0] for node in graph.nodes if node.outputs[0].rank == 4]
    assert [value.dtype for value in inner[:-1]] == [INT16] * (len(inner) - 1)
    assert inner[-1].dtype == FLOAT32 and sum(isinstance(node.op, Map) for node in graph.nodes) == 1


@pytest.mark.parametrize(
    "second", [(0.05, np.uint8(90)), (0.05, np.uint8(91)), (0.06, np.uint8(90)), (0.05, np.int8(-38))]
)
def test_maxima_are_taken_of_integers(second: tuple[float, Any]) -> None:
    """Quantised once more on the same levels, as a pool's result is, they are what they were."""
    model = Model(("N", 4, 13, 12))
    first = model.grid(
        model.add("Conv", model.grid("x", 0.03, np.uint8(126)), model.weights(24, 4, 3, 3)), 0.05, np.uint8(90)
    )
    pooled = model.add("MaxPool", first, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1])
    found = model.add("Conv", model.grid(pooled, *second), model.weights(8, 24, 1, 1))
    x = model.random.standard_normal((2, 4, 13, 12)).astype(np.float32)
    graph = check(model, found, x, 1.0)
    (pool,) = (node for node in graph.nodes if isinstance(node.op, Pool))
    assert pool.inputs[0].dtype == INT16
    same = second[1].dtype == np.int8 or second == (0.05, np.uint8(90))
    assert sum(isinstance(node.op, Map) for node in graph.nodes) == 1 + (not same)


def test_integers_are_moved_before_they_are_dequantised() -> None:
    model = Model(("N", 6, 10))
    x = model.grid(
        model.add("MatMul", model.grid("x", 0.02, np.uint8(131)), model.weights(10, 8, axis=1)), 0.1, np.uint8(7)
    )
    turned = model.add("Transpose", x, perm=[0, 2, 1])
    flat = model.add("Reshape", turned, model.constant(np.array([0, 4, 12], np.int64)))
    found = model.add("MatMul", model.grid(flat, 0.1, np.uint8(7)), model.weights(12, 5, axis=1))
    graph = check(model, found, model.random.standard_normal((3, 6, 10)).astype(np.float32), 1.0)
    assert sum(isinstance(node.op, Map) for node in graph.nodes) == 1
    assert all(node.inputs[0].dtype == INT16 for node in graph.nodes if isinstance(node.op, Transpose | Reshape))


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "transposed"])
@pytest.mark.parametrize("columns", [1, 8, 33])
@pytest.mark.parametrize("depth", [1, 7, 64])
def test_products_with_weights(kind: str, columns: int, depth: int) -> None:
    model = Model(("M", depth))
    x = model.grid("x", 0.02, np.uint8(131))
    if kind == "MatMul":
        found = model.add("MatMul", x, model.weights(depth, columns, axis=1))
    else:
        turned = kind == "transposed"
        w = model.weights(*((columns, depth) if turned else (depth, columns)), axis=0 if turned else 1)
        bias = model.constant(model.random.standard_normal(columns).astype(np.float32))
        found = model.add("Gemm", x, w, bias, transB=int(turned))
    rows = model.random.standard_normal((13, depth)).astype(np.float32)
    check(model, found, rows)
    check(model, model.grid(found, 0.05, np.int8(-3)), rows, 0.0501)


@pytest.mark.parametrize("depth", [1, 6, 7, 40])
def test_products_of_two_activations(depth: int) -> None:
    model = Model(("N", 9, depth))
    x = model.grid("x", 0.02, np.uint8(131))
    turned = model.grid(model.add("Transpose", "x", perm=[0, 2, 1]), 0.03, np.uint8(100))
    scores = model.add("MatMul", x, turned)
    rows = model.random.standard_normal((3, 9, depth)).astype(np.float32)
    check(model, scores, rows)
    mixed = model.add("MatMul", model.grid(model.add("Softmax", scores), 1 / 255, np.uint8(0)), x)
    check(model, mixed, rows, 0.05)


def test_sums_that_could_leave_int32_stay_floats() -> None:
    model = Model((1, 40000))
    w = model.weights(40000, 1, axis=None, dtype=np.uint8, zero=255)
    found = model.add("MatMul", model.grid("x", 0.02, np.uint8(255)), w)
    (product,) = products(optimized(model.bytes(found)))
    assert product.op.accumulate is None


def test_what_no_product_multiplies_is_left_alone() -> None:
    model = Model((1, 8))
    found = model.add("Add", model.grid("x", 0.02, np.uint8(3)), "x")
    x = np.linspace(-9, 9, 8, dtype=np.float32).reshape(1, 8)
    assert [type(node.op) for node in check(model, found, x).nodes] == [Map]


def test_invalid_numbers_become_bytes() -> None:
    model = Model((1, 4))
    found = model.add("MatMul", model.grid("x", 0.02, np.uint8(128)), model.weights(4, 8, axis=1))
    with gpu_engine.compile(model.bytes(found), device="cpu", streams=1, threads=1) as engine:
        (result,) = engine.run({"x": np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)}).values()
    assert np.isfinite(result).all()
