"""Small networks of com.microsoft operators through the engine, against onnxruntime, at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

import gpu_engine
from tests.microsoft_models import Array, integers, numbers, onnxruntime_exactly
from tests.test_operators_microsoft_weights import packed

DOMAIN = "com.microsoft"
HIDDEN, HEADS, INNER = 16, 2, 24


def network(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
    weights: dict[str, Array],
) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(list(nodes), "network", list(inputs), results, held)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def node(name: str, inputs: str, outputs: str, domain: str = DOMAIN, **attributes: Any) -> onnx.NodeProto:
    """A node of space-separated names; "-" is an absent one."""
    sides = ([word.strip("-") for word in side.split()] for side in (inputs, outputs))
    return make_node(name, *sides, domain=domain, **attributes)


def agrees(model: onnx.ModelProto, feeds: Sequence[dict[str, Array]], atol: float = 2e-5) -> None:
    with gpu_engine.compile(model, device="cpu", streams=1) as engine:
        for feed in feeds:
            found = engine.run(feed)
            for actual, wanted in zip(found.values(), onnxruntime_exactly(model, feed), strict=True):
                assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
                np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=atol)


def encoder() -> onnx.ModelProto:
    """A layer of BERT as onnxruntime's optimiser writes it."""
    sizes = {
        "words": (30, HIDDEN), "places": (12, HIDDEN), "types": (2, HIDDEN), "g0": (HIDDEN,), "b0": (HIDDEN,),
        "qkv": (HIDDEN, 3 * HIDDEN), "qkv_bias": (3 * HIDDEN,), "o": (HIDDEN, HIDDEN), "o_bias": (HIDDEN,),
        "g1": (HIDDEN,), "b1": (HIDDEN,), "up": (HIDDEN, INNER), "up_bias": (INNER,), "down": (INNER, HIDDEN),
        "down_bias": (HIDDEN,), "g2": (HIDDEN,), "b2": (HIDDEN,),
    }  # fmt: skip
    nodes = [
        node("EmbedLayerNormalization", "ids segments words places types g0 b0 mask", "x0 mask_index"),
        node("Attention", "x0 qkv qkv_bias mask_index", "a0", num_heads=HEADS),
        node("MatMul", "a0 o", "a1", ""),
        node("SkipLayerNormalization", "a1 x0 g1 b1 o_bias", "x1", epsilon=1e-5),
        node("FusedMatMul", "x1 up", "h0", alpha=0.5),
        node("BiasGelu", "h0 up_bias", "h1"),
        node("MatMul", "h1 down", "h2", ""),
        node("SkipLayerNormalization", "h2 x1 g2 b2 down_bias", "y", epsilon=1e-5),
    ]
    ports = [make_tensor_value_info(name, TensorProto.INT32, ["B", "S"]) for name in ("ids", "segments", "mask")]
    return network(nodes, ports, ["y"], {name: numbers(*shape, seed=len(name)) for name, shape in sizes.items()})


def sentences(batch: int, length: int) -> dict[str, Array]:
    lengths = np.arange(batch)[:, None] % length + 1
    return {
        "ids": integers(0, 30, batch, length, dtype=np.int32),
        "segments": integers(0, 2, batch, length, dtype=np.int32),
        "mask": (np.arange(length) < lengths).astype(np.int32),
    }


def test_an_encoder() -> None:
    agrees(encoder(), [sentences(*size) for size in ((1, 4), (3, 4), (2, 9), (3, 1), (5, 12))])


SIZE = 16


def decoder() -> onnx.ModelProto:
    """A layer of a language model with 4-bit weights and a cache, as onnxruntime's exporter of these writes it."""
    width, kept = 4 * SIZE, 2 * SIZE
    weights = {
        "norm": numbers(width), "table": packed(integers(0, 16, width + 2 * kept, 2, 32, dtype=np.uint8), 4),
        "scales": numbers(width + 2 * kept, 2) * np.float32(0.02),
        "cos": np.cos(numbers(20, SIZE // 2)), "sin": np.sin(numbers(20, SIZE // 2)),
        "one": np.array(1), "axis": np.array([1]),
    }  # fmt: skip
    attributes = {"N": width + 2 * kept, "K": width, "block_size": 32, "bits": 4, "accuracy_level": 1}
    nodes = [
        node("SimplifiedLayerNormalization", "x norm", "n", ""),
        node("MatMulNBits", "n table scales", "qkv", **attributes),
        node("ReduceSum", "mask axis", "count", "", keepdims=0),
        node("Sub", "count one", "last", ""),
        node("Cast", "last", "seqlens", "", to=TensorProto.INT32),
        node("Shape", "mask", "extents", ""),
        node("Gather", "extents one", "total64", "", axis=0),
        node("Cast", "total64", "total", "", to=TensorProto.INT32),
        node("GroupQueryAttention", "qkv - - past_k past_v seqlens total cos sin", "a k v", num_heads=4,
             kv_num_heads=2, do_rotary=1),
        node("SkipSimplifiedLayerNormalization", "a x norm", "y"),
    ]  # fmt: skip
    cache = ["B", 2, "P", SIZE]
    ports = [
        make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", width]),
        make_tensor_value_info("mask", TensorProto.INT64, ["B", "T"]),
        make_tensor_value_info("past_k", TensorProto.FLOAT, cache),
        make_tensor_value_info("past_v", TensorProto.FLOAT, cache),
    ]
    return network(nodes, ports, ["y", "k", "v"], weights)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoder_writes_on(batch: int) -> None:
    """The prompt, then token after token, each with the cache that the one before left."""
    model = decoder()
    past = {name: np.zeros((batch, 2, 0, SIZE), np.float32) for name in ("past_k", "past_v")}
    with gpu_engine.compile(model, device="cpu", streams=1) as engine:
        total = 0
        for step, length in enumerate((4, 1, 1)):
            total += length
            feed = {"x": numbers(batch, length, 4 * SIZE, seed=step), "mask": np.ones((batch, total), np.int64), **past}
            found = engine.run(feed)
            for actual, wanted in zip(found.values(), onnxruntime_exactly(model, feed), strict=True):
                np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)
            past = {"past_k": found["k"], "past_v": found["v"]}


def test_a_quantised_network() -> None:
    """Convolutions with activations around sums and pools of bytes."""
    weights: dict[str, Array] = {
        "w": numbers(8, 3, 3, 3), "b": numbers(8, seed=1), "s": np.array(0.05, np.float32),
        "z": np.array(120, np.uint8), "qw": integers(-127, 128, 8, 8, 3, 3, dtype=np.int8),
        "ws": np.full(8, 0.002, np.float32), "wz": np.zeros(8, np.int8), "fc": integers(-127, 128, 8, 5, dtype=np.int8),
        "fs": np.array(0.01, np.float32),
        "fz": np.array(0, np.int8), "axes": np.array([2, 3]),
    }  # fmt: skip
    nodes = [
        node("FusedConv", "x w b", "c", activation="Clip", activation_params=[0.0, 6.0], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "c s z", "q", ""),
        node("QLinearConv", "q s z qw ws wz s z", "r", "", pads=[1, 1, 1, 1]),
        node("QLinearAdd", "q s z r s z s z", "t"),
        node("QLinearGlobalAveragePool", "t s z s z", "p"),
        node("Squeeze", "p axes", "f", ""),
        node("QGemm", "f s z fc fs fz", "y"),
    ]
    port = make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, "H", "W"])
    model = network(nodes, [port], ["y"], weights)
    agrees(model, [{"x": numbers(batch, 3, *size)} for batch, *size in ((1, 6, 6), (3, 6, 6), (2, 9, 5))], atol=2e-2)
