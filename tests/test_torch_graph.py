"""Graphs of ours as PyTorch modules: the same numbers, and PyTorch's own operators for what people write with them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import gpu_engine
from benchmarks.fetch import Unavailable
from benchmarks.gpu_networks import NEAR, NETWORKS, distance, network
from gpu_engine.tools.bundles import imported

torch = pytest.importorskip("torch", reason="needs PyTorch, of the bench extra")
torch_graph = pytest.importorskip("benchmarks.torch_graph")


def block() -> bytes:
    """A convolution block with a residual, then attention over its pixels: image [n, 8, 6, 6] to [n, 36, 8]."""
    random = np.random.default_rng(2)
    weights = {
        "w": random.standard_normal((8, 8, 3, 3)) / 8, "b": random.standard_normal(8),
        "q": random.standard_normal((8, 8)) / 3, "k": random.standard_normal((8, 8)) / 3,
        "scale": random.standard_normal(8), "shift": random.standard_normal(8), "root": np.array(8**-0.5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["g"]),
        helper.make_node("Mul", ["c", "g"], ["swish"]),
        helper.make_node("Add", ["swish", "image"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["m"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["m", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["pixels"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["pixels", "scale", "shift"], ["n"], axis=-1),
        helper.make_node("MatMul", ["n", "q"], ["query"]),
        helper.make_node("MatMul", ["n", "k"], ["key"]),
        helper.make_node("Transpose", ["key"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["query", "turned"], ["products"]),
        helper.make_node("Mul", ["products", "root"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "n"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([0, 8, 36]), "shape"))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 8, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 36, 8])
    graph = helper.make_graph(nodes, "g", [image], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def test_a_module_gives_what_the_engine_gives() -> None:
    image = np.random.default_rng(0).standard_normal((3, 8, 6, 6)).astype(np.float32)
    module = torch_graph.torch_module(imported(block()), [image.shape])
    with torch.no_grad():
        (found,) = module(torch.from_numpy(image))
    with gpu_engine.compile(block(), device="cpu") as engine:
        np.testing.assert_allclose(found.numpy(), engine.run(image), rtol=1e-4, atol=1e-5)


def test_attention_and_norms_are_pytorchs_own() -> None:
    module = torch_graph.torch_module(imported(block()), [(2, 8, 6, 6)])
    called = {node.target for node in module.graph.nodes if node.op == "call_function"}
    functional = torch.nn.functional
    assert {functional.scaled_dot_product_attention, functional.layer_norm, functional.conv2d} <= called
    assert functional.softmax not in called


@pytest.mark.models
@pytest.mark.parametrize("name", NETWORKS)
def test_a_skeletons_module_gives_what_the_engine_gives(name: str) -> None:
    """`python -m benchmarks.skeletons` writes them."""
    try:
        one = network(name, "fp32")
    except Unavailable as reason:
        pytest.skip(str(reason))
    feed = one.feed(2)
    module = torch_graph.torch_module(one.graph(), [array.shape for array in feed.values()]).eval()
    with torch.no_grad(), gpu_engine.compile(one.model, device="cpu", warmup=False) as engine:
        found = [output.numpy() for output in module(*map(torch.from_numpy, feed.values()))]
        for output, expected in zip(found, engine.run(feed).values(), strict=True):
            assert distance(output, expected) < NEAR["fp32"]


def test_what_is_not_translated_is_named() -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    k = numpy_helper.from_array(np.array([2]), "k")
    x, v = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in "xv")
    graph = helper.make_graph([node], "g", [x], [v], [k])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(torch_graph.NotInTorch, match="TopK"):
        torch_graph.torch_module(imported(model.SerializeToString()), [(2, 5)])
