"""Queries, keys and values by one product: which graphs it is done in, and that results stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.gpu.launches import Launch
from gpu_engine.passes import narrow_weights


def attention(
    widths: tuple[int, int, int] = (32, 32, 32), key_source: str = "x", scales: tuple[int, ...] | None = None
) -> onnx.ModelProto:
    """[b, s, 24] -> attention of heads of 16 features; keys may come from another tensor. With the shape of `scales`
    weights are int8."""
    rng = np.random.default_rng(0)
    nodes, constants = [], [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.25])]
    for name, width, source in zip("qkv", widths, ("x", key_source, "x"), strict=True):
        for suffix, shape in (("w", (24, width)), ("b", (width,))):
            array = rng.standard_normal(shape, np.float32)
            constants.append(helper.make_tensor(name + suffix, TensorProto.FLOAT, shape, array.ravel()))
        if scales is not None:
            codes, held = rng.integers(-9, 9, (24, width)), rng.uniform(0.1, 0.3, scales)
            constants.append(helper.make_tensor(name + "c", TensorProto.INT8, (24, width), codes.ravel()))
            constants.append(helper.make_tensor(name + "s", TensorProto.FLOAT, scales, held.ravel()))
            nodes.append(helper.make_node("DequantizeLinear", [name + "c", name + "s"], [name + "d"]))
        shape = np.array([0, 0, width // 16, 16], np.int64)
        constants.append(helper.make_tensor(name + "shape", TensorProto.INT64, [4], shape))
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes += [
            helper.make_node("MatMul", [source, name + ("w" if scales is None else "d")], [name + "0"], name=name),
            helper.make_node("Add", [name + "0", name + "b"], [name + "1"], name=name),
            helper.make_node("Reshape", [name + "1", name + "shape"], [name + "2"]),
            helper.make_node("Transpose", [name + "2"], [name], perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 24]) for name in {"x", key_source}]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "attention", ports, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def products(model: onnx.ModelProto) -> int:
    with gpu_engine.compile(model, device="interpret") as engine:
        steps = engine.plan.steps  # type: ignore[union-attr]
    sources = {s.source for s in steps if isinstance(s.kernel, Launch) and "gemm_" in s.kernel.kernel.name}
    return len(sources)


@pytest.mark.parametrize(("model", "count"), [(attention(), 1), (attention(key_source="z"), 3)])
def test_projections_of_one_tensor_are_one_product(model: onnx.ModelProto, count: int) -> None:
    assert products(model) == count
    agree(model)


@pytest.mark.parametrize("scales", [(), (32,)])
def test_narrow_weights_lie_side_by_side_too(scales: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_weights, "LEAST", 1)
    model = attention(scales=scales)
    assert products(model) == 1
    agree(model)


def agree(model: onnx.ModelProto) -> None:
    rng = np.random.default_rng()
    with gpu_engine.compile(model, device="interpret") as ours, gpu_engine.compile(model, device="cpu") as cpu:
        for shape in ((1, 5, 24), (3, 17, 24)):
            feed = {name: rng.standard_normal(shape, np.float32) for name in ours.input_names}
            np.testing.assert_allclose(ours.run(feed)["y"], cpu.run(feed)["y"], rtol=1e-4, atol=1e-4)
