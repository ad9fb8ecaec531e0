"""Models of one node, run by the reference with operands known, open or of symbolic shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.ir.dtypes import ONNX_NUMBER
from gpu_engine.ir.graph import Graph, verify
from tests.reference import run_graph

Array = NDArray[Any]
FORMS = ("static", "symbolic", "known", "constant")


def model_of(
    name: str,
    inputs: Mapping[str, Array | None],
    attributes: Mapping[str, Any],
    opset: int,
    outputs: int,
    known: Sequence[str] = (),
    free: Sequence[str] = (),
) -> onnx.ModelProto:
    """One node; the inputs named in `known` are initializers, the extents of those in `free` are left open."""
    domain, _, op_type = name.rpartition("::")
    given = {key: array for key, array in inputs.items() if array is not None}
    node = helper.make_node(
        op_type,
        [key if array is not None else "" for key, array in inputs.items()],
        [f"y{i}" for i in range(outputs)],
        domain=domain,
        **attributes,
    )
    ports = [
        helper.make_tensor_value_info(
            key, ONNX_NUMBER[array.dtype], [None] * array.ndim if key in free else array.shape
        )
        for key, array in given.items()
        if key not in known
    ]
    weights = [onnx.numpy_helper.from_array(given[key], key) for key in known if key in given]
    results = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    graph = helper.make_graph([node], "g", ports, results, weights)
    imports = [helper.make_opsetid("", opset if not domain else 21)]
    imports += [helper.make_opsetid(domain, opset)] if domain else []
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def graph_of(model: onnx.ModelProto) -> Graph:
    return verify(import_model(read(model.SerializeToString()), SpecificationFunctions()), "import")


def run(
    name: str,
    inputs: Mapping[str, Array | None],
    opset: int = 21,
    outputs: int = 1,
    known: Sequence[str] = (),
    form: str = "known",
    **attributes: Any,
) -> Any:
    """The outputs of one node: `known` operands are constants except in form "static"; "symbolic" leaves the extents
    of the others open, "constant" makes every operand a constant."""
    given = {key: array for key, array in inputs.items() if array is not None}
    fixed = {"static": (), "constant": tuple(given)}.get(form, tuple(known))
    graph = graph_of(model_of(name, inputs, attributes, opset, outputs, fixed, given if form == "symbolic" else ()))
    if form == "constant":
        assert not graph.nodes, f"not folded: {graph}"
    results = list(run_graph(graph, {key: given[key] for key in given if key not in fixed}).values())
    return results[0] if outputs == 1 else results


def same(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    expected = np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def onnxruntime_of(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))
