"""From a Model to a Graph: names, order, functions, symbols and what is missing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.ir import dims
from gpu_engine.ir.graph import Graph, verify


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str | None]],
    outputs: list[str],
    functions: list[onnx.FunctionProto] | None = None,
    opset: int = 17,
    extra: tuple[str, ...] = (),
) -> Graph:
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        ),
        opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in extra)],
        functions=functions or [],
    )
    return verify(import_model(read(proto.SerializeToString()), SpecificationFunctions()), "import")


def test_every_unsupported_operator_is_listed_at_once() -> None:
    nodes = [
        helper.make_node("Nope", ["x"], ["a"]),
        helper.make_node("Nope", ["a"], ["b"]),
        helper.make_node("Strange", ["b"], ["y"], domain="org.example"),
    ]
    with pytest.raises(UnsupportedModel) as error:
        graph_of(nodes, {"x": [2]}, ["y"], extra=("org.example",))
    assert "ai.onnx::Nope (opset 17) x 2" in str(error.value)
    assert "org.example::Strange (opset 1) x 1" in str(error.value)


def test_nodes_out_of_order_are_sorted() -> None:
    graph = graph_of(
        [helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Sigmoid", ["x"], ["a"])], {"x": [2]}, ["y"]
    )
    assert [node.source.split()[0] for node in graph.nodes] == ["Sigmoid", "Relu"]


def test_cycles_dangling_and_repeated_names() -> None:
    with pytest.raises(InvalidModel, match="cycle"):
        graph_of([helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])], {"x": [2]}, ["b"])
    with pytest.raises(InvalidModel, match="nothing makes"):
        graph_of([helper.make_node("Relu", ["z"], ["y"])], {"x": [2]}, ["y"])
    with pytest.raises(InvalidModel, match="same name"):
        graph_of([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"])
    with pytest.raises(InvalidModel, match="no node makes the outputs y"):
        graph_of([helper.make_node("Relu", ["x"], ["a"])], {"x": [2]}, ["y"])


def test_a_chain_of_ten_thousand_reversed_nodes_is_sorted() -> None:
    nodes = [helper.make_node("Relu", [f"v{i}" if i else "x"], [f"v{i + 1}"]) for i in range(10_000)]
    assert len(graph_of(nodes[::-1], {"x": [2]}, ["v10000"]).nodes) == 10_000


def test_errors_name_the_node_and_the_types() -> None:
    with pytest.raises(InvalidModel, match=r"Add 'sum' \(opset 17\).*float32\[2\].*float32\[3\]"):
        graph_of([helper.make_node("Add", ["x", "z"], ["y"], name="sum")], {"x": [2], "z": [3]}, ["y"])


def test_unknown_attribute() -> None:
    with pytest.raises(InvalidModel, match="slope"):
        graph_of([helper.make_node("LeakyRelu", ["x"], ["y"], slope=0.5)], {"x": [2]}, ["y"])


def test_symbols_of_inputs() -> None:
    graph = graph_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", "8*h", "?", None, 3]}, ["y"])
    batch, eight_h, question, unnamed, three = graph.inputs[0].shape
    assert batch == dims.symbol("batch") and eight_h == 8 * dims.symbol("h") and three == 3
    assert question == dims.symbol("x.2") and unnamed == dims.symbol("x.3")


def test_model_local_functions_with_attributes_and_absent_inputs() -> None:
    body = [
        helper.make_node("LeakyRelu", ["a"], ["t"]),
        helper.make_node("Clip", ["t", "low", ""], ["r"]),
    ]
    body[0].attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function(
        "local", "Squash", ["a", "low"], ["r"], body, [helper.make_opsetid("", 17)], ["slope"]
    )
    nodes = [helper.make_node("Squash", ["x"], ["y"], domain="local", slope=0.25)]
    graph = graph_of(nodes, {"x": [2]}, ["y"], functions=[function], extra=("local",))
    assert "0.25" in str(graph)


def test_a_function_that_calls_itself() -> None:
    body = [helper.make_node("Again", ["a"], ["r"], domain="local")]
    function = helper.make_function("local", "Again", ["a"], ["r"], body, [helper.make_opsetid("local", 1)])
    nodes = [helper.make_node("Again", ["x"], ["y"], domain="local")]
    with pytest.raises(InvalidModel, match="calls itself"):
        graph_of(nodes, {"x": [2]}, ["y"], functions=[function], extra=("local",))


def test_initializers_listed_as_inputs_are_constants() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    w = helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    array = helper.make_tensor("w", TensorProto.FLOAT, [3], np.ones(3, np.float32))
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x, w], [y], [array])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    imported = import_model(read(proto), SpecificationFunctions())
    assert imported.input_names == ("x",)


def test_specification_bodies_serve_operators_without_a_function() -> None:
    bodies = SpecificationFunctions()
    assert bodies.has("", "MeanVarianceNormalization", 13) and not bodies.has("", "Conv", 13)
