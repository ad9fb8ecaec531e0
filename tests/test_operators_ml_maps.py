"""Operators of ai.onnx.ml on maps that a caller brings, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import gpu_engine
from gpu_engine.errors import ExecutionError, InputError, InvalidModel

ML = "ai.onnx.ml"
ELEMENTS = {float: TensorProto.FLOAT, int: TensorProto.INT64, str: TensorProto.STRING}


def model_of(op: str, key: int, value: int, output: int, **attributes: Any) -> bytes:
    """One operator from the map x to y."""
    node = helper.make_node(op, ["x"], ["y"], domain=ML, **attributes)
    kind = helper.make_map_type_proto(key, helper.make_tensor_type_proto(value, None))
    result = helper.make_tensor_value_info("y", output, None)
    graph = helper.make_graph([node], "g", [helper.make_value_info("x", kind)], [result])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(ML, 1)]
    model: bytes = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return model


def both(model: bytes, value: dict[Any, Any]) -> tuple[Any, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with gpu_engine.compile(model) as engine:
        return engine.run({"x": value})["y"], session.run(None, {"x": value})[0]


def agrees(model: bytes, value: dict[Any, Any]) -> None:
    found, expected = both(model, value)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("form", ["DENSE", "SPARSE"])
@pytest.mark.parametrize(("cast_to", "output"), [("TO_FLOAT", TensorProto.FLOAT), ("TO_INT64", TensorProto.INT64)])
def test_a_cast_map(cast_to: str, output: int, form: str) -> None:
    attributes = {"cast_to": cast_to, "map_form": form, "max_map": 6}
    agrees(model_of("CastMap", TensorProto.INT64, TensorProto.FLOAT, output, **attributes), {4: 1.5, 0: -2.0, 2: 3.25})


@pytest.mark.parametrize(
    ("value", "cast_to", "output", "expected"),
    [
        ({4: "1.5", 0: "-2"}, "TO_FLOAT", TensorProto.FLOAT, [-2.0, 0.0, 0.0, 0.0, 1.5]),
        ({4: "15", 0: "-2"}, "TO_INT64", TensorProto.INT64, [-2, 0, 0, 0, 15]),
        ({3: "b", -1: "z", 1: "a"}, "TO_STRING", TensorProto.STRING, ["", "a", "", "b", ""]),
    ],
)
def test_maps_of_strings(value: dict[int, str], cast_to: str, output: int, expected: list[Any]) -> None:
    """The Python binding of ONNX Runtime takes no such map."""
    for form, row in (("SPARSE", expected), ("DENSE", None)):
        attributes = {"cast_to": cast_to, "map_form": form, "max_map": 5}
        with gpu_engine.compile(
            model_of("CastMap", TensorProto.INT64, TensorProto.STRING, output, **attributes)
        ) as engine:
            dense = [type(expected[0])(value[key]) for key in sorted(value)]
            assert engine.run({"x": value})["y"].tolist() == [row or dense]


def test_an_empty_map() -> None:
    for form, columns in (("SPARSE", 3), ("DENSE", 0)):
        model = model_of("CastMap", TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT, map_form=form, max_map=3)
        with gpu_engine.compile(model) as engine:
            assert engine.run({"x": {}})["y"].tolist() == [[0.0] * columns]


@pytest.mark.parametrize(("key", "vocabulary"), [(int, [5, 0, 9]), (str, ["b", "", "zz"])])
@pytest.mark.parametrize("value", [float, int, str])
def test_a_vectorized_dict(key: type, value: type, vocabulary: list[Any]) -> None:
    if key is value:
        pytest.skip("the specification allows no map from a type to itself here")
    name = "int64_vocabulary" if key is int else "string_vocabulary"
    model = model_of("DictVectorizer", ELEMENTS[key], ELEMENTS[value], ELEMENTS[value], **{name: vocabulary})
    values = [value(7), value(-2), value(1)]
    with gpu_engine.compile(model) as engine:
        keys = [vocabulary[2], vocabulary[0], key(3)]
        found = engine.run({"x": dict(zip(keys, values, strict=True))})["y"]
        blank = "" if value is str else 0
        assert found.tolist() == [[values[1], blank, values[0]]]
        assert engine.run({"x": {}})["y"].tolist() == [[blank] * 3]
        assert len(engine.engines) == 1


def test_maps_inside_branches() -> None:
    branches = {}
    for branch, vocabulary in (("then_branch", [1, 2]), ("else_branch", [2, 3])):
        node = helper.make_node("DictVectorizer", ["x"], [branch], domain=ML, int64_vocabulary=vocabulary)
        branches[branch] = helper.make_graph(
            [node], branch, [], [helper.make_tensor_value_info(branch, TensorProto.FLOAT, None)]
        )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], **branches)],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_value_info(
                "x", helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, None))
            ),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(ML, 1)]
    with gpu_engine.compile(helper.make_model(graph, opset_imports=imports, ir_version=10)) as engine:
        for condition, expected in ((True, [[0.5, 0.25]]), (False, [[0.25, 0]])):
            assert engine.run([np.array(condition), {2: 0.25, 1: 0.5}])[0].tolist() == expected


def test_what_is_no_map_is_refused() -> None:
    model = model_of("DictVectorizer", TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT, int64_vocabulary=[1])
    with gpu_engine.compile(model) as engine:
        for value in (np.zeros(3, np.float32), [1.0], {"a": 1.0}, {1: "a"}, {1: 1.0, "a": 2.0}):
            with pytest.raises(InputError):
                engine.run({"x": value})
        assert engine.run({"x": {1: 2}})["y"].tolist() == [[2]]


def test_what_does_not_fit_is_refused() -> None:
    sparse = {"map_form": "SPARSE", "max_map": 2}
    with (
        gpu_engine.compile(
            model_of("CastMap", TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT, **sparse)
        ) as engine,
        pytest.raises(ExecutionError, match="key 2 of a map"),
    ):
        engine.run({"x": {2: 1.0}})
    for attributes in ({"cast_to": "TO_BOOL"}, {"map_form": "LOOSE"}, {"map_form": "SPARSE", "max_map": 0}):
        model = model_of("CastMap", TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT, **attributes)
        with gpu_engine.compile(model) as engine, pytest.raises(InvalidModel):
            engine.run({"x": {0: 1.0}})


def test_a_map_given_to_another_operator_is_refused() -> None:
    model = onnx.load_from_string(model_of("CastMap", TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Abs", ["x"], ["y"]))
    with gpu_engine.compile(model) as engine, pytest.raises(gpu_engine.GpuEngineError):
        engine.run({"x": {0: 1.0}})
