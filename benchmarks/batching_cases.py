"""The models of `benchmarks.batching`: what a caller sends, how near answers must be, and what batching must gain.

Some of what they were asked for they cannot reach on two cores of a Zen 3, whose kernels do at best 95 GFLOP/s each.

* mlp_1024: 1, 2, 4, 6, 8 and 12 rows take 0.23, 0.23, 0.30, 0.44, 0.64 and 0.82 ms while its 12 MB of weights lie in
  the L3 cache. From 4 rows on that is arithmetic, at most 3.5 times the rate of lone rows. Where other programs take
  the cache it gains more, because lone rows then wait for memory.
* oww_melspectrogram: 1, 2, 4 and 8 rows take 0.054, 0.093, 0.17 and 0.33 ms: 1.3 times, and what waking callers costs.
* oww_embedding: a lone row is 84 MFLOP in 1.2 ms, and 8 rows take 8 times as long.
* text2tashkeel: a sentence of 64 letters is 300 million operations on bytes in 4.1 ms, and each of 8 would take as
  long. DynamicQuantizeLSTM has one scale for all rows of its state, so that rows together give other numbers than rows
  alone: the proof refuses it, and a form that keeps requests apart would only save calls.

The tail at 70 % of capacity has a floor too, whatever serves: where every row costs the same, as in oww_embedding and
mobilenetv2, two streams that serve one row at a time have a 99th percentile of 4.2 times a lone request, with no time
between one and the next. `gpu-engine simulate` says so, and 2.8 times for the decoder's costs, 4.4 for the MLP's:

    gpu-engine simulate --gpus 1 --streams 2 --slots 1 --batch 1 --compute 0us+12ms --rate 116
    gpu-engine simulate --gpus 1 --streams 2 --slots 1 --batch 8 --compute 3500us+300us --rate 1900
    gpu-engine simulate --gpus 1 --streams 2 --slots 1 --batch 8 --compute 170us+60us --rate 17200
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from benchmarks.models import MODELS

Feed = dict[str, NDArray[Any]]
LAYERS, WIDTH = 3, 1024
BLOCKS, HIDDEN, HEADS, PAST, LETTERS = 4, 512, 8, 32, 8192


@dataclass(frozen=True)
class Case:
    """`feeds(n)` are n requests of one row each; `target` is how many times the rate without batching there must be."""

    name: str
    model: Callable[[], Any]
    feeds: Callable[[int], list[Feed]]
    target: float
    atol: float

    def agrees(self, outputs: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
        """Whether outputs are those of the same row alone."""
        return all(
            np.allclose(outputs[name], expected[name], rtol=1e-5, atol=self.atol, equal_nan=True) for name in expected
        )


def _real(name: str, target: float, shape: tuple[int, ...] = ()) -> Case:
    model = MODELS[name]

    def feeds(count: int) -> list[Feed]:
        one = shape or model.timed_shape
        return [varied(model.feed(*one), i) for i in range(count)]

    return Case(name, lambda: str(model.path()), feeds, target, model.tolerance.atol)


def varied(feed: Feed, number: int) -> Feed:
    """The same request with its contents moved along: still a client's input, but another one."""
    return {name: np.roll(array, number, axis=-1) if array.ndim else array for name, array in feed.items()}


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **attributes)


def _model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], weights: Feed
) -> onnx.ModelProto:
    ports = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "benchmark", ports[0], ports[1], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def mlp() -> onnx.ModelProto:
    """x [N, 1024] through three layers of 1024 with Relu: 12 MB of weights for 6 MFLOP."""
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5 for i in range(LAYERS)}
    nodes, last = [], "x"
    for i in range(LAYERS):
        nodes += [_node("MatMul", [last, f"w{i}"], f"m{i}"), _node("Relu", [f"m{i}"], f"y{i}")]
        last = f"y{i}"
    return _model(nodes, {"x": ["N", WIDTH]}, {last: ["N", WIDTH]}, weights)


def decoder_step() -> onnx.ModelProto:
    """One token of a transformer: x [N, 1, 512] with the keys and values of 32 tokens before it, 4 blocks, and the
    scores of 8192 tokens; 67 MB of weights, each used once for a row."""
    random = np.random.default_rng(1)
    weights: Feed = {"heads": np.array([0, 1, HEADS, HIDDEN // HEADS]), "flat": np.array([0, 1, HIDDEN])}
    nodes, inputs, last = [], {"x": ["N", 1, HIDDEN]}, "x"

    def product(name: str, value: str, columns: int, rows: int = HIDDEN) -> str:
        weights[f"{name}_w"] = random.standard_normal((rows, columns), np.float32) / rows**0.5
        nodes.append(_node("MatMul", [value, f"{name}_w"], name))
        return name

    def normal(name: str, value: str) -> str:
        weights[f"{name}_s"] = np.ones(HIDDEN, np.float32)
        nodes.append(_node("LayerNormalization", [value, f"{name}_s"], name, axis=-1))
        return name

    weights["scale"] = np.array((HIDDEN // HEADS) ** -0.5, np.float32)
    for i in range(BLOCKS):
        for port in (f"keys{i}", f"values{i}"):
            inputs[port] = ["N", HEADS, PAST, HIDDEN // HEADS]
        value = normal(f"n{i}", last)
        for part in "qkv":
            product(f"{part}{i}", value, HIDDEN)
            nodes.append(_node("Reshape", [f"{part}{i}", "heads"], f"{part}h{i}"))
            nodes.append(_node("Transpose", [f"{part}h{i}"], f"{part}t{i}", perm=[0, 2, 1, 3]))
        nodes += [
            _node("Concat", [f"keys{i}", f"kt{i}"], f"k_all{i}", axis=2),
            _node("Concat", [f"values{i}", f"vt{i}"], f"v_all{i}", axis=2),
            _node("Transpose", [f"k_all{i}"], f"k_turned{i}", perm=[0, 1, 3, 2]),
            _node("MatMul", [f"qt{i}", f"k_turned{i}"], f"raw{i}"),
            _node("Mul", [f"raw{i}", "scale"], f"scores{i}"),
            _node("Softmax", [f"scores{i}"], f"shares{i}", axis=-1),
            _node("MatMul", [f"shares{i}", f"v_all{i}"], f"mixed{i}"),
            _node("Transpose", [f"mixed{i}"], f"turned{i}", perm=[0, 2, 1, 3]),
            _node("Reshape", [f"turned{i}", "flat"], f"joined{i}"),
            _node("Add", [last, product(f"o{i}", f"joined{i}", HIDDEN)], f"a{i}"),
        ]
        up = product(f"up{i}", normal(f"m{i}", f"a{i}"), 4 * HIDDEN)
        nodes.append(_node("Relu", [up], f"r{i}"))
        nodes.append(_node("Add", [f"a{i}", product(f"down{i}", f"r{i}", HIDDEN, 4 * HIDDEN)], f"b{i}"))
        last = f"b{i}"
    product("logits", normal("last", last), LETTERS)
    return _model(nodes, inputs, {"logits": ["N", 1, LETTERS]}, weights)


def _rows(shapes: dict[str, tuple[int, ...]]) -> Callable[[int], list[Feed]]:
    def feeds(count: int) -> list[Feed]:
        random = np.random.default_rng(2)
        return [
            {name: random.standard_normal((1, *shape), np.float32) for name, shape in shapes.items()}
            for _ in range(count)
        ]

    return feeds


_CACHE = (HEADS, PAST, HIDDEN // HEADS)
_STEP = {"x": (1, HIDDEN), **{f"{kind}{i}": _CACHE for i in range(BLOCKS) for kind in ("keys", "values")}}
CASES = {
    case.name: case
    for case in (
        Case("mlp_1024", mlp, _rows({"x": (WIDTH,)}), 4.0, 1e-4),
        Case("decoder_step", decoder_step, _rows(_STEP), 2.0, 1e-4),
        _real("oww_melspectrogram", 2.0),
        _real("text2tashkeel_rawi_int8", 2.0),
        _real("oww_embedding", 2.0),
        _real("mobilenetv2", 0.98),
        _real("ppocrv4_det", 0.98, (1, 320, 320)),
    )
}
