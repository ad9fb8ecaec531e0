"""Tables of constants that only some rows are read of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import gpu_engine
from gpu_engine.frontend.reader import read
from gpu_engine.frontend.tables import LEAST_ROWS, read_rows_first

ROWS, WIDTH = LEAST_ROWS + 3, 5
INT8 = np.random.default_rng(0).integers(-9, 9, (ROWS, WIDTH)).astype(np.int8)
SCALES = np.random.default_rng(1).random((ROWS, 1)).astype(np.float32)
SHIFT = np.arange(WIDTH, dtype=np.float32)
Array = NDArray[Any]


def model(nodes: list[Any], outputs: dict[str, int], rank: int = 1, **constants: Array) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info("ids", TensorProto.INT64, [None] * rank)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * size) for name, size in outputs.items()]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ports, results, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def dequantized() -> list[Any]:
    return [
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["table"]),
    ]


def gather(out: str = "y", **attributes: Any) -> Any:
    return helper.make_node("Gather", ["table", "ids"], [out], **attributes)


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in read_rows_first(read(proto).graph).nodes]


@pytest.mark.parametrize(
    "ids", [np.int64([3, -1, 7, 3]), np.int64([[0], [ROWS - 1]]), np.int64(5), np.int64([])], ids=str
)
def test_rows_are_read_before_they_are_computed(ids: Array) -> None:
    nodes = [*dequantized(), gather()]
    proto = model(nodes, {"y": ids.ndim + 1}, ids.ndim, q=INT8, scale=SCALES, shift=SHIFT)
    assert operators(proto) == ["Gather", "Gather", "Cast", "Mul", "Add"]
    engine = gpu_engine.compile(proto, device="cpu")
    try:
        found = engine.run({"ids": ids})["y"]
    finally:
        engine.close()
    expected = (INT8.astype(np.float32) * SCALES + SHIFT)[ids]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_two_readers_read_twice() -> None:
    nodes = [*dequantized(), gather("a"), gather("b"), helper.make_node("Add", ["a", "b"], ["y"])]
    proto = model(nodes, {"y": 2}, q=INT8, scale=SCALES, shift=SHIFT)
    assert operators(proto).count("Gather") == 4


def test_a_table_that_something_else_needs_whole_stays() -> None:
    constants = {"q": INT8, "scale": SCALES, "shift": SHIFT}
    before = [node.op_type for node in (*dequantized(), gather())]
    assert operators(model([*dequantized(), gather()], {"y": 2, "table": 2}, **constants)) == before
    assert operators(model([*dequantized(), gather()], {"y": 2, "m": 2}, **constants)) == before
    other = helper.make_node("Relu", ["table"], ["z"])
    assert operators(model([*dequantized(), gather(), other], {"y": 2, "z": 2}, **constants))[:4] == before
    assert operators(model([*dequantized(), gather(axis=1)], {"y": 2}, **constants)) == before


def test_what_is_small_or_broadcast_along_its_rows_stays() -> None:
    nodes = [*dequantized(), gather()]
    small = model(nodes, {"y": 2}, q=INT8[:9], scale=SCALES[:9], shift=SHIFT)
    row = model(nodes, {"y": 2}, q=INT8, scale=SCALES, shift=SHIFT[None])
    for proto in (small, row):
        assert operators(proto)[0] == "Cast"


def test_an_axis_that_is_no_number_is_refused() -> None:
    gathered = helper.make_node("Gather", ["q", "ids"], ["y"])
    gathered.attribute.append(helper.make_attribute("axis", numpy_helper.from_array(np.zeros(0, np.int64))))
    with pytest.raises(gpu_engine.GpuEngineError, match="axis of Gather is a tensor"):
        gpu_engine.compile(model([gathered], {"y": 2}, q=INT8))
